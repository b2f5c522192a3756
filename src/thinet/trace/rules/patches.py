"""Patches taken out of maps and put back, samples at places, and transforms over dimensions."""

from __future__ import annotations

import numpy as np

from thinet.trace.labels import FIXED, Labeller
from thinet.trace.program import Op, Value


def im2col(labels: Labeller, op: Op) -> None:
    """(.., c, h, w) -> (.., c x kernel, places): each channel's labels repeat for the kernel."""
    x: Value = op.args[0]
    (out,) = op.outputs()
    axes = list(labels.of(x))
    for dim in (-1, -2):
        labels.lock(axes[dim], f"{op.where} slides over it")
    channels = axes[-3]
    if isinstance(channels, np.ndarray):
        channels = np.repeat(channels, out.shape[-2] // len(channels))
    labels.set(out, [*axes[:-3], channels, FIXED])


def col2im(labels: Labeller, op: Op) -> None:
    """(.., c x kernel, places) -> (.., c, h, w): all of one channel's kernel go together."""
    x: Value = op.args[0]
    (out,) = op.outputs()
    axes = list(labels.of(x))
    labels.lock(axes[-1], f"{op.where} slides over it")
    channels = axes[-2]
    if isinstance(channels, np.ndarray):
        channels = labels.tie(channels.reshape(out.shape[-3], -1))
    labels.set(out, [*axes[:-2], channels, FIXED, FIXED])


def unfold(labels: Labeller, op: Op) -> None:
    """`Tensor.unfold`: windows along one dimension, their entries in a new last one."""
    x: Value = op.args[0]
    axes = list(labels.of(x))
    dim = op.args[1] % len(axes)
    axes[dim] = labels.lock(axes[dim], f"{op.where} slides over it")
    labels.set(op.outputs()[0], [*axes, FIXED])


def sampled(labels: Labeller, op: Op) -> None:
    """(n, c, ...) sampled at places that another input tells: (places, c, ...)."""
    x, places = op.args[0], op.args[1]
    axes = labels.of(x)
    for dim in range(2, len(axes)):
        labels.lock(axes[dim], f"{op.where} samples places of it")
    labels.lock_all(places, f"{op.where} takes its entries for places")
    for number, out in enumerate(op.outputs()):
        rest = (FIXED,) * (len(out.shape) - 2)
        labels.set(out, (FIXED, axes[1], *rest) if number == 0 else (FIXED, FIXED, *rest))


def grid(labels: Labeller, op: Op) -> None:
    """Places from a few numbers for each image; the channels of the size play no part."""
    labels.lock_all(op.args[0], f"{op.where} computes places from it")
    (out,) = op.outputs()
    labels.set(out, (FIXED,) * len(out.shape))


def fourier(labels: Labeller, op: Op) -> None:
    """The dimensions that are transformed may not be cut, the others pass."""
    x: Value = op.args[0]
    axes = list(labels.of(x))
    for dim in op.args[1]:
        axes[dim] = labels.lock(axes[dim], f"{op.where} transforms along it")
    labels.set(op.outputs()[0], axes)


def as_complex(labels: Labeller, op: Op) -> None:
    axes = labels.of(op.args[0])
    labels.lock(axes[-1], f"{op.where} takes it for real and imaginary parts")
    labels.set(op.outputs()[0], axes[:-1])


def as_real(labels: Labeller, op: Op) -> None:
    labels.set(op.outputs()[0], [*labels.of(op.args[0]), FIXED])


RULES = {
    "aten.im2col": im2col,
    "aten.col2im": col2im,
    "aten.unfold": unfold,
    "aten.grid_sampler_2d": sampled,
    "aten.grid_sampler_3d": sampled,
    "aten.affine_grid_generator": grid,
    "torchvision.roi_align": sampled,
    "aten._fft_r2c": fourier,
    "aten._fft_c2r": fourier,
    "aten._fft_c2c": fourier,
    "aten.view_as_complex": as_complex,
    "aten.view_as_real": as_real,
}
