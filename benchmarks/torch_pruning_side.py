"""Torch-Pruning 1.6.1 on the same models, judged in the same way.

`pip install torch-pruning==1.6.1`; thinet itself never imports it. Its pruner proposes the groups
with half of the channels each, with the settings that its own examples give (the classifier left
out, the number of heads told); three of them are carried out one by one.
"""

from __future__ import annotations

import copy
import random
import time
import warnings
from typing import Any

import torch
from tests.oracle import as_double, distance, outputs
from torch import Tensor, nn

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def last_layers(model: nn.Module, results: list[Tensor]) -> list[nn.Module]:
    """Layers that are as wide as an output, as its examples find the classifier."""
    widths = {n for r in results for n in r.shape[1:]}
    return [
        m
        for m in model.modules()
        if (isinstance(m, nn.Linear) and m.out_features in widths)
        or (isinstance(m, nn.modules.conv._ConvNd) and m.out_channels in widths)
    ]


def heads_of(model: nn.Module) -> dict[nn.Module, int]:
    return {
        m.qkv: m.num_heads
        for m in model.modules()
        if isinstance(getattr(m, "qkv", None), nn.Linear) and hasattr(m, "num_heads")
    }


def pruner_of(model: nn.Module, inputs: Any, ignored: list[nn.Module]) -> Any:
    import torch_pruning as tp

    return tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=0.5,
        ignored_layers=ignored,
        num_heads=heads_of(model),
    )


def follow_heads(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    """The step that its transformer example takes after pruning."""
    for m in model.modules():
        if getattr(m, "qkv", None) in heads and hasattr(m, "head_dim"):
            m.head_dim = m.qkv.out_features // (3 * m.num_heads)


def silenced(model: nn.Module, group: Any, names: dict[nn.Module, str], everything: bool) -> Any:
    """The original with the group's channels zeroed at its consumers, or wherever it cuts."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for dep, idxs in group:
            module, index = dep.target.module, torch.tensor(sorted(set(idxs)))
            if module not in names:
                continue
            twin, kind = copied.get_submodule(names[module]), dep.handler.__name__
            reads = "_in_channels" in kind and isinstance(
                twin, (nn.Linear, nn.modules.conv._ConvNd)
            )
            if reads and getattr(twin, "groups", 1) == 1:
                swapped = isinstance(twin, nn.modules.conv._ConvTransposeNd)
                twin.weight.index_fill_(0 if swapped else 1, index, 0)
            elif everything and isinstance(getattr(twin, "weight", None), Tensor):
                for tensor in (twin.weight, getattr(twin, "bias", None)):
                    if tensor is not None and index.max() < tensor.shape[0]:
                        tensor.index_fill_(0, index, 0)
    return copied


def compare(model: nn.Module, inputs: Any, cuts: int, seed: int) -> dict[str, Any]:
    """Cuts that are exact, crash, are wrong, or inexact because a norm runs over the channels."""
    row: dict[str, Any] = {"exact": 0, "wrong": 0, "crash": 0, "norm": 0, "seconds": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = outputs(model, inputs)
        chosen: list[float] = [random.Random(seed + i).random() for i in range(cuts)]
        for fraction in chosen:
            outcome, seconds, detail = one_cut(model, inputs, dense, fraction)
            row[outcome] = row.get(outcome, 0) + 1
            row["seconds"] = max(seconds, row["seconds"] or 0)
            if detail:
                row.setdefault("details", []).append(detail[:200])
    return row


def one_cut(
    model: nn.Module, inputs: Any, dense: list[Tensor], fraction: float
) -> tuple[str, float, str]:
    pruned = copy.deepcopy(model)
    start = time.process_time()
    try:
        pruner = pruner_of(pruned, inputs, last_layers(pruned, dense))
        groups = list(pruner.step(interactive=True))
    except Exception as error:  # noqa: BLE001  whatever it raises is the finding
        return "crash", time.process_time() - start, f"groups: {type(error).__name__}: {error}"
    seconds = time.process_time() - start
    if not groups:
        return "nothing", seconds, ""
    group = groups[int(fraction * len(groups))]
    names = {m: n for n, m in pruned.named_modules()}
    norms = any(isinstance(dep.target.module, NORMS) for dep, _ in group)
    root = names.get(group[0].dep.target.module, "?")
    references = [silenced(model, group, names, everything) for everything in (False, True)]
    heads = heads_of(pruned)
    try:
        group.prune()
        follow_heads(pruned, heads)
        result = outputs(pruned, inputs)
    except Exception as error:  # noqa: BLE001
        return "crash", seconds, f"{root}: {type(error).__name__}: {error}"
    error = min(distance(result, outputs(r, inputs)) for r in references)
    if error > 1e-4:
        exact_inputs = as_double(inputs)
        result = outputs(pruned.double(), exact_inputs)
        error = min(distance(result, outputs(r.double(), exact_inputs)) for r in references)
    if error <= 1e-4:
        return "exact", seconds, ""
    return ("norm" if norms else "wrong"), seconds, f"{root}: differs by {error:.2g}"
