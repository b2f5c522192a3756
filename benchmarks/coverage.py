"""How much of torchvision, timm and transformers can be cut, and whether the cuts are right.

    python benchmarks/coverage.py --suite torchvision --json coverage.jsonl --compare

One row a model: seconds to find the groups, groups and locked groups, the share of channels and of
multiply-adds in groups that can be cut, and the outcome of cutting three random groups to half of
their channels: the cut model against the original with the same channels silenced (tests/oracle.py,
randomised weights, float32, decided in float64 where float32 disagrees). `--compare` does the same
with Torch-Pruning 1.6.1. Rows are appended to the JSON-lines file; a model already there is not run
again unless it failed, so that a run that was stopped goes on. Where the comparison takes too long,
what was found before it stays. Seconds are processor seconds, so that other work on the machine
does not count; with one thread they are what a clock shows on an idle machine.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import multiprocessing
import random
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

FEW = 25
"""Models after which a worker is replaced, to give its memory back."""


# --- in the worker --------------------------------------------------------------------------


def measure(suite: str, name: str, cuts: int, other: bool) -> Iterator[dict[str, Any]]:
    """The row of one model, and before it is whole what is known so far."""
    import zoo
    from tests.oracle import randomise
    from torch_pruning_side import compare

    import thinet
    from thinet.trace.analyse import analyse

    case = zoo.build(suite, name)
    model, inputs = case.model if case.as_made else randomise(case.model), case.inputs
    row: dict[str, Any] = {"suite": suite, "model": name, "family": case.family}
    row["params"] = sum(p.numel() for p in model.parameters())
    if other:
        model = comparable(suite, name, model, inputs)
        yield row | {"torch_pruning": compare(model, inputs, cuts, seed=len(name))}
        return
    start = time.process_time()
    analysis = analyse(model, inputs)  # what thinet.find_groups does
    groups = analysis.groups
    row["seconds"] = time.process_time() - start
    try:
        by_module = thinet.count(model, inputs).by_module
    except Exception as error:  # noqa: BLE001  the cuts are still worth knowing
        by_module, row["count_error"] = {}, f"{type(error).__name__}: {error}"[:200]
    row |= shares(groups, by_module)
    yield row | dict(NOTHING_CUT)
    model = comparable(suite, name, model, inputs)
    for found in cut_some(model, inputs, analysis, cuts, random.Random(name)):
        yield row | found


NOTHING_CUT = {"exact": 0, "wrong": 0, "no_effect": 0, "cut_seconds": []}


def comparable(suite: str, name: str, model: Any, inputs: Any) -> Any:
    """The model, or with weights as they are made where with random ones nothing is finite."""
    import zoo
    from tests.oracle import outputs

    if all(bool(y.isfinite().all()) for y in outputs(model, inputs)):
        return model
    return zoo.build(suite, name).model


def shares(groups: Any, by_module: Any) -> dict[str, Any]:
    """How much can be cut. Channels that leave the model are nobody's to cut and not counted."""
    inner = [g for g in groups if not (g.locked and "output of the model" in g.locked)]
    free = [g for g in inner if g.locked is None and g.channels > 1]
    touched = {m for g in free for m in (*g.producers, *g.consumers)}
    macs = sum(c.macs for c in by_module.values())
    return {
        "groups": len(inner),
        "locked": len(inner) - len(free),
        "channel_share": sum(g.channels for g in free) / max(1, sum(g.channels for g in inner)),
        "mac_share": sum(c.macs for n, c in by_module.items() if n in touched) / max(1, macs),
        "reasons": {g.name: g.locked for g in inner if g.locked},
    }


