"""The strict table of names: which key of a source checkpoint is which tensor of which part.

    word_embeddings.weight                        embedding.safetensors        word_embeddings.weight
    h.7.self_attention.query_key_value.weight     block_07.safetensors         self_attention.query_key_value.weight
    ln_f.bias                                     final_layernorm.safetensors  bias

Keys may start with `transformer.`; `lm_head.weight` may repeat the embedding. Everything else is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from runner.errors import BloomdeskError
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import EMBEDDING, FINAL_LAYERNORM, part_specs

PREFIX = "transformer."
LM_HEAD = "lm_head.weight"
EXAMPLES = 3


@dataclass(frozen=True)
class Assignment:
    """Source keys by part file and stripped name, both in the order of a pass; `lm_head` if there is one."""

    parts: dict[str, dict[str, str]]
    lm_head: str | None


def name_table(model: Hyperparameters) -> dict[str, tuple[str, str]]:
    """Every key that a checkpoint of `model` must have, without prefix -> (part file, name in the part)."""
    table = {}
    block = 0
    for spec in part_specs(model):
        if spec.file == EMBEDDING:
            stem = ""
        elif spec.file == FINAL_LAYERNORM:
            stem = "ln_f."
        else:
            stem = f"h.{block}."
            block += 1
        table.update({stem + name: (spec.file, name) for name in spec.tensors})
    return table


def assign(keys: Iterable[str], model: Hyperparameters) -> Assignment:
    """Find the place of every key.

    Raises `BloomdeskError` for keys that no BLOOM of this shape has, for tensors that are missing, and for
    a tensor that is there twice, with and without the prefix.
    """
    table = name_table(model)
    found: dict[str, str] = {}
    unknown, twice = [], []
    lm_head = None
    for key in keys:
        name = key.removeprefix(PREFIX)
        if key == LM_HEAD:
            lm_head = key
        elif name not in table:
            unknown.append(key)
        elif name in found:
            twice.append(name)
        else:
            found[name] = key
    missing = [name for name in table if name not in found]
    for names, what in (
        (unknown, "that no BLOOM of this shape has"),
        (missing, "missing"),
        (twice, f"there twice, with and without {PREFIX!r}"),
    ):
        if names:
            raise BloomdeskError(f"the source has {_count(names)} {what}: {_examples(names)}")
    parts: dict[str, dict[str, str]] = {}
    for name, (file, stripped) in table.items():
        parts.setdefault(file, {})[stripped] = found[name]
    return Assignment(parts, lm_head)


def _count(names: list[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names):,} tensors"


def _examples(names: list[str]) -> str:
    shown = ", ".join(name[:120] for name in names[:EXAMPLES])
    return shown if len(names) <= EXAMPLES else f"{shown}, and {len(names) - EXAMPLES:,} more"
