"""Find the groups of a model: trace, label, bundle, and see that each follows a cut."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from thinet.observe import preserved_rng
from thinet.trace.groups import Analysis, build
from thinet.trace.labels import Classes, Labeller
from thinet.trace.record import meta_copy, record
from thinet.trace.retrace import refusals
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
            (grouped convolutions) and `"module.path:layout"` to `"outer"` or `"inner"` (the factor
            of a reshaped axis that stays prunable).

    Returns:
        Every group with at least one producer; those that may not be cut say why in `locked`.

    Raises:
        TraceError: the model does not run on the example inputs.
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
    trainable = frozenset(name for name, _ in model.named_parameters())
    program = record(model, inputs)
    with preserved_rng():
        pristine = meta_copy(model)
        walk = Labeller(program, Classes(), RULES, choices=dict(choices or {})).run()
        analysis = build(walk, trainable, normalised=normalised)
        refused = [
            (analysis.roots[group.name], reason)
            for group, reason in refusals(analysis, pristine, inputs)
        ]
    return build(walk, trainable, normalised=normalised, refused=refused) if refused else analysis
