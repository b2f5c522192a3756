"""Calibration + selection + repair against the bare forward pass over the same images.

    python benchmarks/calibration_cost.py                        # ResNet-50, 256 images at 224 px
    python benchmarks/calibration_cost.py --images 32 --threads 1
    python benchmarks/calibration_cost.py --device cuda --memory 8

Both sides take the same seeded images, made batch by batch before the clock starts, the same
threads and the same batch size; `--batches 8 16 32` gives the forward pass the best of several.
Pruning takes the two inner convolutions of each block to half of the multiply-adds, by ThiNet with
the full repair (without the joint refit that may follow), and holds the images, as it needs them
twice: they count in its memory.

Each side runs in a process of its own. Memory is what the process has resident at its highest
(sampled every 5 ms) above what it has with the model loaded and nothing done; on a GPU, what is
allocated. The machine may be shared, so that seconds of the process's own work are printed too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import thinet
from thinet.models import resolve
from thinet.repair import RepairSettings

GIB = 2**30
ONLY = "layer*.conv[12]"


def images(count: int, batch: int, size: int) -> Iterator[Tensor]:
    """Smooth seeded images, batch by batch."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, batch):
        coarse = torch.randn(min(batch, count - start), 3, 16, 16, generator=generator)
        yield nn.functional.interpolate(coarse, (size, size), mode="bilinear")


def resident() -> int:
    """Bytes that this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


class Peak:
    """Highest memory above that at the start."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._done = device, threading.Event()
        self.above = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start = torch.cuda.memory_allocated(device)
        else:
            self._start = resident()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.above = max(self.above, resident() - self._start)

    def __enter__(self) -> Peak:
        if self._device.type != "cuda":
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.above = torch.cuda.max_memory_allocated(self._device) - self._start
        else:
            self._done.set()
            self._thread.join()


@contextmanager
def timed(device: torch.device) -> Iterator[dict[str, float]]:
    """Wall seconds, and seconds of this process's own work."""
    found: dict[str, float] = {}
    _wait(device)
    wall, work = time.perf_counter(), time.process_time()
    yield found
    _wait(device)
    found["wall_s"] = time.perf_counter() - wall
    found["work_s"] = time.process_time() - work


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forward_side(model: nn.Module, batches: list[Tensor], device: torch.device) -> dict[str, Any]:
    """The bare forward pass in evaluation mode, warmed up by one batch."""
    with torch.no_grad():
        model(batches[0])
        with Peak(device) as peak, timed(device) as seconds:
            for batch in batches:
                model(batch)
    return {**seconds, "peak_bytes": peak.above}


def prune_side(
    model: nn.Module, batches: list[Tensor], device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """`thinet.prune` from the same warm start."""
    shape = (1, *batches[0].shape[1:])
    with torch.no_grad():
        model(batches[0][:1])
    extra = {} if options.memory is None else {"memory": options.memory}
    with Peak(device) as peak, timed(device) as seconds:
        result = thinet.prune(
            model,
            torch.zeros(shape, device=device),
            batches,
            budget=thinet.Budget(macs=0.5),
            only=options.only,
            criterion="thinet",
            repair="full",
            repair_settings=RepairSettings(refine=0),
            **extra,
        )
    held = sum(batch.nbytes for batch in batches)
    return {
        **seconds,
        "peak_bytes": peak.above + held,  # made before, but held for pruning alone
        "phases_s": dict(result.report.seconds),
        "macs": result.report.reached,
        "refitted": len(result.report.refitted),
        "not_refitted": dict(result.report.not_refitted),
    }


def side(options: argparse.Namespace) -> dict[str, Any]:
    """What one process measures."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    model = resolve(options.network, device=device).eval()
    batches = [b.to(device) for b in images(options.images, options.batch, options.size)]
    if options.side == "forward":
        return forward_side(model, batches, device)
    return prune_side(model, batches, device, options)


def in_a_process(options: argparse.Namespace, name: str, batch: int) -> dict[str, Any]:
    """Run one side with its own memory."""
    command = [sys.executable, __file__, "--side", name, "--batch", str(batch)]
    for key in ("images", "size", "threads", "device", "network", "only", "memory"):
        value = getattr(options, key)
        if value is not None:
            command += [f"--{key}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="torchvision:resnet50")
    parser.add_argument("--only", default=ONLY, help="glob pattern of the groups to prune")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", type=float, help="GiB that pruning may take")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[16], help="batch sizes; the fastest counts"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=["forward", "prune"], help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(side(options)))
        return

    forwards = {b: in_a_process(options, "forward", b) for b in options.batches}
    batch = min(forwards, key=lambda b: forwards[b]["wall_s"])
    forward, pruned = forwards[batch], in_a_process(options, "prune", batch)
    result = {
        **{k: getattr(options, k) for k in ("network", "images", "size", "threads", "device")},
        "memory": options.memory,
        "batch": batch,
        "forward": forward,
        "prune": pruned,
        "ratio": pruned["wall_s"] / forward["wall_s"],
        "ratio_of_work": pruned["work_s"] / forward["work_s"],
        "peak_gib": pruned["peak_bytes"] / GIB,
    }
    if options.json:
        print(json.dumps(result))
        return
    print(
        f"{options.network}, {options.images} images at {options.size} px in batches of {batch}, "
        f"{options.device}, {options.threads} threads"
    )
    print(f"{'':32}{'wall':>9}{'own work':>11}{'memory':>14}")
    for name, found in (("bare forward pass", forward), ("calibrate, select, repair", pruned)):
        gib = found["peak_bytes"] / GIB
        print(f"{name:32}{found['wall_s']:7.1f} s{found['work_s']:9.1f} s{gib:10.2f} GiB")
    for phase, seconds in pruned["phases_s"].items():
        print(f"  {phase:30}{seconds:7.1f} s")
    print(
        f"ratio                           {result['ratio']:7.2f} x{result['ratio_of_work']:9.2f} x"
    )
    print(f"MACs left {pruned['macs']:.3f}, {pruned['refitted']} layers refitted")
    for name, reason in pruned["not_refitted"].items():
        print(f"  not refitted: {name}: {reason}")


if __name__ == "__main__":
    main()
