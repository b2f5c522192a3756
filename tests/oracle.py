"""An independent judge of cuts: the original with the removed channels silenced.

Two ways to silence, both computed without tracing the model:

    "consumers"  zero the removed entries of the weights that mix the channels, and only there
    "entries"    zero all removed entries, for channels that are contracted without a weight
                 (the products of queries and keys), where there is no consumer to zero

A cut is right if it equals the original silenced in one of the two ways, to rounding in float64.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

Removed = Mapping[str, Iterable[int]]
"""Group name to the units that go."""

Cuts = dict[str, dict[int, set[int]]]
"""Tensor name to dimension to the indices that go."""

WAYS = ("consumers", "entries")


@dataclass(frozen=True)
class Verdict:
    """How a cut compares with the silenced original.

    `error` is the greatest difference over the greatest output, for the better way to silence;
    `effect` is the same number between the original and that silenced original.
    """

    way: str
    error: float
    effect: float


# --- what a check needs ---------------------------------------------------------------------


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that hide nothing: no zero scale, no identity norm, nothing equal to another."""
    g = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    with torch.no_grad():
        for name, tensor in tensors:
            if id(tensor) in seen or not tensor.is_floating_point():
                continue
            seen.add(id(tensor))
            leaf = name.rsplit(".", 1)[-1]
            noise = torch.randn(tensor.shape, generator=g)
            if leaf in ("running_var", "original0", "weight_g"):
                new = 0.6 + noise.abs()
            elif leaf == "running_mean":
                new = 0.3 * noise
            elif not isinstance(tensor, nn.Parameter):
                continue
            elif tensor.dim() >= 2 and min(tensor.shape[:2]) > 1:
                new = noise * 1.4 / math.sqrt(tensor[0].numel())
            elif "bias" in leaf or "beta" in leaf:
                new = 0.3 * noise
            else:
                new = 1 + 0.3 * noise
            tensor.copy_(new)
    return model


def call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def as_double(inputs: Any) -> Any:
    return tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )


@torch.no_grad()
def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All floating tensors that the model returns."""
    leaves = tree_flatten(call(model, inputs))[0]
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Greatest difference over the greatest value, the worst of all outputs."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return math.inf
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not x.numel():
            continue
        scale = max(float(y.abs().max()), 1e-12)
        gap = float((x - y).abs().max()) / scale
        worst = max(worst, gap if math.isfinite(gap) else math.inf)
    return worst


# --- silencing ------------------------------------------------------------------------------


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under every name they have."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def union(groups: Iterable[Any], removed: Removed) -> Cuts:
    """All that goes with the removed units, by tensor and dimension."""
    by_name = {g.name: g for g in groups}
    found: Cuts = {}
    for name, units in removed.items():
        for s in by_name[name].slices(list(units)):
            found.setdefault(s.parameter, {}).setdefault(s.dim, set()).update(s.indices)
    return found


def contracted_dims(owner: nn.Module, leaf: str) -> tuple[int, ...]:
    """Dimensions of a module's tensor over which the module sums."""
    kind = type(owner).__name__
    if leaf == "original1":
        return (1,)
    if isinstance(owner, nn.modules.conv._ConvTransposeNd):
        return (0,) if leaf == "weight" and owner.groups == 1 else ()
    if isinstance(owner, (nn.modules.conv._ConvNd, nn.Linear)):
        return (1,) if leaf == "weight" else ()
    if isinstance(owner, nn.MultiheadAttention):
        return (1,) if leaf.endswith("proj_weight") else ()
    if isinstance(owner, nn.RNNBase):
        return (1,) if leaf.startswith("weight") else ()
    if kind == "Conv1D":
        return (0,) if leaf == "weight" else ()
    return ()


