"""The strict table of names: which key of a source checkpoint is which tensor of which part.

    word_embeddings.weight                        embedding.safetensors        word_embeddings.weight
    h.7.self_attention.query_key_value.weight     block_07.safetensors         self_attention.query_key_value.weight
    ln_f.bias                                     final_layernorm.safetensors  bias

Every key may start with `module.`, as of a model that was trained in parallel, and then with `transformer.`.
`lm_head.weight` may repeat the embedding, stand for it, or be a matrix of its own if the head is not tied.
Buffers that old training code saved are left out. Everything else is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from runner.errors import BloomdeskError
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import EMBEDDING, FINAL_LAYERNORM, HEAD, part_specs

WRAPPER, PREFIX = "module.", "transformer."
MATRIX = "word_embeddings.weight"
# The second is how code that casts the head's output names it.
LM_HEADS = ("lm_head.weight", "lm_head.0.weight")
# Causal masks and the number that stands for a masked score: constants, which the runner computes.
BUFFER = re.compile(
    r"h\.(0|[1-9]\d*)\.self_attention\.(bias|masked_bias|causal_mask|scale_mask_softmax\.causal_mask)"
)
EXAMPLES = 3


@dataclass(frozen=True)
class Assignment:
    """Source keys by part file and stripped name, both in the order of a pass.

    `lm_head` is the key of a head beside the embedding, if there is one; `left_out` are those of buffers.
    """

    parts: dict[str, dict[str, str]]
    lm_head: str | None
    left_out: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys whose tensors are used."""
        used = [key for keys in self.parts.values() for key in keys.values()]
        return (*used, *([self.lm_head] if self.lm_head else []))

    def plain_names(self, model: Hyperparameters) -> dict[str, str]:
        """The key of each used tensor by its name without prefix, as h.0.mlp.dense_h_to_4h.weight."""
        return {name: self.parts[file][stripped] for name, (file, stripped) in name_table(model).items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about what was left out."""
        if not self.left_out:
            return ()
        what = "buffer" if len(self.left_out) == 1 else "buffers"
        return (
            f"left out: {len(self.left_out):,} {what} of old training code, which hold no weights: "
            f"{_examples(self.left_out)}",
        )


def name_table(model: Hyperparameters) -> dict[str, tuple[str, str]]:
    """Every key that a checkpoint of `model` must have, without prefix -> (part file, name in the part)."""
    table = {}
    block = 0
    for spec in part_specs(model):
        if spec.file == EMBEDDING:
            stem = ""
        elif spec.file == FINAL_LAYERNORM:
            stem = "ln_f."
        elif spec.file == HEAD:
            stem = "lm_head."
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
    keys = list(keys)
    wrapper = WRAPPER if keys and all(key.startswith(WRAPPER) for key in keys) else ""
    table = name_table(model)
    found: dict[str, str] = {}
    heads: list[str] = []
    unknown, twice, left_out = [], [], []
    for key in keys:
        outer = key.removeprefix(wrapper)
        name = outer.removeprefix(PREFIX)
        buffer = BUFFER.fullmatch(name)
        if outer in LM_HEADS:
            heads.append(key)
        elif buffer and int(buffer[1]) < model.n_layer:
            left_out.append(key)
        elif name not in table:
            unknown.append(key)
        elif name in found:
            twice.append(name)
        else:
            found[name] = key
    if not model.tie_word_embeddings:
        own = [key for key in heads if key.endswith(LM_HEADS[0])]
        found.update(dict.fromkeys(LM_HEADS[:1], own[0]) if own else {})
        heads = [key for key in heads if key not in own[:1]]
        unknown += heads
    elif len(heads) == 1 and MATRIX not in found and heads[0].endswith(LM_HEADS[0]):
        # A file that stores tied tensors once may keep either name.
        found[MATRIX] = heads.pop()
    missing = [name for name in table if name not in found]
    for names, what in (
        (unknown, "that no BLOOM of this shape has"),
        (missing, "missing"),
        (twice, f"there twice, with and without {PREFIX!r}"),
        (heads[1:], f"there twice, as {LM_HEADS[0]} too"),
    ):
        if names:
            raise BloomdeskError(f"the source has {_count(names)} {what}: {_examples(names)}")
    parts: dict[str, dict[str, str]] = {}
    for name, (file, stripped) in table.items():
        parts.setdefault(file, {})[stripped] = found[name]
    return Assignment(parts, heads[0] if heads else None, tuple(left_out))


def _count(names: list[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names):,} tensors"


def _examples(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(name[:120] for name in names[:EXAMPLES])
    return shown if len(names) <= EXAMPLES else f"{shown}, and {len(names) - EXAMPLES:,} more"
