"""Run a model once without computing anything and write down its operations.

The model's copy lives on the `meta` device, so no weight is copied and no number is computed.
Where the forward code needs a number (`.item()`, data-dependent control flow), the copy runs on
copies of the model's own tensors instead.

Modules that derive their sizes from the residual stream run in their explicit form, which computes
the same (see `thinet.surgery.explicit`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from thinet.errors import OptionError, TraceError
from thinet.observe import evaluating, module_calls, plain_attention, preserved_rng
from thinet.surgery.apply import named_tensors
from thinet.trace.decisions import Decisions
from thinet.trace.loops import is_loop, one_step
from thinet.trace.program import Leaves, Loop, Op, Program, Value, plain
from thinet.trace.remembered import run_on_meta
from thinet.trace.replica import Call, meta_replica, real_replica
from thinet.types import ExampleInputs, as_call, tensors_in


class StoppedError(Exception):
    """The forward pass stopped."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error) or type(error).__name__)


SETTINGS = frozenset((bool, str, type(None), torch.dtype, torch.device, torch.memory_format))


class Watch(Protocol):
    """Sees operations as they are recorded."""

    def begin(self, program: Program) -> None:
        """Called before the first, with a program of inputs and parameters only."""

    def step(self, op: Op) -> None:
        """Called after each; may raise `EnoughError` to stop."""

    def loop(self, inputs: Sequence[Value], settings: tuple[Any, ...]) -> Loop | None:
        """Called before one of PyTorch's own; which of the original may stand for it, if any."""

    def passed(self, loop: Loop, outputs: Sequence[Value]) -> None:
        """Called after such a loop, none of whose operations was shown."""


class EnoughError(BaseException):
    """A watch has seen enough. No model's own `except Exception` may catch it."""