def known(owner: nn.Module) -> bool:
    """Whether `contracted_dims` speaks for this module; else the group's own word is taken."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention, nn.RNNBase)
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU, nn.Embedding)
    return isinstance(owner, (*kinds, *norms)) or type(owner).__name__ == "Conv1D"


def consumer_dims(model: nn.Module, groups: Iterable[Any]) -> set[tuple[str, int]]:
    """(tensor, dimension) pairs that are summed over, by the module types; see `known`."""
    tensors = all_tensors(model)
    aliases: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        aliases.setdefault(id(tensor), []).append(name)
    found = set()
    for group in groups:
        for member in group.members:
            for alias in aliases[id(tensors[member.parameter])]:
                path, _, leaf = alias.rpartition(".")
                owner = model.get_submodule(path)
                if member.dim in contracted_dims(owner, leaf) or (
                    not known(owner) and member.role == "consumes"
                ):
                    found.add((member.parameter, member.dim))
    return found


def silence(model: nn.Module, cuts: Cuts, dims: set[tuple[str, int]] | None) -> nn.Module:
    """A copy with the cut entries zeroed: in the given dimensions, or all of them.

    Norms of directions (weight_norm's `original1`) and variances are left: zero there is 0 / 0.
    """
    silenced = copy.deepcopy(model)
    tensors = all_tensors(silenced)
    with torch.no_grad():
        for name, by_dim in cuts.items():
            tensor = tensors[name]
            leaf = name.rsplit(".", 1)[-1]
            if not tensor.is_floating_point():
                continue
            if dims is None and leaf in ("running_var", "original1"):
                continue
            for dim, indices in by_dim.items():
                if dims is None or (name, dim) in dims:
                    tensor.index_fill_(dim, torch.tensor(sorted(indices)), 0.0)
    return silenced


def judge(
    model: nn.Module,
    cut: nn.Module,
    inputs: Any,
    groups: Iterable[Any],
    removed: Removed,
    enough: float = 1e-9,
) -> Verdict:
    """Compare a cut model with the silenced original, in the way that fits better."""
    groups = [g for g in groups if g.name in removed]
    cuts = union(groups, removed)
    dense, small = outputs(model, inputs), outputs(cut, inputs)
    best: Verdict | None = None
    for way in WAYS:
        dims = consumer_dims(model, groups) if way == "consumers" else None
        silent = outputs(silence(model, cuts, dims), inputs)
        verdict = Verdict(way, distance(small, silent), distance(dense, silent))
        if best is None or verdict.error < best.error:
            best = verdict
        if best.error < enough:
            break
    assert best is not None
    return best


# --- the original stays as it was -----------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model and of the random state that a cut must leave alone."""
    state: dict[str, Any] = {
        "torch rng": torch.get_rng_state(),
        "python rng": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
    }
    for name, t in all_tensors(model).items():
        state[f"tensor {name}"] = t.detach().clone(memory_format=torch.preserve_format)
        facts = (id(t), t.data_ptr(), t.stride(), t.dtype, t.device, t.requires_grad, id(t.grad))
        state[f"facts {name}"] = (*facts, t._version)
    for path, module in model.named_modules():
        plain = {
            k: repr(v) if isinstance(v, (int, float, str, tuple, list, type(None))) else id(v)
            for k, v in module.__dict__.items()
            if k not in ("_parameters", "_buffers", "_modules")
        }
        hooks = {k: list(v) for k, v in module.__dict__.items() if "hooks" in k and v}
        state[f"module {path}"] = (type(module), id(module), plain, hooks)
    return state


def assert_untouched(before: dict[str, Any], model: nn.Module) -> None:
    after = snapshot(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
        assert same, f"the original changed: {key}: {value} became {after[key]}"


# --- one check of one cut -------------------------------------------------------------------


def kept(groups: Iterable[Any], removed: Removed) -> dict[str, list[int]]:
    sizes = {g.name: g.channels for g in groups}
    return {n: [i for i in range(sizes[n]) if i not in set(u)] for n, u in removed.items()}


def assert_sliced(model: nn.Module, cut: nn.Module, cuts: Cuts) -> None:
    """Every tensor of the cut model is the original's without the slices, and nothing else.

    A module that had to be replaced by one of another type may name its tensors otherwise.
    """
    small, lost = all_tensors(cut), False
    first: dict[int, str] = {}
    for name, tensor in all_tensors(model).items():
        leader = first.setdefault(id(tensor), name)
        path = name.rpartition(".")[0]
        if name not in small:
            kinds = [type(m.get_submodule(path)) for m in (model, cut)]
            assert kinds[0] is not kinds[1], f"{name} is not in the cut model"
            lost = True
            continue
        want = tensor.detach()
        for dim, indices in cuts.get(leader, {}).items():
            stay = [i for i in range(tensor.shape[dim]) if i not in indices]
            want = want.index_select(dim, torch.tensor(stay, dtype=torch.long))
        assert small[name].shape == want.shape, f"{name}: {small[name].shape}, not {want.shape}"
        assert torch.equal(small[name], want), f"{name}: kept entries are not the original's"
        assert small[name].requires_grad == tensor.requires_grad, name
        assert small[name].dtype == tensor.dtype, name
        assert small[name].device == tensor.device, name
        assert isinstance(small[name], nn.Parameter) == isinstance(tensor, nn.Parameter), name
        assert small[name] is small[leader], f"{name} is no longer tied to {leader}"
    assert lost or set(small) == set(all_tensors(model))
    shared = {t.untyped_storage().data_ptr() for t in all_tensors(model).values() if t.numel()}
    for name, t in small.items():
        assert not t.numel() or t.untyped_storage().data_ptr() not in shared, f"{name} is shared"


def assert_alive(cut: nn.Module, inputs: Any) -> None:
    """The cut model copies, loads its own state, trains, and has gradients."""
    again = copy.deepcopy(cut)
    again.load_state_dict(cut.state_dict(), strict=True)
    assert distance(outputs(again, inputs), outputs(cut, inputs)) == 0
    again.train()
    result = tree_flatten(call(again, inputs))[0]
    loss = sum(x.square().sum() for x in result if isinstance(x, Tensor) and x.requires_grad)
    assert isinstance(loss, Tensor)
    loss.backward()
    grads = [p.grad for p in again.parameters() if p.grad is not None]
    assert grads
    assert all(torch.isfinite(g).all() for g in grads)


def check(model: nn.Module, inputs: Any, groups: Any, removed: Removed, cut: Any) -> Verdict:
    """Cut, and assert all that a cut promises. `model` is in eval mode and float64."""
    before = snapshot(model)
    small = cut(model, inputs, kept(groups, removed), verify=False)
    assert_untouched(before, model)
    assert small is not model
    assert isinstance(small, nn.Module)
    assert small.training == model.training
    cuts = union(groups, removed)
    assert cuts, f"nothing goes with {dict(removed)}"
    assert_sliced(model, small, cuts)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    assert sizes[1] < sizes[0], f"not smaller: {sizes}"
    verdict = judge(model, small, inputs, groups, removed)
    assert verdict.error < 1e-6, f"{dict(removed)}: differs from the silenced original: {verdict}"
    assert_alive(small, inputs)
    return verdict