def cut_some(
    model: Any, inputs: Any, analysis: Any, cuts: int, rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Cut random groups to half, one by one, and judge each; all that was found, after each."""
    from tests.oracle import as_double, judge, kept

    import thinet

    groups = analysis.groups
    free = [g for g in groups if g.locked is None and g.channels > 1]
    result: dict[str, Any] = copy.deepcopy(NOTHING_CUT)
    for group in rng.sample(free, min(cuts, len(free))):
        removed = {group.name: rng.sample(range(group.channels), group.channels // 2)}
        start = time.process_time()
        try:
            keep = kept(groups, removed)
            small = thinet.cut(model, inputs, keep, verify=False, analysis=analysis)
            result["cut_seconds"].append(time.process_time() - start)
            verdict = judge(model, small, inputs, groups, removed, enough=1e-4)
            if verdict.error > 1e-4:
                model, inputs = model.double(), as_double(inputs)
                verdict = judge(model, small.double(), inputs, groups, removed, enough=1e-7)
        except Exception as error:  # noqa: BLE001  any failure of a cut is a wrong cut
            result["wrong"] += 1
            text = f"{group.name}: {type(error).__name__}: {error}"[:300]
            result.setdefault("details", []).append(text)
            yield result
            continue
        good = verdict.error <= 1e-4
        result["exact" if good else "wrong"] += 1
        result["no_effect"] += int(good and verdict.effect < 1e-6)
        if not good:
            result.setdefault("details", []).append(f"{group.name}: {verdict}")
        yield result


def worker(connection: Connection, threads: int) -> None:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    while (task := connection.recv()) is not None:
        try:
            for row in measure(*task):
                connection.send(row)
            connection.send(None)
        except Exception as error:  # noqa: BLE001  one model never stops the run
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error}"[:400]
            connection.send({"error": text, "where": f"{where.filename}:{where.lineno}"})
            connection.send(None)


# --- in the parent --------------------------------------------------------------------------


class Runner:
    """A worker process that is replaced when it hangs, dies, or has done its share."""

    def __init__(self, timeout: float, threads: int) -> None:
        self.timeout, self.threads, self.done = timeout, threads, 0
        self.process: Any = None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=worker, args=(theirs, self.threads), daemon=True)
        self.process.start()
        theirs.close()
        self.done = 0

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def run(self, *task: Any) -> dict[str, Any]:
        if self.process is None or self.done >= FEW:
            self.stop()
            self.start()
        self.done += 1
        self.connection.send(task)
        end = time.monotonic() + self.timeout
        row: dict[str, Any] = {}
        try:
            while self.connection.poll(max(end - time.monotonic(), 0)):
                told = self.connection.recv()
                if told is None:
                    return row
                row = told
            why = f"no answer within {self.timeout:.0f} s"
        except EOFError:
            why = "the process died (out of memory?)"
        self.stop()
        return row | {"unfinished": why} if row else {"error": why}


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        text = f"{row['model']:<44} FAILED {row['error'][:110]}"
    else:
        slowest = max(row["cut_seconds"], default=0)
        text = (
            f"{row['model']:<44} {row['seconds']:6.2f} s  {row['groups']:4} groups "
            f"{row['locked']:4} locked  channels {row['channel_share']:4.0%}  "
            f"MACs {row['mac_share']:4.0%}  exact {row['exact']} wrong {row['wrong']} "
            f"no effect {row['no_effect']}  cut {slowest:5.2f} s"
        )
    text += f"; then {row['unfinished']}" if "unfinished" in row else ""
    other = row.get("torch_pruning")
    if other and "error" in other:
        text += f" | TP failed: {other['error'][:60]}"
    elif other:
        words = " ".join(f"{k} {other[k]}" for k in ("exact", "wrong", "crash", "norm"))
        text += f" | TP {other['seconds'] or 0:5.2f} s {words}"
    return text


def family_reason(reason: str) -> str:
    """A reason without its sizes and places, to be counted."""
    return reason.split(" in ")[0].split(":")[0][:90]


def summary(rows: list[dict[str, Any]]) -> list[str]:
    fine = [r for r in rows if "error" not in r]
    out = [f"{len(rows)} models of {len({r.get('family') for r in rows})} families"]
    out.append(f"failed: {len(rows) - len(fine)}: {[r['model'] for r in rows if 'error' in r]}")
    if not fine:
        return out
    seconds = sorted(r["seconds"] for r in fine)
    uncounted = [(r["model"], r["count_error"]) for r in fine if "count_error" in r]
    stopped = [f"{r['model']} ({r['exact']} compared)" for r in fine if "unfinished" in r]
    half = sum(r["mac_share"] >= 0.5 for r in fine) / len(rows)
    cut = [s for r in fine for s in r["cut_seconds"]]
    reasons = Counter(family_reason(t) for r in fine for t in r["reasons"].values())
    slow = [f"{r['model']} {r['seconds']:.1f}" for r in fine if r["seconds"] > 5]
    out += [
        f"cuts: exact {sum(r['exact'] for r in fine)}, wrong {sum(r['wrong'] for r in fine)}, "
        f"of the exact ones without effect {sum(r['no_effect'] for r in fine)}",
        f"not all cuts compared: {stopped}",
        f"wrong in: {[(r['model'], r.get('details')) for r in fine if r['wrong']]}",
        f"models with at least half of their MACs in groups that can be cut: {half:.1%}",
        f"not counted: {uncounted}",
        f"models with nothing to cut: {[r['model'] for r in fine if r['groups'] == r['locked']]}",
        f"find_groups: median {statistics.median(seconds):.2f} s, greatest {seconds[-1]:.2f} s",
        f"over 5 s: {slow}",
        f"cut: median {statistics.median(cut or [0]):.2f} s, greatest {max(cut or [0]):.2f} s",
        "reasons of locked groups:",
        *(f"  {n:6} {text}" for text, n in reasons.most_common(25)),
    ]
    others = [r["torch_pruning"] for r in rows if "torch_pruning" in r]
    if others:
        ran = [o for o in others if "error" not in o]
        totals = {k: sum(o[k] for o in ran) for k in ("exact", "wrong", "crash", "norm")}
        times = [o["seconds"] for o in ran if o["seconds"]]
        out += [
            f"Torch-Pruning on {len(others)} models: cuts {totals}; models failed or timed out "
            f"{len(others) - len(ran)}; models with a crash {sum(o['crash'] > 0 for o in ran)}; "
            f"models with a silent error {sum(o['wrong'] > 0 for o in ran)}; "
            f"groups: median {statistics.median(times or [0]):.2f} s",
        ]
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--suite", choices=("torchvision", "timm", "transformers"), required=True)
    parser.add_argument("--models", default="*", help="globs on names, with commas between")
    parser.add_argument("--per-family", type=int, help="timm: models of each family, default 4")
    parser.add_argument("--limit", type=int, help="at most so many models")
    parser.add_argument("--json", type=Path, help="JSON lines: one row a model, appended")
    parser.add_argument("--compare", action="store_true", help="Torch-Pruning 1.6.1 as well")
    parser.add_argument("--cuts", type=int, default=3, help="groups cut in each model")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for one model")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    import zoo

    globs = options.models.split(",")
    few = (options.per_family,) if options.per_family and options.suite == "timm" else ()
    every = zoo.SUITES[options.suite][0](*few)
    names = [n for n in every if any(fnmatch.fnmatch(n, g) for g in globs)]
    names = names[: options.limit]
    rows: list[dict[str, Any]] = []
    if options.json and options.json.exists():
        rows = [json.loads(text) for text in options.json.read_text().splitlines()]
        rows = [r for r in rows if r["suite"] == options.suite and r["model"] in names]
    whole = {r["model"]: r for r in rows if "torch_pruning" in r or not options.compare}
    known = {n: row for n, row in whole.items() if "error" not in row and "unfinished" not in row}
    rows = list(known.values())
    runner = Runner(options.timeout, options.threads)
    for i, name in enumerate(names):
        if name in known:
            continue
        row = {"suite": options.suite, "model": name}
        row |= runner.run(options.suite, name, options.cuts, False)
        if options.compare:
            answer = runner.run(options.suite, name, options.cuts, True)
            row["torch_pruning"] = answer.get("torch_pruning", answer)
        rows.append(row)
        print(f"{i + 1:4}/{len(names)} {line(row)}", flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
    runner.stop()
    print("\n".join(summary(rows)), flush=True)
    return int(any("error" in r or r["wrong"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
