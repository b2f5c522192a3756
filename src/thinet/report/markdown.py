"""A report as Markdown tables, for a README or a pull request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from thinet.report.data import Report
from thinet.report.methods import method_table
from thinet.report.text import MISSING, columns, locked_reasons


def render(report: Report) -> str:
    """The report as Markdown; ends with a newline."""
    parts = [f"# {report.title}"]
    if report.summary:
        parts.append(report.summary)
    if report.points:
        parts.append(table(*method_table(report)))
    elif report.networks:
        shown = columns(report)
        rows = [[n.name, *(cell(n) for _, cell in shown)] for n in report.networks]
        parts.append(table(["network", *(heading for heading, _ in shown)], rows))
    if report.groups:
        rows = [
            [f"`{g.name}`", str(g.channels), MISSING if g.kept is None else str(g.kept)]
            for g in report.groups
        ]
        parts.append(table(["group", "channels", "kept"], rows))
    parts.extend(_bullets("Locked", locked_reasons(report)))
    parts.extend(_bullets("Notes", report.notes))
    parts.extend(_bullets("How it was made", (f"{k}: `{v}`" for k, v in report.facts)))
    return "\n\n".join(parts) + "\n"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column left and the others right aligned."""
    marks = ["---", *("---:" for _ in headings[1:])]
    lines = [headings, marks, *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ") or " "


def _bullets(title: str, lines: Iterable[str]) -> list[str]:
    found = list(lines)
    return [f"## {title}", "\n".join(f"- {line}" for line in found)] if found else []
