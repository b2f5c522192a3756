"""The layers of a program: weights that meet activations, and what follows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from thinet.calibrate.patches import Geometry, position_grid
from thinet.trace.program import Op, Program, Value, values_of


@dataclass(frozen=True, eq=False)
class Affine:
    """A BatchNorm in evaluation mode: y -> (y - mean) * scale / sqrt(var + eps) + shift."""

    scale: str | None
    shift: str | None
    mean: str
    var: str
    eps: float


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or matrix product of an activation with a parameter.

    Attributes:
        op: index of the operation.
        module: path of the module that runs it.
        weight, bias: names of the parameters.
        inputs_first: whether the weight is (C, N, *kernel), as of a transposed convolution or of
            x @ W; else it is (N, C / groups, *kernel) or (N, C).
        read: what the operation reads in the weight's place, if not the weight itself.
        x, y: its input and output.
        norm: the BatchNorm that alone reads y, if there is one.
        shortcut: what is added to y (behind the norm), if its sum alone goes on; None where the
            layer is used elsewhere too and there are gains between.
        add: index of that addition.
        gain: the parameter that y is multiplied with before it (LayerScale), one number an output.
        turned_by: the axes of y in the order in which the shortcut has them, None for the same.
        uses: how many operations read its weight or, where those are more, its bias.
    """

    op: int
    module: str
    weight: str
    bias: str | None
    inputs_first: bool
    read: Value | None
    geometry: Geometry
    x: Value
    y: Value
    norm: Affine | None
    shortcut: Value | None
    add: int | None
    gain: str | None
    turned_by: tuple[int, ...] | None
    uses: int

    @property
    def shared(self) -> bool:
        """Whether anything else uses the same weight or bias."""
        return self.uses > 1

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the weight and, if there is one, the bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def outputs(self) -> int:
        """How many it makes."""
        return self.y.shape[-1 - self.geometry.rank]

    @property
    def columns(self) -> int:
        """Columns of its input patches: input channels x taps."""
        return self.x.shape[-1 - self.geometry.rank] * self.geometry.taps

    @property
    def outputs_dim(self) -> int:
        """Which dimension of the parameter is that of the outputs; the other is the inputs'."""
        return int(self.inputs_first)

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight as (N, C / groups, *kernel), by which the rows of `patches` are multiplied."""
        return self.turned(tensors[self.weight])

    def turned(self, weight: Tensor) -> Tensor:
        """From the parameter's way to that of `matrix`, and back."""
        if not self.inputs_first:
            return weight
        across = weight.transpose(0, 1)
        return across.flip(tuple(range(2, weight.ndim))) if weight.ndim > 2 else across

    def as_made(self, shortcut: Tensor) -> Tensor:
        """The shortcut with its axes in the order of the layer's outputs."""
        if self.turned_by is None:
            return shortcut
        back = sorted(range(len(self.turned_by)), key=self.turned_by.__getitem__)
        return shortcut.permute(back)

    def as_read(self, matrix: Tensor) -> Tensor:
        """What stands in the place of `read`, of a product with a weight (N, C)."""
        assert self.read is not None
        return matrix.T.reshape(self.read.shape)


