"""Time to select channels: ThiNet's published loop against streamed moments and the greedy on them.

    python benchmarks/selection_time.py            # 512 channels, 100,000 rows, keep half

The published loop is that of the authors' ICCV code: all rows in one float64 matrix (rows,
channels), a running sum of the removed columns, and at each step one norm over all rows for each
candidate. It is timed for its first steps only; the rest is extrapolated from the time per
candidate. For comparison the same loop on float32 contiguous channels, the best that it can have.
The streamed side sees the rows chunk by chunk, never all together, as float32, as a network gives
them; making the rows is timed on neither side.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator

import numpy as np
import torch

from thinet.calibrate.moments import Moments
from thinet.criteria.thinet import greedy

CHUNK = 8192


def chunks(rows: int, channels: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Correlated float32 rows, the same ones each time, made CHUNK by CHUNK."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels // 4, channels, generator=generator) / channels**0.5
    scale = 0.5 + torch.rand(channels, generator=generator)
    for start in range(0, rows, CHUNK):
        size = min(CHUNK, rows - start)
        common = torch.randn(size, channels // 4, generator=generator)
        own = torch.randn(size, channels, generator=generator)
        yield scale * (common @ mixing + own)


def candidates(channels: int, steps: int) -> int:
    """Norms that the loop computes in its first steps."""
    return sum(channels - step for step in range(steps))


def published_loop(columns: list[np.ndarray], steps: int) -> list[int]:
    """Grow the removed set, trying every candidate on all rows.

    Args:
        columns: the part of each channel on all rows, (rows,) each; strided views or contiguous.
    """
    total = np.zeros_like(columns[0])
    removed: list[int] = []
    left = list(range(len(columns)))
    for _ in range(steps):
        costs = [float(np.linalg.norm(total + columns[j])) for j in left]
        removed.append(left.pop(int(np.argmin(costs))))
        total += columns[removed[-1]]
    return removed


def timed_loop(rows: np.ndarray, timed: int, steps: int, repeats: int) -> tuple[float, list[int]]:
    """Seconds for all steps, extrapolated from `timed` ones, and the choices of those."""
    columns = list(rows.T)
    best = float("inf")
    removed: list[int] = []
    for _ in range(repeats):
        start = time.perf_counter()
        removed = published_loop(columns, timed)
        best = min(best, time.perf_counter() - start)
    return best * candidates(len(columns), steps) / candidates(len(columns), timed), removed


def streamed(rows: int, channels: int) -> tuple[float, float, list[int]]:
    """Seconds for the moments, seconds for the greedy, and the order."""
    moments = Moments(channels)
    spent = 0.0
    for chunk in chunks(rows, channels):
        start = time.perf_counter()
        moments.add(chunk)
        spent += time.perf_counter() - start
    start = time.perf_counter()
    order, _ = greedy(moments.second)
    return spent, time.perf_counter() - start, order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--timed-steps", type=int, default=2)
    parser.add_argument(
        "--repeats", type=int, default=5, help="of which the best counts, on either side"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = options.channels // 2

    streamed(min(options.rows, 2 * CHUNK), options.channels)
    runs = [streamed(options.rows, options.channels) for _ in range(options.repeats)]
    moments_s, greedy_s, order = min(runs, key=lambda run: run[0] + run[1])
    streamed_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    stored = torch.cat(list(chunks(options.rows, options.channels))).numpy()
    timing = (options.timed_steps, steps, options.repeats)
    loop_s, first = timed_loop(stored.astype(np.float64), *timing)
    best_s, also_first = timed_loop(np.asfortranarray(stored), *timing)
    assert first == also_first == order[: options.timed_steps], "the first choices differ"

    small = torch.cat(list(chunks(5000, 64)))
    same = published_loop(list(small.numpy().T), 64)
    assert same == greedy(small.double().T @ small.double())[0], "the small case differs"

    ours_s = moments_s + greedy_s
    result = {
        "channels": options.channels,
        "rows": options.rows,
        "threads": options.threads,
        "published_loop_s": loop_s,
        "contiguous_float32_loop_s": best_s,
        "moments_s": moments_s,
        "greedy_s": greedy_s,
        "speedup": loop_s / ours_s,
        "speedup_contiguous": best_s / ours_s,
        "streamed_peak_mib": streamed_mib,
        "rows_mib": stored.nbytes / 2**19,
    }
    if options.json:
        print(json.dumps(result))
        return
    print(f"{options.rows} rows, {options.channels} channels, keep half, {options.threads} threads")
    print(f"published loop, extrapolated from {options.timed_steps} steps    {loop_s:9.2f} s")
    print(f"  the same on contiguous float32 channels    {best_s:9.2f} s")
    print(f"streamed moments                             {moments_s:9.3f} s")
    print(f"greedy, the whole order                      {greedy_s:9.3f} s")
    print(
        f"speed-up  {loop_s / ours_s:.0f} x  (contiguous float32 channels: {best_s / ours_s:.0f} x)"
    )
    print("same choices: all 64 of a small case; all timed ones here")
    print(f"peak memory, streamed (torch included)       {streamed_mib:9.0f} MiB")
    print(f"rows of the published loop alone             {result['rows_mib']:9.0f} MiB")


if __name__ == "__main__":
    main()
