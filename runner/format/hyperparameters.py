"""The numbers that fix a BLOOM's shapes and arithmetic."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from runner.errors import BloomdeskError

DTYPES = ("BF16", "F16", "F32")
LIMITS = {"hidden_size": 2**20, "n_head": 2**16, "n_layer": 10_000, "vocab_size": 2**24}


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers that fix a BLOOM's shapes and arithmetic, normalised from config.json.

    `dtype` is the safetensors name of the one dtype that all tensors have. Without `tie_word_embeddings` the head is a
    matrix of its own, else it is the embedding.
    """

    hidden_size: int
    n_head: int
    n_layer: int
    vocab_size: int
    dtype: str
    layer_norm_epsilon: float = 1e-5
    apply_residual_connection_post_layernorm: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 3
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        def check(name: str, is_valid: bool, rule: str) -> None:
            if not is_valid:
                found = quoted(getattr(self, name))
                raise BloomdeskError(f"the model's {name} must {rule}, found {found}")

        for name, limit in LIMITS.items():
            value = getattr(self, name)
            check(name, type(value) is int and 0 < value <= limit, f"be from 1 to {limit:,}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            several = name == "eos_token_id" and isinstance(value, tuple) and len(value) > 1
            tokens = value if several else () if value is None else (value,)
            are_tokens = all(type(token) is int and 0 <= token < self.vocab_size for token in tokens)
            check(name, are_tokens, "lie in the vocabulary")
        check("hidden_size", not self.hidden_size % self.n_head, f"be a multiple of its {self.n_head} heads")
        check("dtype", self.dtype in DTYPES, f"be one of {', '.join(DTYPES)}")
        epsilon = self.layer_norm_epsilon
        check("layer_norm_epsilon", isinstance(epsilon, float) and 0 < epsilon < 1, "be between 0 and 1")
        check("tie_word_embeddings", isinstance(self.tie_word_embeddings, bool), "be true or false")
        after = "apply_residual_connection_post_layernorm"
        check(after, isinstance(getattr(self, after), bool), "be true or false")

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids of all tokens that end a text."""
        ends = self.eos_token_id
        return frozenset(ends if isinstance(ends, tuple) else () if ends is None else (ends,))

    @property
    def recorded(self) -> dict[str, Any]:
        """The numbers as the manifest has them; what most models have in common is not said."""
        found = asdict(self)
        if self.tie_word_embeddings:
            del found["tie_word_embeddings"]
        return found

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_head


def quoted(value: object) -> str:
    """Any value as text that is short enough for one sentence."""
    return repr(value)[:80]
