"""The one dtype that a prepared directory has: by default the one in which transformers loads the source.

`from_pretrained(dtype="auto")` takes config.json's, else that of the first tensor of numbers in the first file, and
rounds every other tensor to it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from runner.errors import BloomdeskError
from runner.format.hyperparameters import DTYPES, quoted
from toolkit.source.tensor import SourceTensor

OPTIONS = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
# What config.json calls them.
NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# What can be rounded to any of `DTYPES`.
NUMBERS = (*DTYPES, "F64")
# Bits of the fraction and of the exponent.
_PRECISION = {"BF16": (7, 8), "F16": (10, 5), "F32": (23, 8), "F64": (52, 11)}


@dataclass(frozen=True)
class Choice:
    """The dtype of a prepared directory, and why it is this one."""

    dtype: str
    why: str


def choose_dtype(asked: str | None, config: bytes, first: Mapping[str, SourceTensor]) -> Choice:
    """The dtype that was `asked` for, or else that of transformers.

    `config` has the bytes of a checked config.json, `first` the tensors of the first file, by key and in its order.
    Raises `BloomdeskError` if that is none of `DTYPES`.
    """
    if asked is not None:
        return Choice(asked, "as --dtype says")
    fields = json.loads(config)
    name = fields.get("dtype") or fields.get("torch_dtype")
    if name is not None:
        by_name = {name: dtype for dtype, name in NAMES.items()}
        return Choice(_known(by_name.get(str(name), str(name)), "config.json"), "as config.json says")
    if not first:
        raise BloomdeskError("the source's weights hold no tensors")
    tensors = list(first.values())
    if tensors[0].file.suffix == ".safetensors":
        # The order in which the reference reader lists them.
        tensors.sort(key=lambda tensor: tensor.key)
    chosen = next((tensor for tensor in tensors if tensor.dtype in NUMBERS), tensors[0])
    return Choice(
        _known(chosen.dtype, f"{chosen.file}: {chosen.key}"), f"the dtype of {chosen.key}, the first tensor"
    )


def _known(dtype: str, where: str) -> str:
    if dtype not in DTYPES:
        raise BloomdeskError(
            f"{where}: the dtype {quoted(dtype)[1:-1]} is none of {', '.join(DTYPES)}",
            "choose one: --dtype bf16",
        )
    return dtype


def config_in(config: bytes, dtype: str) -> bytes:
    """A config.json with `dtype`, for a reader that believes it; the same bytes if it says so, or nothing of it."""
    fields = json.loads(config)
    said = {name: fields[name] for name in ("dtype", "torch_dtype") if fields.get(name) is not None}
    if all(value == NAMES[dtype] for value in said.values()):
        return config
    return (json.dumps({**fields, **dict.fromkeys(said, NAMES[dtype])}, indent=2) + "\n").encode()


def in_dtype(tensors: Mapping[str, SourceTensor], used: Iterable[str], dtype: str) -> dict[str, SourceTensor]:
    """Those of `tensors`, by key, that are `used`, to be read as `dtype`.

    Raises `BloomdeskError` if one of them can't be rounded to it.
    """
    found = {}
    for key in used:
        tensor = tensors.get(key)
        if tensor is None:
            continue
        if tensor.dtype not in NUMBERS:
            raise BloomdeskError(
                f"{tensor.file}: {tensor.key} is {tensor.dtype}, expected one of {', '.join(DTYPES)}",
                "fetch the model that this one was made from"
                if tensor.dtype[:2] in ("F8", "I8", "U8")
                else None,
            )
        found[key] = tensor.read_as(dtype)
    return found


def rounding_notes(tensors: Iterable[SourceTensor], why: str) -> tuple[str, ...]:
    """Sentences about tensors that are of another dtype in the file."""
    counts = Counter((tensor.stored, tensor.dtype) for tensor in tensors if tensor.stored != tensor.dtype)
    return tuple(
        f"{count:,} tensor{'' if count == 1 else 's'} of {stored} "
        f"{'was' if count == 1 else 'were'} {'widened' if _is_exact(stored, dtype) else 'rounded'} to {dtype}, {why}"
        for (stored, dtype), count in sorted(counts.items())
    )


def _is_exact(stored: str, dtype: str) -> bool:
    """Whether every number of `stored` is one of `dtype`."""
    return all(ours <= theirs for ours, theirs in zip(_PRECISION[stored], _PRECISION[dtype], strict=True))
