"""What a model costs: multiply-adds and parameters."""

from __future__ import annotations

from collections import Counter

from torch import nn

from thinet.trace.labels import Classes, Labeller
from thinet.trace.program import Program
from thinet.trace.record import record
from thinet.trace.rules import RULES
from thinet.types import Counts, ExampleInputs, ModuleCount


def count(model: nn.Module, example_inputs: ExampleInputs) -> Counts:
    """Multiply-adds and parameters of a model, counted from the operations that it runs.

    One multiply-add is one MAC. Convolutions, matrix products and attention are counted; biases,
    norms, activations and pooling are not. The batch size of the example inputs multiplies the
    MACs.

    Raises:
        TraceError: the model does not run on the example inputs.
    """
    program = record(model, example_inputs)
    macs = macs_by_module(program)
    params: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        params[name.rpartition(".")[0]] += parameter.numel()
    modules = {
        path: ModuleCount(macs[path], params[path])
        for path, _ in model.named_modules()
        if macs[path] or params[path]
    }
    return Counts(sum(macs.values()), sum(params.values()), modules)


def macs_by_module(program: Program) -> Counter[str]:
    """Multiply-adds of each module path, its children not included."""
    walk = Labeller(program, Classes(), RULES).run()
    macs: Counter[str] = Counter()
    for mixing in walk.mixings:
        total = mixing.times
        for axis in mixing.factors:
            total *= len(axis)
        macs[mixing.op.module] += total
    return macs
