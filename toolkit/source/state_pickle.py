"""The pickle of a state dict, taken apart as data: it is not unpickled, and nothing that it names is called.

    {"h.0.input_layernorm.weight": _rebuild_tensor_v2(("storage", BFloat16Storage, "0", "cpu", 8), 0, (8,), (1,), ...)}

An unpickler, also torch's careful one, can be made to take all memory or to crash by what it is allowed to do.
Here a value is text, a number, a tuple, a list, a table with text or numbers for keys, or a tensor's description;
anything else is refused where it stands. Protocols 2 to 5 of pickle are read. The opcodes' meaning: https://docs.python.org/3/library/pickletools.html
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# A whole BLOOM-176B in one file takes 0.1 MB; what can be made of so much is a few hundred MB at most.
LARGEST_PICKLE = 2 * 2**20
MOST_AXES = 8
# The storages of torch.save -> safetensors' name of their dtype, or torch's own if no BLOOM has it; bytes.
STORAGES = {
    "torch BFloat16Storage": ("BF16", 2),
    "torch HalfStorage": ("F16", 2),
    "torch FloatStorage": ("F32", 4),
    "torch DoubleStorage": ("F64", 8),
    "torch LongStorage": ("torch.int64", 8),
    "torch IntStorage": ("torch.int32", 4),
    "torch ShortStorage": ("torch.int16", 2),
    "torch CharStorage": ("torch.int8", 1),
    "torch ByteStorage": ("torch.uint8", 1),
    "torch BoolStorage": ("torch.bool", 1),
    "torch ComplexFloatStorage": ("torch.complex64", 8),
    "torch ComplexDoubleStorage": ("torch.complex128", 16),
}
# Training code saves the state beside others under one of these names.
WRAPPERS = ("model", "state_dict", "module")
TABLE, TENSOR, PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)


class NotWeights(ValueError):
    """The pickle asks for something that no table of tensors needs; the message says for what."""


@dataclass(frozen=True)
class Storage:
    """A record of the zip: `data/RECORD`, with `numel` elements of a dtype."""

    dtype: str
    itemsize: int
    record: str
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a storage; `begin` and `nbytes` are bytes, of the storage's record and of the elements.

    `strides` count elements; None if the tensor is one row-major run of bytes.
    """

    storage: Storage
    shape: tuple[int, ...]
    begin: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.storage.itemsize


@dataclass(frozen=True)
class _Name:
    """A global that the pickle names; only ever compared."""

    text: str


def read_state(data: bytes) -> dict[str, StoredTensor]:
    """The tensors that the pickle of a state dict describes, by key, also if that stands under one of `WRAPPERS`.

    Raises `NotWeights` if it names anything but what a state dict needs, and `ValueError` if it is no
    sound pickle, or describes something else than tensors under printable keys.
    """
    state = _read(data)
    wrapper = _wrapper(state)
    state = state[wrapper] if wrapper else state
    for key, value in state.items():
        if not isinstance(value, StoredTensor) or not isinstance(key, str):
            raise ValueError(f"under {str(key)[:120]!r} it holds no tensor")
        if not key.isprintable():
            raise ValueError(f"{key[:120]!r} is not the name of a tensor")
    return state


def names_beside_state(data: bytes) -> tuple[str, ...]:
    """What else the pickle holds, as an optimizer's state, if the state stands under one of `WRAPPERS`.

    Raises as `read_state` does.
    """
    state = _read(data)
    wrapper = _wrapper(state)
    return tuple(str(name)[:60] for name in state if wrapper and name != wrapper)


def _read(data: bytes) -> dict[Any, Any]:
    if len(data) > LARGEST_PICKLE:
        raise ValueError(
            f"its data.pkl has {len(data):,} bytes, no BLOOM's is larger than {LARGEST_PICKLE:,}"
        )
    state = _Reader().read(data)
    if not isinstance(state, dict):
        raise ValueError("it does not hold a table of tensors")
    return state


def _wrapper(state: dict[Any, Any]) -> str | None:
    """The one of `WRAPPERS` under which `state` holds the table of tensors, or None if it is that table."""
    wrapped = [name for name in WRAPPERS if isinstance(state.get(name), dict)]
    if len(wrapped) > 1:
        raise ValueError(f"it holds a table under {wrapped[0]!r} and one under {wrapped[1]!r}")
    return wrapped[0] if wrapped else None