def output_gains(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
    """(outputs,) float64: what a layer's outputs are multiplied with by the BatchNorm behind it,
    and before a shortcut is added."""
    gains = torch.ones(layer.outputs, dtype=torch.float64, device=tensors[layer.weight].device)
    if layer.norm is not None:
        gains = torch.rsqrt(tensors[layer.norm.var].double() + layer.norm.eps)
        if layer.norm.scale is not None:
            gains = gains * tensors[layer.norm.scale].double()
    return gains if layer.gain is None else gains * tensors[layer.gain].double().flatten()


def inverse_gains(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
    """(outputs,) what undoes the gains; 0 for outputs that they all but switch off."""
    gains = output_gains(layer, tensors)
    dead = gains.abs() <= 1e-3 * gains.abs().max()  # all of them, where the largest is 0
    return torch.where(dead, 0.0, 1 / torch.where(dead, 1.0, gains))


def find_layers(program: Program) -> dict[int, Layer]:
    """All layers by operation index; weights that are computed first are not among them."""
    readers: dict[int, list[Op]] = {}
    for op in program.ops:
        for value in {v.id: v for v in op.inputs()}.values():
            readers.setdefault(value.id, []).append(op)
    returned = {value.id for value in values_of(program.outputs)}
    views, scales = _views(program), _scales(program)
    found: dict[int, Layer] = {}
    for op in program.ops:
        parts = _convolution(op) if op.name == "aten.convolution" else _linear(op, views)
        if parts is None or parts[1].id not in program.names:
            continue
        x, weight, bias, geometry, inputs_first = parts
        y = op.outputs()[0]
        if x.id in program.names or x.id in views:  # a product of parameters
            continue
        if bias is not None and bias.id not in program.names:
            continue
        norm, after = (None, y) if y.id in returned else _norm(program, readers, y)
        added = _addition(readers, after, returned, rank=geometry.rank, scales=scales)
        uses = max(_uses(p, readers, views, returned) for p in (weight, bias) if p is not None)
        if uses > 1 and added is not None and (norm is not None or added.gain is not None):
            added = None  # one system for all uses cannot weigh each by its own gains
        found[op.index] = Layer(
            op=op.index,
            module=op.module,
            weight=program.names[weight.id],
            bias=None if bias is None else program.names[bias.id],
            inputs_first=inputs_first,
            read=next((v for v in op.inputs() if v.id in views and views[v.id].of is weight), None),
            geometry=geometry,
            x=x,
            y=y,
            norm=norm,
            shortcut=None if added is None else added.shortcut,
            add=None if added is None else added.op,
            gain=None if added is None else added.gain,
            turned_by=None if added is None else added.turned_by,
            uses=uses,
        )
    return found


@dataclass(frozen=True, eq=False)
class _View:
    """A parameter (a, b) in other clothes: its entries laid out anew, none more and none less."""

    of: Value
    now: Tensor  # on the meta device: its strides say where each axis of the parameter went

    def transposed(self) -> bool | None:
        """Whether it is the parameter's (b, a), behind dimensions of one; None: another thing."""
        *ones, rows, columns = self.now.shape
        first, second = self.of.shape
        strides = self.now.stride()[-2:]

        def laid(*wanted: int) -> bool:
            pairs = zip((rows, columns), strides, wanted, strict=True)
            return all(n == 1 or stride == want for n, stride, want in pairs)

        if any(n != 1 for n in ones):
            return None
        if (rows, columns) == (second, first) and laid(1, second):
            return True
        return False if (rows, columns) == (first, second) and laid(second, 1) else None


VIEWS = frozenset(
    f"aten.{name}" for name in "t transpose permute unsqueeze squeeze view _unsafe_view".split()
)


def _views(program: Program) -> dict[int, _View]:
    """What is made of matrices among the parameters by turning and reshaping alone, by value."""
    found: dict[int, _View] = {}
    for op in program.ops:
        if op.name not in VIEWS:
            continue
        source = op.inputs()[0]
        if source.id in found:
            parameter, now = found[source.id].of, found[source.id].now
        elif source.id in program.names and len(source.shape) == 2:
            parameter, now = source, torch.empty(source.shape, device="meta")
        else:
            continue
        with suppress(RuntimeError):  # a view of memory that lies otherwise than a fresh tensor's
            found[op.outputs()[0].id] = _View(parameter, op.func(now, *op.args[1:]))
    return found


def _uses(
    parameter: Value,
    readers: Mapping[int, list[Op]],
    views: Mapping[int, _View],
    returned: Collection[int],
) -> int:
    """How many operations read a parameter, itself or a view of it."""
    total, pending = 0, [parameter.id]
    while pending:
        value = pending.pop()
        total += value in returned
        for op in readers.get(value, ()):
            made = op.outputs()[0].id
            if made in views:
                pending.append(made)
            else:
                total += 1
    return total


def same_layers(ours: Mapping[int, Layer], theirs: Mapping[int, Layer]) -> dict[int, int]:
    """Operation of the same layer in another program of the same model.

    Batches of other sizes may run other operations between the layers (a view where another size
    takes a copy), so layers are told by their weight, and by its n-th use.
    """
    met: Counter[str] = Counter()
    known: dict[tuple[str, int], int] = {}
    for op, layer in theirs.items():
        known[layer.weight, met[layer.weight]] = op
        met[layer.weight] += 1
    met.clear()
    found: dict[int, int] = {}
    for op, layer in ours.items():
        use = layer.weight, met[layer.weight]
        met[layer.weight] += 1
        if use in known:
            found[op] = known[use]
    return found


def layers_beside(
    program: Program, theirs: Mapping[int, Layer]
) -> tuple[dict[int, Layer], dict[int, int]]:
    """The layers of a cut program, and the operation of each in the dense one.

    Their orientation is that of the dense ones, which a weight cut to one entry does not show.
    """
    ours = find_layers(program)
    same = same_layers(ours, theirs)
    for op, other in same.items():
        ours[op] = replace(ours[op], inputs_first=theirs[other].inputs_first)
    return ours, same


ROWS_CUT = "the cut takes away some of the rows that it sees"


def same_rows(one: Layer, other: Layer) -> bool:
    """Whether two layers see as many rows; not where a cut takes some of the rows themselves."""
    ours, theirs = (position_grid(tuple(layer.x.shape), layer.geometry) for layer in (one, other))
    return ours == theirs


Parts = tuple[Value, Value, Value | None, Geometry, bool]


def _convolution(op: Op) -> Parts | None:
    x, weight, bias, stride, padding, dilation, is_transposed, extra, groups = op.args
    if is_transposed and groups > 1:
        return None
    rank = len(weight.shape) - 2

    def spread(values: list[int]) -> tuple[int, ...]:
        return tuple(values) if len(values) == rank else tuple(values) * rank

    walk = weight.shape[2:], spread(stride), spread(padding), spread(dilation)
    if is_transposed:
        return x, weight, bias, Geometry.transposed(*walk, spread(extra)), True
    return x, weight, bias, Geometry(*walk, groups), False


def _linear(op: Op, views: Mapping[int, _View]) -> Parts | None:
    if op.name == "aten.addmm" and not op.kwargs:
        bias, x, weight = op.args[:3]
        if tuple(bias.shape) != tuple(op.outputs()[0].shape[-1:]):
            return None
    elif op.name == "aten.mm" or (op.name == "aten.bmm" and op.args[1].shape[0] == 1):
        bias, (x, weight) = None, op.args[:2]
    else:
        return None
    if weight.id not in views:
        return (x, weight, bias, Geometry(), True) if len(weight.shape) == 2 else None
    view = views[weight.id]
    turned = view.transposed()
    return None if turned is None else (x, view.of, bias, Geometry(), not turned)


def _norm(
    program: Program, readers: Mapping[int, list[Op]], y: Value
) -> tuple[Affine | None, Value]:
    after = readers.get(y.id, [])
    if len(after) == 1 and after[0].name == "aten.native_batch_norm" and after[0].args[0] is y:
        op = after[0]
        names = [None if v is None else program.names.get(v.id) for v in op.args[1:5]]
        scale, shift, mean, var = names
        alone = mean is not None and all(
            len(readers[v.id]) == 1 for v in op.args[1:5] if v is not None
        )
        if alone and mean is not None and var is not None:
            return Affine(scale, shift, mean, var, op.args[7]), op.outputs()[0]
    return None, y


@dataclass(frozen=True, eq=False)
class _Addition:
    """Where a shortcut is added to a layer's outputs; the attributes are those of `Layer`."""

    op: int
    shortcut: Value
    gain: str | None
    turned_by: tuple[int, ...] | None


def _addition(
    readers: Mapping[int, list[Op]],
    value: Value,
    returned: Collection[int],
    *,
    rank: int,
    scales: Mapping[int, str],
) -> _Addition | None:
    """Where a shortcut is added to a value, which goes nowhere else.

    On the way it may be scaled and its axes turned, and what a product with a matrix makes may get
    its rows back as axes: so transformers add, and networks whose channels come last.
    """
    axes, gain = list(range(len(value.shape))), None
    while True:
        after = readers.get(value.id, [])
        op = after[0] if after else None
        if op is None or op.name in ("aten.add", "aten.add_"):
            break
        made = op.outputs()[0]
        if len(after) > 1 or value.id in returned or made is value:
            return None
        if op.name in ("aten.view", "aten._unsafe_view"):
            if rank or axes != sorted(axes) or made.shape[-1] != value.shape[-1]:
                return None
            axes = list(range(len(made.shape)))
        elif op.name == "aten.permute":
            axes = [axes[dim] for dim in op.args[1]]
        elif op.name == "aten.transpose":
            one, other = op.args[1:3]
            axes[one], axes[other] = axes[other], axes[one]
        elif op.name == "aten.mul" and gain is None:
            gain = _scale(op, value, axes.index(len(axes) - 1 - rank), scales)
            if gain is None:
                return None
        elif op.name != "aten.clone":
            return None
        value = made
    # In place, the sum is the same value and its later readers read the sum.
    if op is None or op.kwargs or len(op.args) != 2:
        return None
    if (len(after) > 1 or value.id in returned) and op.outputs()[0] is not value:
        return None
    operands = op.inputs()
    if len(operands) != 2 or operands[0].shape != operands[1].shape:
        return None
    other = operands[1] if operands[0] is value else operands[0]
    if other is value:
        return None
    return _Addition(op.index, other, gain, None if axes == sorted(axes) else tuple(axes))


def _scales(program: Program) -> dict[int, str]:
    """Values with the entries of one parameter in their order, and its name."""
    found = dict(program.names)
    for op in program.ops:
        if op.name in ("aten.view", "aten._unsafe_view", "aten.unsqueeze"):
            source = op.inputs()[0]
            if source.id in found:
                found[op.outputs()[0].id] = found[source.id]
    return found


def _scale(op: Op, value: Value, axis: int, scales: Mapping[int, str]) -> str | None:
    """The parameter of one number for each index of an axis that a value is multiplied with."""
    operands = op.inputs()
    if len(operands) != 2:
        return None
    other = operands[1] if operands[0] is value else operands[0]
    along = [1] * len(value.shape)
    along[axis] = value.shape[axis]
    shape = [1] * (len(along) - len(other.shape)) + list(other.shape)
    return scales.get(other.id) if shape == along else None


def trained_names(model: nn.Module) -> set[str]:
    """Names of the parameters, all names of shared ones; buffers hold what is meant to be fixed."""
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def dropouts(model: nn.Module, program: Program) -> dict[int, float]:
    """The memory of what passes a Dropout module, and its p.

    In evaluation mode a dropout is no operation, but its module is called all the same. What calls
    `torch.nn.functional.dropout` is not seen.
    """
    modules = dict(model.named_modules())
    found: dict[int, float] = {}
    for path, output in program.called:
        module = modules.get(path)
        if isinstance(module, _DropoutNd) and module.p > 0 and isinstance(output, Value):
            found[output.storage] = max(found.get(output.storage, 0.0), min(module.p, MOST))
    return found


MOST = 0.99
"""Of a dropout's p; at one nothing would pass."""
