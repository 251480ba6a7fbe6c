"""The numbers that fix a BLOOM's shapes and arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from runner.errors import BloomdeskError

DTYPES = ("BF16", "F16", "F32")
LIMITS = {"hidden_size": 2**20, "n_head": 2**16, "n_layer": 10_000, "vocab_size": 2**24}


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers that fix a BLOOM's shapes and arithmetic, normalised from config.json.

    `dtype` is the safetensors name of the one dtype that all tensors have.
    """

    hidden_size: int
    n_head: int
    n_layer: int
    vocab_size: int
    dtype: str
    layer_norm_epsilon: float = 1e-5
    apply_residual_connection_post_layernorm: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = 3

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not 0 < value <= limit:
                raise BloomdeskError(f"the model's {name} must be from 1 to {limit:,}, found {quoted(value)}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 0 <= value < self.vocab_size):
                raise BloomdeskError(f"the model's {name} must lie in the vocabulary, found {quoted(value)}")
        if self.hidden_size % self.n_head:
            raise BloomdeskError(
                f"the model's hidden_size {self.hidden_size} is no multiple of its {self.n_head} heads"
            )
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise BloomdeskError(
                f"the model's dtype must be one of {', '.join(DTYPES)}, found {quoted(self.dtype)}"
            )
        epsilon = self.layer_norm_epsilon
        if not isinstance(epsilon, float) or not 0 < epsilon < 1:
            raise BloomdeskError(
                f"the model's layer_norm_epsilon must be between 0 and 1, found {quoted(epsilon)}"
            )
        if not isinstance(self.apply_residual_connection_post_layernorm, bool):
            raise BloomdeskError("the model's apply_residual_connection_post_layernorm must be true or false")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_head


def quoted(value: object) -> str:
    """A value that may be anything, short enough for one sentence."""
    return repr(value)[:80]