class _Reader:
    """Follows the opcodes of a pickle with a stack of plain values."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def read(self, data: bytes) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name == "STOP":
                    return self._stack.pop()
                step = _STEPS.get(opcode.name)
                if step is None:
                    raise NotWeights(opcode.name)
                step(self, argument)
        except (IndexError, KeyError, AttributeError) as error:
            # Too little on the stack, nothing under that number, or something other than a list or table.
            raise ValueError(f"its data.pkl is no sound pickle ({type(error).__name__})") from None
        raise ValueError("its data.pkl has no end")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def put(self, number: int) -> None:
        self._memo[number] = self._stack[-1]

    def memoize(self) -> None:
        self.put(len(self._memo))

    def get(self, number: int) -> None:
        self._stack.append(self._memo[number])

    def since_mark(self) -> list[Any]:
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def last(self, count: int) -> list[Any]:
        if count > len(self._stack):
            raise IndexError(count)
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise AttributeError("list")
        self._stack[-1].extend(values)

    def fill(self, items: list[Any]) -> None:
        table = self._stack[-1]
        if not isinstance(table, dict) or len(items) % 2:
            raise AttributeError("table")
        for key in items[::2]:
            # The hash of a tuple of tuples can take for ever, and a deep one ends the process.
            if type(key) not in (str, int):
                raise ValueError(f"under a key of type {type(key).__name__} it holds no tensor")
        table.update(zip(items[::2], items[1::2], strict=True))

    def name(self, text: str) -> None:
        if text not in STORAGES and text not in (TABLE, TENSOR, PARAMETER):
            raise NotWeights(text)
        self._stack.append(_Name(text))

    def stacked_name(self) -> None:
        module, name = self.last(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise NotWeights("STACK_GLOBAL")
        self.name(f"{module} {name}")

    def call(self) -> None:
        name, arguments = self.last(2)
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise NotWeights("REDUCE")
        if name.text == TENSOR:
            self._stack.append(_tensor(arguments))
        elif name.text == PARAMETER and arguments and isinstance(arguments[0], StoredTensor):
            self._stack.append(arguments[0])
        elif name.text == TABLE and not arguments:
            self._stack.append({})
        else:
            raise NotWeights(f"{name.text} with {len(arguments)} arguments")

    def build(self) -> None:
        """Attributes of a table, as `_metadata` of a module's state dict, describe no bytes."""
        table, _ = self.last(2)
        if not isinstance(table, dict):
            raise NotWeights("BUILD")
        self._stack.append(table)


_STEPS: dict[str, Callable[[_Reader, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda reader, _: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Reader.push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE"), _Reader.push),
    "NONE": lambda reader, _: reader.push(None),
    "NEWTRUE": lambda reader, _: reader.push(True),
    "NEWFALSE": lambda reader, _: reader.push(False),
    "EMPTY_DICT": lambda reader, _: reader.push({}),
    "EMPTY_LIST": lambda reader, _: reader.push([]),
    "EMPTY_TUPLE": lambda reader, _: reader.push(()),
    "MARK": lambda reader, _: reader.mark(),
    "TUPLE": lambda reader, _: reader.push(tuple(reader.since_mark())),
    "TUPLE1": lambda reader, _: reader.push(tuple(reader.last(1))),
    "TUPLE2": lambda reader, _: reader.push(tuple(reader.last(2))),
    "TUPLE3": lambda reader, _: reader.push(tuple(reader.last(3))),
    "APPEND": lambda reader, _: reader.extend(reader.last(1)),
    "APPENDS": lambda reader, _: reader.extend(reader.since_mark()),
    "SETITEM": lambda reader, _: reader.fill(reader.last(2)),
    "SETITEMS": lambda reader, _: reader.fill(reader.since_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Reader.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Reader.get),
    "MEMOIZE": lambda reader, _: reader.memoize(),
    "GLOBAL": _Reader.name,
    "STACK_GLOBAL": lambda reader, _: reader.stacked_name(),
    "BINPERSID": lambda reader, _: reader.push(_storage(reader.last(1)[0])),
    "REDUCE": lambda reader, _: reader.call(),
    "BUILD": lambda reader, _: reader.build(),
}


def _storage(value: Any) -> Storage:
    """`("storage", type, record, device, elements)`, as torch.save refers to the bytes of a tensor."""
    if isinstance(value, tuple) and len(value) == 5:
        what, kind, record, _, numel = value
        named = isinstance(kind, _Name) and kind.text in STORAGES and isinstance(what, str)
        if named and what == "storage" and isinstance(record, str) and _is_size(numel):
            return Storage(*STORAGES[kind.text], record, numel)
    raise ValueError("it refers to something that is no record of bytes")


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    """`(storage, offset, shape, strides, requires_grad, hooks[, metadata])` of `_rebuild_tensor_v2`."""
    if len(arguments) in (6, 7):
        storage, offset, shape, strides = arguments[:4]
        if (
            isinstance(storage, Storage)
            and all(isinstance(value, tuple) and len(value) <= MOST_AXES for value in (shape, strides))
            and all(_is_size(number) for number in (offset, *shape, *strides))
            and len(shape) == len(strides)
        ):
            is_row_major = _is_row_major(shape, strides)
            last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
            if offset + (math.prod(shape) if is_row_major else last + 1) <= storage.numel:
                begin = offset * storage.itemsize
                return StoredTensor(storage, shape, begin, None if is_row_major else strides)
    raise ValueError("a tensor of it does not lie within its record")


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**63


def _is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    if 0 in shape:
        return True
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
