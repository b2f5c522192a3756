"""Find the groups of a model: trace, label, bundle, and see that each follows a cut."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from thinet.errors import OptionError, TraceError
from thinet.observe import only_new_garbage, preserved_rng
from thinet.trace.choices import OTHER, check_choices
from thinet.trace.groups import Analysis, build
from thinet.trace.labels import Classes, Labeller, Vector
from thinet.trace.program import Program
from thinet.trace.record import check_model, record
from thinet.trace.replica import Call, meta_replica, real_replica
from thinet.trace.retrace import check
from thinet.trace.rules import RULES
from thinet.types import ChannelGroup, ExampleInputs


def find_groups(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    normalised: bool = False,
    choices: Mapping[str, str] | None = None,
) -> tuple[ChannelGroup, ...]:
    """All groups of channels that can only be removed together, in the order in which they run.

    The model is traced without computing anything and is left as it was.

    Args:
        model: any module that runs on `example_inputs`.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        normalised: unlock groups that a normalisation over channels couples (LayerNorm and its
            kin). Removing such a channel changes the statistics of the others.
        choices: where a layout leaves a choice, `"module.path:groups"` to `"whole"` or `"within"`
            (grouped convolutions, GroupNorm), `"module.path:layout"` to `"outer"` or `"inner"`
            (the factor of a reshaped axis that stays prunable), `"module.path:split"` to `"free"`
            or `"tied"` (whether equal pieces lose the same channels).

    Returns:
        Every group with at least one producer; those that may not be cut say why in `locked`.

    Raises:
        TraceError: the model does not run on the example inputs.
        OptionError: a choice that the model does not leave, or a value that it does not have, or
            what is given is no module.
    """
    return analyse(model, example_inputs, normalised=normalised, choices=choices).groups


def analyse(
    model: nn.Module,
    inputs: ExampleInputs,
    *,
    normalised: bool = False,
    choices: Mapping[str, str] | None = None,
) -> Analysis:
    """`find_groups` with everything that the library itself needs beside the groups."""
    check_model(model)
    _check_bare(model)
    trainable = frozenset(name for name, _ in model.named_parameters())
    with only_new_garbage(), preserved_rng():
        program = record(model, inputs)
        trained = _training(model, inputs, program)
        pristine, call = (meta_replica if program.on_meta else real_replica)(model, inputs)
        given = dict(choices or {})
        best = _checked(program, trained, trainable, given, normalised, pristine, call)
        assert best is not None
        other = {key: OTHER[best.made[key]] for key in best.doubtful if key not in given}
        if other and best.spared < ENOUGH * best.hoped:
            again = _checked(
                program, trained, trainable, given | other, normalised, pristine, call,
                least=best.spared,
            )  # fmt: skip
            best = max(best, again or best, key=lambda found: found.spared)
    training = best.analysis.training
    check_choices(given, {**best.made, **(training.made if training else {})})
    return best.analysis


def _check_bare(model: nn.Module) -> None:
    """See that nothing is wrapped around the model that hides its operations or copies."""
    if hasattr(model, "_orig_mod"):
        raise OptionError("the model is compiled; give model._orig_mod and compile the result")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise OptionError("the model is wrapped for training on processes; give model.module")


@dataclass(frozen=True, eq=False)
class _Checked:
    """An analysis whose groups were seen to follow a cut.

    `hoped` is what was to be spared before they were tried. `doubtful` are the choices made in
    modules where some group did not follow.
    """

    analysis: Analysis
    hoped: float
    doubtful: tuple[str, ...]

    @property
    def made(self) -> Mapping[str, str]:
        return self.analysis.labeller.made

    @property
    def spared(self) -> float:
        return _spared(self.analysis)


def _spared(analysis: Analysis, refused: Collection[str] = ()) -> float:
    """Multiply-adds that go when each group that may be cut, but those refused, is halved.

    Halved and not only touched: an operation between two groups may become cheaper by both.
    """
    full = analysis.costs.full
    halves = {**full, **{name: n / 2 for name, n in full.items() if name not in refused}}
    return sum(term.at({}, full) - term.at(halves, full) for term in analysis.costs.macs_terms)


ENOUGH = 0.95
"""Share of what was hoped for from which on other choices are not worth a second look."""


def _checked(
    program: Program,
    trained: Program | None,
    trainable: frozenset[str],
    choices: Mapping[str, str],
    normalised: bool,
    pristine: nn.Module,
    call: Call,
    least: float = -1,
) -> _Checked | None:
    """None where groups that follow spare not more than the `least` multiply-adds."""
    walk = Labeller(program, Classes(), RULES, choices=dict(choices)).run()
    training = None
    if trained is not None:
        seeds = {name: walk.axes[value_id] for value_id, name in program.names.items()}
        training = Labeller(
            trained, walk.classes, RULES, choices=dict(choices) | walk.made, seeds=seeds
        ).run()
    analysis = build(walk, trainable, training=training, normalised=normalised)
    hoped = _spared(analysis)
    refused: list[tuple[Vector, str]] = []
    modules: set[str] = set()
    checked = check(
        analysis, pristine, call,
        worth=lambda refused: _spared(analysis, refused) > least,
    )  # fmt: skip
    if checked is None:
        return None
    for group, mismatch in checked.refused:
        refused.append((analysis.roots[group.name], mismatch.reason))
        modules.add(mismatch.module)
    analysis = checked.analysis
    if refused:
        analysis = build(
            walk,
            trainable,
            training=training,
            normalised=normalised,
            refused=refused,
            followed=analysis.followed,
        )
    doubtful = tuple(key for key in walk.made if key.rpartition(":")[0] in modules)
    return _Checked(analysis, hoped, doubtful)


def _training(model: nn.Module, inputs: ExampleInputs, program: Program) -> Program | None:
    """The training forward, where it reads parameters that the evaluation forward does not."""
    unused = set(program.unused)
    if not unused.intersection(name for name, _ in model.named_parameters()):
        return None
    try:
        trained = record(model, inputs, training=True)
    except TraceError:  # it does not run in training mode on these inputs
        return None
    return trained if set(trained.unused) < unused else None