class _Functions(TorchFunctionMode):
    """Tells a recorder what no operation shows: numbers put into tensors and taken out of them,
    PyTorch's own loops."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_loop(func, args):
            return self.recorder.loop(func, args)
        if func in TAKING:
            self.recorder.take(args[0])
        result = func(*args, **(kwargs or {}))
        if func in HIDING and isinstance(result, torch.Tensor) and result.numel() <= FEW:
            leaves = tree_flatten((args, kwargs))[0]
            numbers = [x for x in leaves if isinstance(x, (int, float, complex))]
            if numbers:
                self.recorder.hidden[id(result)] = result, tuple(numbers)
        return result


HIDING = frozenset((torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor))
TAKING = frozenset(
    getattr(torch.Tensor, name) for name in ("numpy", "tolist", "__array__", "__dlpack__")
)
"""How numbers leave a tensor without an operation."""
FEW = 1024
"""Elements of a tensor that might hold sizes."""


@lru_cache(maxsize=1 << 10)
def _name(func: torch._ops.OpOverload) -> str:
    return f"{func.namespace}.{func._opname}"


@lru_cache(maxsize=1 << 10)
def _turns(func: torch._ops.OpOverload) -> bool:
    """Whether its first argument has other axes afterwards, as of `x.transpose_(1, 2)`."""
    return torch.Tag.inplace_view in func.tags


class _Recorder(TorchDispatchMode):
    """Writes down each operation that reaches the dispatcher."""

    def __init__(
        self, stack: list[str], on_meta: bool, training: bool, watch: Watch | None
    ) -> None:
        super().__init__()
        self.on_meta = on_meta
        self.training = training
        self.watch = watch
        self.stack = stack
        self.ops: list[Op] = []
        self.count = 0
        self.values: dict[int, Value] = {}
        # Ids stay unique while their tensors live.
        self.alive: list[tuple[torch.Tensor, Value]] = []
        self.hidden: dict[int, tuple[torch.Tensor, tuple[complex, ...]]] = {}
        self.loops: dict[int, Loop] = {}
        self.taken: list[Value] = []
        self.running = False
        self.silent = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not to be hidden from a compiler, which never sees it and costs each operation time."""
        return False

    def value(self, tensor: torch.Tensor) -> Value:
        key = id(tensor)
        value = self.values.get(key)
        if value is None:
            if self.running and type(tensor) not in (torch.Tensor, nn.Parameter):
                raise RuntimeError(
                    f"it makes a {type(tensor).__name__} of a tensor, and what becomes of the "
                    "channels of such a class operations do not tell"
                )
            storage = tensor.untyped_storage()._cdata if not tensor.is_sparse else key
            value = Value(len(self.alive), tuple(tensor.shape), tensor.dtype, storage)
            self.values[key] = value
            self.alive.append((tensor, value))
        return value

    def abstract(self, tree: Any, leaves: Leaves) -> Any:
        """The nest of arguments with values in place of tensors; what it holds goes to `leaves`."""
        kind = type(tree)
        if kind is int or kind is float or kind is complex:
            leaves.numbers.append(tree)
        elif kind in SETTINGS:
            leaves.settings.append(tree)
        elif isinstance(tree, torch.Tensor):
            value = self.value(tree)
            leaves.values.append(value)
            if id(tree) in self.hidden:
                leaves.hidden += self.hidden[id(tree)][1]
            return value
        elif kind is tuple or kind is list:
            return kind([self.abstract(branch, leaves) for branch in tree])
        elif kind is dict:
            return {key: self.abstract(branch, leaves) for key, branch in tree.items()}
        elif isinstance(tree, (tuple, list, dict)):
            found, spec = tree_flatten(tree)
            if len(found) != 1 or found[0] is not tree:
                return tree_unflatten([self.abstract(leaf, leaves) for leaf in found], spec)
        elif isinstance(tree, (int, float, complex)):
            leaves.numbers.append(tree)
        return tree

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = run_on_meta if self.on_meta else _run
        # Modes that watch functions (a default device) shall see the model's and not those below.
        with torch._C.DisableTorchFunction():
            if self.silent:
                return run(func, args, kwargs or {})
            given, made = Leaves(), Leaves()
            taken = self.abstract(tuple(args), given)
            named = self.abstract(kwargs or {}, given)
            result = run(func, args, kwargs or {})
            if _turns(func):  # the same tensor is another value from here on
                del self.values[id(args[0])]
            left = self.abstract(result, made)
            module = self.stack[-1]
            op = Op(self.count, func, _name(func), taken, named, left, module, given, made.values)
            self.count += 1
            if self.watch is None:
                self.ops.append(op)
            else:
                self.watch.step(op)
        return result

    def take(self, tensor: torch.Tensor) -> None:
        """The forward code takes out its numbers."""
        with torch._C.DisableTorchFunction():
            self.taken.append(self.value(tensor))

    def loop(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Run one of PyTorch's own loops; of one that a watch knows, a single step."""
        with torch._C.DisableTorchFunction():
            given = tuple(map(self.value, tensors_in(args)))
            known = self.watch.loop(given, args[3:]) if self.watch and self.on_meta else None
        if self.watch is None or known is None:
            start = self.count
            outputs = func(*args)
            with torch._C.DisableTorchFunction():
                made = tuple(map(self.value, outputs))
            self.loops[start] = Loop(start, self.count, args[3:], given, made)
            return outputs
        self.silent = True
        try:
            outputs = one_step(func, args)
        finally:
            self.silent = False
        with torch._C.DisableTorchFunction():
            self.watch.passed(known, tuple(map(self.value, outputs)))
        self.count += known.stop - known.start
        return outputs

    def program(
        self,
        given: tuple[tuple[Any, ...], dict[str, Any]],
        named: Mapping[str, Value],
        known: int,
        outputs: Any,
        calls: Iterable[tuple[str, Any]],
    ) -> Program:
        """What was written down; values from number `known` on that no op made are constants."""
        results = self.abstract(plain(outputs), Leaves())
        called = tuple((path, self.abstract(plain(output), Leaves())) for path, output in calls)
        read: set[int] = set()
        made: set[int] = set()
        for op in self.ops:
            read |= {v.id for v in op.inputs()}
            made |= {v.id for v in op.outputs()} - read  # what is written in place was there before
        constants = {
            value.id: tensor
            for tensor, value in self.alive
            if value.id >= known and value.id not in made
        }
        return Program(
            ops=tuple(self.ops),
            inputs=given,
            outputs=results,
            parameters={value.id: value for value in named.values()},
            names={value.id: name for name, value in named.items()},
            constants=constants,
            called=called,
            on_meta=self.on_meta,
            training=self.training,
            loops=self.loops,
            taken=tuple(self.taken),
        )


def record(model: nn.Module, inputs: ExampleInputs, *, training: bool = False) -> Program:
    """The operations that the model runs on inputs of this shape, in evaluation mode.

    Raises:
        OptionError: the model is no module, or has parameters without a size yet.
        TraceError: the model does not run on the example inputs.
    """
    check_model(model)
    check_inputs(inputs)
    with preserved_rng():
        try:
            return record_replica(*meta_replica(model, inputs), training=training)
        except StoppedError:
            pass
        # Some forwards need numbers; run those on a real copy.
        try:
            with Decisions() as decisions:
                program = record_replica(*real_replica(model, inputs), training=training)
            return replace(program, decisions=tuple(decisions.made))
        except StoppedError as error:
            raise TraceError(
                f"{type(model).__name__} does not run on the example inputs "
                f"({describe(inputs)}): {error}. Give example_inputs of the shape, type and "
                "device that model(example_inputs) accepts"
            ) from error.__cause__


def record_replica(
    replica: nn.Module, inputs: Call, *, training: bool = False, watch: Watch | None = None
) -> Program:
    """Record a model that may be changed by it, on positional and keyword inputs.

    With a `watch`, operations are shown to it and not kept.

    Raises:
        StoppedError: the forward pass did not reach its end.
    """
    args, kwargs = inputs
    on_meta = tensors_in(inputs)[0].is_meta
    with (
        torch.device("meta") if on_meta else nullcontext(),
        warnings.catch_warnings(),
        torch.no_grad(),
        evaluating(replica, training=training),
        plain_attention(),
        module_calls(replica) as (stack, calls),
    ):
        warnings.simplefilter("ignore")
        recorder = _Recorder(stack, on_meta, training, watch)
        with torch._C.DisableTorchFunction():
            named = {name: recorder.value(tensor) for name, tensor in named_tensors(replica)}
            given = recorder.abstract((args, kwargs), Leaves())
            known = len(recorder.alive)
            begun = recorder.program(given, named, known, (), ())
            if watch is not None:
                watch.begin(begun)
        try:
            recorder.running = True
            with _Functions(recorder), recorder:
                outputs = replica(*args, **kwargs)
            return begun if watch else recorder.program(given, named, known, outputs, calls)
        except EnoughError:
            return begun
        except Exception as error:
            raise StoppedError(error) from error


def _run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return func(*args, **kwargs)


def check_model(model: object) -> None:
    """See that it is a module all of whose parameters have a size."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"the model is a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise OptionError(
            f"the model is a {type(model).__name__}, which cannot be changed; give the "
            "torch.nn.Module in Python that it was made of"
        )
    for name, tensor in named_tensors(model):
        if is_lazy(tensor):
            raise OptionError(
                f"{name} has no size yet (a lazy module); run the model once on an input first"
            )


def check_inputs(inputs: ExampleInputs) -> None:
    if torch.is_inference_mode_enabled():
        raise TraceError(
            "a model cannot be traced inside torch.inference_mode(), where operations are not "
            "taken apart; leave that block, thinet computes no gradients that it does not need"
        )
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise TraceError(
            "a model cannot be traced inside torch.autocast(), which changes the precision of what "
            "is measured; leave that block (autocast inside the model's own forward is fine)"
        )
    tensors = tensors_in(as_call(inputs))
    if not tensors:
        raise TraceError(
            f"example_inputs holds no tensor (got {type(inputs).__name__}); give a tensor, a tuple "
            "of positional inputs or a dict of keyword inputs"
        )
    data = [x for x in tensors if x.ndim]
    if data and not any(x.numel() for x in data):
        raise TraceError(
            f"example_inputs holds no entry ({describe(inputs)}); give a batch of one image or more"
        )


def describe(inputs: ExampleInputs) -> str:
    """The shapes of the inputs, for messages."""
    shapes = [str(tuple(x.shape)) for x in tensors_in(as_call(inputs))]
    return "shapes " + ", ".join(shapes)
