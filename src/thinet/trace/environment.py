"""The tensors of one batch that is on its way through a program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from thinet.errors import CalibrationError
from thinet.store import Kept, Store
from thinet.trace.program import Op, Program, values_of

Form = tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...]]


class Environment(dict[int, Tensor]):
    """One batch's tensors that are still needed, by value id.

    Parameters are looked up by name, so that a repair is seen at once. Between two stretches of
    operations the others may rest in a store, memory by memory, so that views stay views; they can
    be read there (never written into) as if they were here.

    Args:
        given: tensors that are there before the first operation.
        tensors: parameters and buffers by name.
        store: where tensors rest; None keeps them here.
    """

    def __init__(
        self,
        program: Program,
        given: Mapping[int, Tensor],
        tensors: Mapping[str, Tensor],
        store: Store | None = None,
    ) -> None:
        super().__init__(given)
        self._tensors, self._names, self._store = tensors, program.names, store
        self._stays = _not_made(program) if store is not None else set()
        self._resting: dict[int, tuple[Kept, Form]] = {}

    def __missing__(self, key: int) -> Tensor:
        if key in self._resting:
            kept, form = self._resting[key]
            return _view(kept.get(), form)
        if key not in self._names:
            raise CalibrationError(
                "the model writes into a tensor that is neither a parameter nor a buffer; register "
                "it with register_buffer so that calibration can run"
            )
        return self._tensors[self._names[key]]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self._resting

    def wake(self, ops: Iterable[Op]) -> None:
        """Bring back what these operations read, and all that shares its memory."""
        if not self._resting:
            return
        needed = {value.id for op in ops for value in op.inputs()}
        asked = {id(kept) for i, (kept, _) in self._resting.items() if i in needed}
        memory: dict[int, Tensor] = {}
        for i, (kept, form) in list(self._resting.items()):
            if id(kept) in asked:
                if id(kept) not in memory:
                    memory[id(kept)] = kept.get()
                self[i] = _view(memory[id(kept)], form)
                del self._resting[i]

    def rest(self) -> None:
        """Put what operations have made into the store."""
        if self._store is None:
            return
        kept: dict[int, Kept] = {}
        for i, tensor in list(self.items()):
            if i in self._stays or not tensor.numel() or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if place not in kept:
                bare = torch.empty(0, dtype=torch.uint8, device=tensor.device)
                kept[place] = self._store.put(bare.set_(storage), soon=True)
            offset, shape, stride = int(tensor.storage_offset()), tensor.shape, tensor.stride()
            self._resting[i] = kept[place], (tensor.dtype, offset, tuple(shape), tuple(stride))
            del self[i]


def _view(memory: Tensor, form: Form) -> Tensor:
    dtype, offset, shape, stride = form
    bare = torch.empty(0, dtype=dtype, device=memory.device)
    return bare.set_(memory.untyped_storage(), offset, shape, stride)


def _not_made(program: Program) -> set[int]:
    """Values in the memory of parameters, constants and inputs, which exist anyway."""
    given = program.names.keys() | program.constants.keys()
    given |= {value.id for value in values_of(program.inputs)}
    values = {v.id: v.storage for op in program.ops for v in (*op.inputs(), *op.outputs())}
    fixed = {values[i] for i in given if i in values}
    return {i for i, storage in values.items() if storage in fixed}


def peak_bytes(program: Program) -> int:
    """Most memory that one batch's tensors take at any operation, parameters not counted."""
    last: dict[int, int] = {}
    size: dict[int, int] = {}
    fixed = {value.storage for value in program.parameters.values()}
    for op in program.ops:
        for value in (*op.inputs(), *op.outputs()):
            last[value.storage] = op.index
            count = torch.Size(value.shape).numel() * value.dtype.itemsize
            size[value.storage] = max(size.get(value.storage, 0), count)
    end = len(program.ops)
    last |= {value.storage: end for value in values_of(program.outputs)}
    alive: set[int] = set()
    most = 0
    for op in program.ops:
        alive |= {v.storage for v in (*op.inputs(), *op.outputs())} - fixed
        most = max(most, sum(size[s] for s in alive))
        alive = {s for s in alive if last[s] > op.index}
    return most
