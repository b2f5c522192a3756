"""Operations that treat every entry alike, and tensors made from nothing."""

from __future__ import annotations

from thinet.trace.labels import ANY, FIXED, Axis, Labeller
from thinet.trace.program import Op, Value

UNARY = """
abs acos acosh asin asinh atan atanh bernoulli bitwise_not ceil celu clamp clamp_max clamp_min clone
contiguous cos cosh deg2rad detach digamma elu erf erfc erfinv exp exp2 expm1 floor frac gelu
hardshrink hardsigmoid hardswish hardtanh isfinite isinf isnan leaky_relu lgamma lift_fresh
lift_fresh_copy log log10 log1p log2 log_sigmoid_forward logical_not mish nan_to_num native_dropout
neg nonzero_static positive pow reciprocal relu relu6 round rrelu_with_noise rsqrt rsub selu sgn
sigmoid sign silu sin sinc sinh softplus softshrink special_expit sqrt square tan tanh threshold
trunc _to_copy alias _conj conj_physical logit angle dropout alpha_dropout to resolve_conj
resolve_neg
""".split()

BINARY = """
add addcdiv addcmul atan2 bitwise_and bitwise_or bitwise_xor copy div divide eq floor_divide fmod ge
gt le lerp logaddexp logical_and logical_or logical_xor lt masked_fill maximum minimum mul multiply
ne pow remainder sub subtract true_divide where xlogy heaviside hypot __and__ __or__ __xor__
__rshift__ __lshift__ bitwise_left_shift
""".split()

# They ignore what was in the tensor before.
FILLED = "bernoulli_ exponential_ fill_ fill normal_ random_ uniform_ zero_ zero".split()

NEW = """
empty empty_like empty_strided eye full full_like new_empty new_empty_strided new_full new_ones
new_zeros ones ones_like rand rand_like randn randn_like scalar_tensor zeros zeros_like randint
randint_like randperm
""".split()

DRAWN = frozenset(
    f"aten.{name}"
    for name in (
        *"rand rand_like randn randn_like randint randint_like randperm".split(),
        *"bernoulli_ exponential_ normal_ random_ uniform_".split(),
    )
)

# Their entries say where they are, so they fit no other position.
POSITIONS = "arange linspace logspace tril_indices triu_indices".split()


def broadcast(
    labels: Labeller, op: Op, operands: list[Value], shape: tuple[int, ...]
) -> list[Axis]:
    """The axes of a result of this shape, its operands aligned at the last dimension."""
    axes: list[Axis] = []
    for dim, size in enumerate(shape):
        back = len(shape) - dim
        met = [
            labels.of(v)[len(v.shape) - back]
            for v in operands
            if len(v.shape) >= back and v.shape[len(v.shape) - back] == size
        ]
        axes.append(labels.join_all(met, op.where))
    return axes


def pointwise(labels: Labeller, op: Op) -> None:
    operands = op.inputs()
    for out in op.outputs():
        labels.set(out, broadcast(labels, op, operands, out.shape))


def same(labels: Labeller, op: Op) -> None:
    """Every result that has the first input's shape has its labels."""
    source = op.inputs()[0]
    for out in op.outputs():
        if out.shape == source.shape:
            labels.set(out, labels.of(source))
            _drawn(labels, op, out)
        else:
            labels.set(out, (FIXED,) * len(out.shape))


def new(labels: Labeller, op: Op) -> None:
    """Its size is a number in the forward code; tracing again shows whether it follows a cut."""
    for out in op.outputs():
        labels.set(out, [labels.classes.fresh(n) for n in out.shape])
        _drawn(labels, op, out)


def _drawn(labels: Labeller, op: Op, out: Value) -> None:
    """Fewer random numbers are other ones: nothing can be exact. Training is never exact."""
    if op.name in DRAWN and not labels.program.training:
        labels.lock_all(out, f"{op.where} draws random numbers of its size")


def positions(labels: Labeller, op: Op) -> None:
    for out in op.outputs():
        labels.set(out, (FIXED,) * len(out.shape))


def prelu(labels: Labeller, op: Op) -> None:
    x, weight = op.inputs()
    axes = list(labels.of(x))
    if weight.shape != (1,) and len(weight.shape) == 1 and len(axes) > 1:
        axes[1] = labels.join(axes[1], labels.of(weight)[0], op.where)
        labels.set(op.outputs()[0], axes)
    else:
        pointwise(labels, op)


def expand(labels: Labeller, op: Op) -> None:
    source, (out,) = op.inputs()[0], op.outputs()
    axes: list[Axis] = []
    lead = len(out.shape) - len(source.shape)
    for dim, size in enumerate(out.shape):
        kept = dim >= lead and source.shape[dim - lead] == size
        axes.append(labels.of(source)[dim - lead] if kept else ANY)
    labels.set(out, axes)


def no_result(labels: Labeller, op: Op) -> None:
    """Assertions and the like."""
    for out in op.outputs():
        labels.set(out, (FIXED,) * len(out.shape))


RULES = {
    **{f"aten.{name}{place}": pointwise for name in UNARY + BINARY for place in ("", "_")},
    **{f"aten.{name}": same for name in FILLED},
    **{f"aten.{name}": new for name in NEW},
    **{f"aten.{name}": positions for name in POSITIONS},
    "aten._prelu_kernel": prelu,
    "aten.prelu": prelu,
    "aten.expand": expand,
    "aten.expand_as": expand,
    "aten.broadcast_to": expand,
    "aten._assert_async": no_result,
    "aten._assert_scalar": no_result,
    "aten.sym_size": no_result,
}
