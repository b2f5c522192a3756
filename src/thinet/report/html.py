"""A report as one self-contained HTML page: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from thinet.report import svg
from thinet.report.chart import method_chart
from thinet.report.data import Group, Report
from thinet.report.methods import method_table
from thinet.report.text import Figure, columns, figures, locked_reasons

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1c1e21; --soft: #6a6f76; --rule: #e4e5e3;
  --full: #2563a8; --pale: #a9c6e6; --dense: #8a8f96; --good: #1a7f4b;
  --l0: #2563a8; --l1: #c2571a; --l2: #1a7f4b; --l3: #8e44ad; --l4: #b3861b; --l5: #c0355b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #141618; --card: #1c1f22; --ink: #e8e9ea; --soft: #9aa0a8; --rule: #30353a;
    --full: #6aa9ec; --pale: #345377; --dense: #767c84; --good: #5cc48d;
    --l0: #6aa9ec; --l1: #f0935a; --l2: #5cc48d; --l3: #c893e0; --l4: #e0b84e; --l5: #f0799a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
}
main { max-width: 880px; margin: 0 auto; padding: 48px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -0.01em; margin: 0 0 16px; }
h2 { font-size: 17px; margin: 44px 0 12px; }
p.summary { color: var(--soft); margin: -8px 0 28px; max-width: 62ch; }
p.caption { color: var(--soft); font-size: 13px; margin: 0 0 10px; max-width: 72ch; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 14px; }
.figure, .panel {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
}
.figure { padding: 16px 18px; }
.figure .label { color: var(--soft); font-size: 13px; }
.figure .after { font-size: 27px; font-weight: 650; letter-spacing: -0.02em; }
.figure .before { color: var(--soft); font-size: 13px; }
.figure .better { color: var(--good); font-weight: 600; }
.figure .worse { color: var(--ink); font-weight: 600; }
.panel { padding: 14px 18px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-size: 13px; font-weight: 550; white-space: nowrap; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; }
tr.chosen td { font-weight: 650; }
ul { padding-left: 20px; margin: 0; }
li { margin: 5px 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
code, dd { font: 13px/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
svg { display: block; width: 100%; min-width: 560px; height: auto; }
svg text { font-size: 12.5px; fill: var(--ink); }
svg text.small { font-size: 9px; }
svg text.value, svg text.tick { fill: var(--soft); font-size: 11.5px; }
svg text.value.small { font-size: 8.5px; }
svg .grid { stroke: var(--rule); }
svg .dashed { stroke: var(--dense); stroke-width: 1.5; stroke-dasharray: 5 4; }
svg .full { fill: var(--full); } svg .pale { fill: var(--pale); } svg .dense { fill: var(--dense); }
svg .locked { fill: var(--dense); } svg .before { fill: var(--rule); }
svg polyline { fill: none; stroke-width: 2; }
svg circle { stroke: var(--card); stroke-width: 1; }
svg polygon { opacity: 0.15; }
svg polyline.again { stroke-dasharray: 6 3; }
""" + "".join(
    f"svg polyline.line{i} {{ stroke: var(--l{i}); }} svg polygon.line{i} {{ fill: var(--l{i}); }} "
    f"svg circle.line{i}, svg text.text{i} {{ fill: var(--l{i}); }}\n"
    for i in range(6)
)


def render(report: Report) -> str:
    """The report as a whole HTML document."""
    parts = [f"<h1>{escape(report.title)}</h1>"]
    if report.summary:
        parts.append(f'<p class="summary">{escape(report.summary)}</p>')
    parts.append(_figures(figures(report)))
    if report.points:
        parts += _methods(report)
    elif report.networks:
        parts += ["<h2>Networks</h2>", _panel(_networks(report)), *_accuracy(report)]
    parts += _widths(report.groups)
    parts += _list("Locked groups", locked_reasons(report))
    parts += _list("Notes", report.notes)
    if report.facts:
        rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in report.facts)
        parts += ["<h2>How it was made</h2>", _panel(f"<dl>{rows}</dl>")]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _figures(shown: Sequence[Figure]) -> str:
    cards = "".join(
        f'<div class="figure"><div class="label">{escape(f.label)}</div>'
        f'<div class="after">{escape(f.after)}</div>'
        f'<div class="before">from {escape(f.before)} '
        f'<span class="{"better" if f.better else "worse"}">{escape(f.change)}</span></div></div>'
        for f in shown
    )
    return f'<div class="figures">{cards}</div>' if cards else ""


def _networks(report: Report) -> str:
    shown = columns(report)
    head = "".join(f"<th>{escape(h)}</th>" for h in ("network", *(h for h, _ in shown)))
    rows: list[str] = []
    for network in report.networks:
        cells = "".join(
            f"<td>{escape(c)}</td>" for c in (network.name, *(f(network) for _, f in shown))
        )
        chosen = ' class="chosen"' if network is report.headline else ""
        rows.append(f"<tr{chosen}>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _methods(report: Report) -> list[str]:
    parts: list[str] = []
    for title, tuned in (("Without training", False), ("After fine-tuning", True)):
        chart = method_chart(report, tuned=tuned)
        if chart:
            parts += [f"<h2>{title}</h2>", _panel(chart)]
    caption = "Mean over seeds ± one sample standard deviation; the bands above are as wide."
    headings, rows = method_table(report)
    head = "".join(f"<th>{escape(h)}</th>" for h in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    several = any(p.seeds > 1 for p in report.points)
    told = [f'<p class="caption">{caption}</p>'] if several else []
    return [*parts, "<h2>Methods</h2>", *told, _panel(table)]


def _accuracy(report: Report) -> list[str]:
    networks = report.networks
    bars, lines = svg.accuracy_bars(networks), svg.curves(networks, steps=report.steps)
    parts: list[str] = []
    if bars:
        parts.append("<h2>Accuracy</h2>")
        if any(n.top1_tuned is not None for n in networks):
            cut = "after the last cut" if report.steps else "with no training step after the cut"
            caption = f"Pale: {cut}. Full: after fine-tuning."
            parts.append(f'<p class="caption">{caption}</p>')
        parts.append(_panel(bars))
    if lines:
        parts += ["<h2>Step by step</h2>" if report.steps else "<h2>Fine-tuning</h2>"]
        parts.append(_panel(lines))
    return parts


def _widths(groups: Sequence[Group]) -> list[str]:
    if not groups:
        return []
    pruned = any(g.kept is not None for g in groups)
    caption = (
        "Channels of each group of the network, from input to output: grey before, blue after."
        if pruned
        else "Channels of each group of the network, from input to output; grey may not be cut."
    )
    return ["<h2>Widths</h2>", f'<p class="caption">{caption}</p>', _panel(svg.widths(groups))]


def _list(title: str, lines: Sequence[str]) -> list[str]:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return [f"<h2>{title}</h2>", _panel(f"<ul>{items}</ul>")] if items else []


def _panel(inner: str) -> str:
    return f'<div class="panel">{inner}</div>'
