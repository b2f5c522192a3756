"""docs/coverage.md from the rows of `benchmarks/coverage.py`.

    python benchmarks/coverage_page.py torchvision.jsonl timm.jsonl transformers.jsonl \
        --out docs/coverage.md
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coverage import family_reason

Row = dict[str, Any]
CUTS = ("exact", "wrong", "crash", "norm")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+", help="JSON lines of benchmarks/coverage.py")
    parser.add_argument("--out", type=Path, default=Path("docs/coverage.md"))
    given = parser.parse_args()
    rows: dict[tuple[str, str], Row] = {}
    for path in given.rows:
        for text in path.read_text().splitlines():
            row = json.loads(text)
            key = row["suite"], row["model"]
            # A later line is a model that was run again, perhaps without Torch-Pruning.
            rows[key] = {k: v for k, v in rows.get(key, {}).items() if k == "torch_pruning"} | row
    given.out.write_text(page(list(rows.values())))


def page(rows: Sequence[Row]) -> str:
    suites = dict.fromkeys(row["suite"] for row in rows)
    parts = [joined(INTRODUCTION)]
    for suite in suites:
        ours = [row for row in rows if row["suite"] == suite]
        parts += [f"## {suite}", summary(ours)]
    parts += ["## Why the rest is locked", reasons(rows)]
    for suite in suites:
        ours = sorted((row for row in rows if row["suite"] == suite), key=lambda r: r["model"])
        parts += [f"## {suite}, model by model", table(ours)]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """# Coverage

Made by `benchmarks/coverage.py` and `benchmarks/coverage_page.py`, from networks with random
weights:

    python benchmarks/coverage.py --suite torchvision --compare --json torchvision.jsonl
    python benchmarks/coverage.py --suite timm --per-family 4 --json timm.jsonl
    python benchmarks/coverage.py --suite transformers --json transformers.jsonl
    python benchmarks/coverage_page.py torchvision.jsonl timm.jsonl transformers.jsonl

Of each network three random groups that can be cut lose half of their channels, one group at a
time. A cut is *exact* where the cut network computes what the original computes with those
channels silenced (`tests/oracle.py`; a difference of 1e-4 of the outputs at most, in float64
where float32 is not enough). Channels that leave the model are not counted, for nobody could
cut them. Seconds are processor seconds of one thread for `find_groups` (trace, groups and all
re-trace checks) on a machine that was busy with other work, so they are upper bounds. *No answer*
is a network for which this took longer than was allowed; where only the forward passes of the
comparison did, in float32 and float64, fewer cuts are compared. "Torch-Pruning"
is version 1.6.1 with the settings of its own examples, on the same networks, three of its own
groups cut to half, in this run or an earlier one, judged in the same way: *wrong* is a cut network
that runs and computes something else, *crash* one that no longer runs or could not be made, *norm*
a cut under a LayerNorm, which no cut can do exactly."""


def joined(text: str) -> str:
    """Each paragraph on one line, as in the other pages."""
    parts = text.split("\n\n")
    return "\n\n".join(p if p.startswith("    ") else p.replace("\n", " ") for p in parts)


def summary(rows: Sequence[Row]) -> str:
    fine = [row for row in rows if "error" not in row]
    failed = [f"{row['model']} ({row['error']})" for row in rows if "error" in row]
    stopped = [f"{r['model']} ({r['exact']} were)" for r in fine if "unfinished" in r]
    seconds = sorted(row["seconds"] for row in fine)
    slow = [f"{r['model']} {r['seconds']:.1f}" for r in fine if r["seconds"] > 5]
    half = sum(row["mac_share"] >= 0.5 for row in fine)
    less = [f"{r['model']} {r['mac_share']:.0%}" for r in fine if r["mac_share"] < 0.5]
    lines = [
        f"* {len(rows)} models of {len({row.get('family') for row in rows})} families; "
        f"crashes or no answer: {len(failed)}" + (f": {'; '.join(failed)}" if failed else ""),
        f"* cuts: {sum(r['exact'] for r in fine)} exact, {sum(r['wrong'] for r in fine)} wrong"
        + (f"; no time to compare all of: {', '.join(stopped)}" if stopped else ""),
        f"* at least half of the multiply-adds in groups that can be cut: {half} of {len(rows)} "
        f"({half / len(rows):.1%})" + (f"; not: {', '.join(less)}" if less else ""),
        f"* seconds: median {statistics.median(seconds):.2f}, greatest {seconds[-1]:.1f}"
        + (f"; over 5: {', '.join(slow)}" if slow else ""),
    ]
    theirs = [row["torch_pruning"] for row in rows if "torch_pruning" in row]
    if theirs:
        ran = [t for t in theirs if "error" not in t]
        times = [t["seconds"] for t in ran if t["seconds"]]
        counts = ", ".join(f"{sum(t[key] for t in ran)} {key}" for key in CUTS)
        late = sum("no answer" in t.get("error", "") for t in theirs)
        lines.append(
            f"* Torch-Pruning on {len(theirs) - late} of them (no answer in three minutes on the "
            f"busy machine on {late} more, which is not held against it): {counts}; no groups at "
            f"all in {len(theirs) - late - len(ran)} models, a silent error in "
            f"{sum(t['wrong'] > 0 for t in ran)}, a crash in {sum(t['crash'] > 0 for t in ran)}; "
            f"median {statistics.median(times or [0]):.2f} s"
        )
    return "\n".join(lines)


def reasons(rows: Sequence[Row]) -> str:
    found = Counter(
        family_reason(text)
        for row in rows
        if "error" not in row
        for text in row["reasons"].values()
    )
    lines = ["| groups | reason |", "| ---: | --- |"]
    lines += [f"| {count} | {text.replace('|', '/')} |" for text, count in found.most_common(25)]
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| model | s | groups | locked | channels | MACs | exact | wrong | Torch-Pruning |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['model']} | {row['error']} | | | | | | | |")
            continue
        lines.append(
            f"| {row['model']} | {row['seconds']:.2f} | {row['groups']} | {row['locked']} | "
            f"{row['channel_share']:.0%} | {row['mac_share']:.0%} | {row['exact']} | "
            f"{row['wrong']} | {theirs(row.get('torch_pruning'))} |"
        )
    return "\n".join(lines)


def theirs(found: Row | None) -> str:
    if found is None:
        return ""
    if "error" in found:
        return "failed: " + " ".join(found["error"].split()).replace("|", "/")[:60]
    return ", ".join(f"{found[key]} {key}" for key in CUTS if found[key])


if __name__ == "__main__":
    main()
