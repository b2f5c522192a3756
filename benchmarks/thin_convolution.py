"""Milliseconds of a convolution, of its thinner product, and of one cut to as many multiply-adds.

    python benchmarks/thin_convolution.py

Taps are taken out at random. Timed by `thinet.timing`, one run of each in turn.
"""

from __future__ import annotations

import torch
from torch import nn

from thinet.thin import thin
from thinet.timing import latencies

LAYERS = ((64, 56, 3), (128, 28, 3), (256, 14, 3), (48, 27, 5))
"""Channels (in and out), side of the maps, kernel."""

KEEPS = (0.7, 0.5, 0.3, 0.1)


class First(nn.Module):
    """A convolution over the first of its input's channels, as after a cut."""

    def __init__(self, kept: int, channels: int, kernel: int) -> None:
        super().__init__()
        self.kept = kept
        self.conv = nn.Conv2d(kept, channels, kernel, padding=kernel // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x[:, : self.kept])


def row(channels: int, side: int, kernel: int, keep: float) -> str:
    conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
    taps = channels * kernel * kernel
    gone = torch.randperm(taps)[round(keep * taps) :]
    with torch.no_grad():
        conv.weight.view(channels, -1)[:, gone] = 0
    models = {
        "dense": nn.Sequential(conv),
        "thin": thin(nn.Sequential(conv)).model,
        "cut": First(round(keep * channels), channels, kernel),
    }
    times = latencies(models, torch.randn(8, channels, side, side), seconds=2.0)
    cells = " | ".join(f"{t.median_ms:.2f} ({t.low_ms:.2f})" for t in times.values())
    return f"| {channels} x {side} x {side}, {kernel} x {kernel} | {keep} | {cells} |"


def main() -> None:
    torch.manual_seed(0)
    print("| layer | taps kept | dense, ms | thinner product, ms | cut channels, ms |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for layer in LAYERS:
        for keep in KEEPS:
            print(row(*layer, keep), flush=True)


if __name__ == "__main__":
    main()
