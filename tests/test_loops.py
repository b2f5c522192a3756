"""PyTorch's own loops over time steps are passed by where a cut model is traced again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinet
from tests.oracle import check, randomise
from thinet.errors import LockedGroupError, VerificationError
from thinet.trace import record
from thinet.trace.analyse import analyse
from thinet.trace.loops import is_loop, one_step

torch.set_num_threads(1)

OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bidirectional": True, "bias": False},
]


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, o) for kind in (nn.LSTM, nn.GRU, nn.RNN) for o in OPTIONS]
    + [(nn.LSTM, {"proj_size": 3})],
    ids=str,
)
def test_one_step_tells_the_results_of_all(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    calls: list[tuple[Any, Any, Any]] = []

    class Functions(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            made = func(*args, **(kwargs or {}))
            if is_loop(func, args):
                calls.append((func, args, made))
            return made

    with torch.device("meta"), torch.no_grad(), Functions():
        kind(4, 5, **options)(torch.randn(2, 7, 4))
        kind(4, 5, **options)(torch.randn(7, 4))
    assert len(calls) == 2
    for func, args, made in calls:
        found = one_step(func, args)
        assert [(x.shape, x.stride(), x.dtype) for x in found] == [
            (x.shape, x.stride(), x.dtype) for x in made
        ]


def test_packed_sequences_are_no_such_loop() -> None:
    seen: list[bool] = []

    class Functions(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func in (torch.lstm, torch.gru):
                seen.append(is_loop(func, args))
            return func(*args, **(kwargs or {}))

    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    with Functions():
        nn.LSTM(4, 5)(packed)
        nn.GRU(4, 5)(packed)
    assert seen == [False, False]


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones; its first state is made in the forward code."""

    def __init__(self, width: int | None, kind: type[nn.RNNBase] = nn.GRU, **options: Any) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Linear(3, 6), kind(6, 5, **options)
        self.head = nn.Linear(10 if options.get("bidirectional") else 5, 4)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        if self.width is None:
            return self.head(self.rnn(x)[0])
        return self.head(self.rnn(x, x.new_zeros(1, x.shape[1], self.width))[0])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda k: k.__name__)
def test_the_same_is_found_as_by_all_operations(
    kind: type[nn.RNNBase], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Recurrent(None, kind, **options), torch.randn(9, 8, 3)
    shown: list[int] = []
    step = record._Recorder.__torch_dispatch__

    def counted(self: Any, *given: Any) -> Any:
        shown.append(not self.silent)
        return step(self, *given)

    monkeypatch.setattr(record._Recorder, "__torch_dispatch__", counted)
    quick = analyse(model, x)
    few = sum(shown)
    shown.clear()
    monkeypatch.setattr(record, "is_loop", lambda func, args: False)
    whole = analyse(model, x)
    assert quick.groups == whole.groups
    assert few < sum(shown) / 2
    assert [g.locked is None for g in quick.groups] == [True, True, False][: len(quick.groups)]


def test_a_state_of_a_fixed_width_locks_the_layer() -> None:
    model, x = Recurrent(5), torch.randn(7, 2, 3)
    groups = {g.name: g for g in thinet.find_groups(model, x)}
    assert groups["embed"].locked is None
    assert groups["rnn"].locked is None  # `width` follows
    check(model, x, list(groups.values()), {"rnn": [0, 3], "embed": [1]}, thinet.cut)

    class Literal(Recurrent):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.embed(x))
            return self.head(self.rnn(x, x.new_zeros(1, x.shape[1], 5))[0])

    groups = {g.name: g for g in thinet.find_groups(Literal(None), x)}
    assert groups["embed"].locked is None
    assert "a size of 5" in str(groups["rnn"].locked)


class Ordered(nn.Module):
    """What goes into the loop is put together by number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(3, 6), nn.LSTM(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.rnn(torch.cat([x[..., 2:], x[..., :2]], -1))[0])


def test_channels_that_are_taken_by_number_before_a_loop_are_not_cut_wrongly() -> None:
    model, x = randomise(Ordered()).eval(), torch.randn(7, 2, 3)
    groups = thinet.find_groups(model, x)
    for group in groups:
        if group.locked is None:
            check(model, x, groups, {group.name: [0]}, thinet.cut)
    assert any("number" in str(g.locked) or "size" in str(g.locked) for g in groups)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_a_projection_may_not_become_as_wide_as_what_it_projects() -> None:
    """PyTorch would take such an LSTM for one that does not project."""
    model, x = Recurrent(None, nn.LSTM, proj_size=3), torch.randn(7, 2, 3)
    model.head = nn.Linear(3, 4)
    groups = thinet.find_groups(model, x)
    embed, hidden, _, _ = groups
    assert embed.locked is None
    check(model, x, groups, {"embed": [0, 3]}, thinet.cut)
    with pytest.raises((LockedGroupError, VerificationError)):
        thinet.cut(model, x, {hidden.name: [0, 1, 2]})
