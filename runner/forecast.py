"""What a model will take of a machine: disk, RAM, and seconds, from its shape and the machine's rates.

    a pass of one row   the longer of streamed bytes / disk, weights / memory; and a little for each block
    the prompt's pass   the longest of weights / disk, weights / memory, multiply-adds / compute; and that little

The prompt's pass is the first, so it also brings what stays resident.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.budget import Budget
from runner.header import DATA_ALIGNMENT, tensor_nbytes
from runner.model import shares
from runner.pieces import row_ranges
from runner.prepared import Hyperparameters, part_specs
from runner.rates import Rates

# The small operations between a block's products, measured with blocks whose weights weigh nothing.
SECONDS_BY_BLOCK = 0.001
# What a tokenizer takes of the process's memory for each byte of its tokenizer.json, and that file's size for BLOOM.
TOKENIZER_MEMORY = 13
BLOOMS_TOKENIZER = 14_500_438


@dataclass(frozen=True)
class Forecast:
    """One model in one amount of RAM on one machine.

    `limit_seconds` is the least time that a pass of one row can take: streamed bytes at the disk's rate, or all
    weights at the memory's.
    """

    shares: Budget
    weight_bytes: int
    limit_seconds: float
    seconds_per_token: float
    prompt_seconds: float


def weight_bytes(model: Hyperparameters) -> int:
    """Bytes of all tensors: what one pass needs."""
    return sum(spec.nbytes(model.dtype) for spec in part_specs(model))


def disk_bytes(model: Hyperparameters) -> int:
    """Bytes of all parts; a header takes up one page."""
    specs = part_specs(model)
    return sum(DATA_ALIGNMENT + spec.nbytes(model.dtype) for spec in specs)


def piece_bytes(model: Hyperparameters) -> list[int]:
    """Bytes of the pieces of all matrices, in the order of a pass."""
    embedding, *others = part_specs(model)
    return [
        (last - first) * tensor_nbytes(model.dtype, shape[1:])
        for spec in (*others, embedding)
        for shape in spec.tensors.values()
        if len(shape) == 2
        for first, last in row_ranges(shape[0], tensor_nbytes(model.dtype, shape))
    ]


def process_bytes(model: Hyperparameters, in_use: int, tokenizer_json: int = BLOOMS_TOKENIZER) -> int:
    """What the process will hold before any matrix, where it holds `in_use` bytes without tokenizer and model."""
    vectors = weight_bytes(model) - sum(piece_bytes(model))
    return in_use + vectors + TOKENIZER_MEMORY * tokenizer_json


def limit(weights: int, streamed: int, rates: Rates) -> float:
    """The least seconds of a pass of one row."""
    return max(streamed / rates.disk, weights / rates.memory)


def forecast(
    model: Hyperparameters, ram: int, process: int, rates: Rates, prompt_tokens: int, new_tokens: int
) -> Forecast:
    """A prompt of `prompt_tokens` and `new_tokens` passes of one row, in `ram` bytes of which `process` are taken.

    Raises `BloomdeskError` where the RAM is too little.
    """
    shared = shares(model, piece_bytes(model), ram, process, prompt_tokens + new_tokens, prompt_tokens)
    weights, between = weight_bytes(model), SECONDS_BY_BLOCK * model.n_layer
    least = limit(weights, shared.streamed_bytes, rates)
    prompt = max(
        weights / rates.disk, weights / rates.memory, multiplications(model, prompt_tokens) / rates.compute
    )
    return Forecast(shared, weights, least, least + between, prompt + between)


def multiplications(model: Hyperparameters, rows: int) -> int:
    """Multiply-adds of a pass of `rows` rows with an empty cache; the head is applied to the last one alone."""
    E = model.hidden_size
    block = 12 * E * E * rows + 2 * E * rows * rows
    return model.n_layer * block + model.vocab_size * E
