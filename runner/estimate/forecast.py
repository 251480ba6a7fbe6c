"""What a model will take of a machine: disk, RAM, and seconds, from its shape and the machine's rates.

    a pass of one row   the longer of streamed bytes / disk, weights / memory; and a little for each block
    the prompt's pass   the longest of weights / disk, weights / memory, multiply-adds / compute; and that little

The prompt's pass is the first, so it also brings what stays resident. Losslessly coded weights are fewer bytes of the
disk and of the RAM, and go through the decoder in place of the memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.estimate.rates import Rates
from runner.format.coded import row_group_count
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import part_specs
from runner.format.manifest import Manifest
from runner.format.safetensors import DATA_ALIGNMENT, tensor_nbytes
from runner.generation.memory_plan import MemoryPlan, MemoryRequest, memory_plan
from runner.weights.chunks import row_ranges

# The small operations between a block's products, measured with blocks whose weights weigh nothing.
SECONDS_BY_BLOCK = 0.001
# What the lossless form leaves of a matrix with normal weights; docs/performance.md has how that was measured.
LOSSLESS_SHARE = 0.67
# What a tokenizer takes of the process's memory for each byte of its tokenizer.json, and that file's size for BLOOM.
TOKENIZER_MEMORY = 13
BLOOMS_TOKENIZER = 14_500_438


@dataclass(frozen=True)
class Forecast:
    """One model in one form in one amount of RAM on one machine.

    `limit_seconds` is the least time that a pass of one row can take: streamed bytes at the disk's rate, or all
    weights at the memory's or the decoder's.
    """

    shares: MemoryPlan
    weight_bytes: int
    share: float  # of a matrix's bytes that are left of it; below 1 where it is coded
    limit_seconds: float
    seconds_per_token: float
    prompt_seconds: float


def weight_bytes(model: Hyperparameters) -> int:
    """Bytes of all tensors: what one pass needs."""
    return sum(spec.nbytes(model.dtype) for spec in part_specs(model))


def disk_bytes(model: Hyperparameters, share: float = 1.0) -> int:
    """Bytes of all parts; a header takes up one page, and matrices `share` of what they are uncoded."""
    specs, vectors = part_specs(model), weight_bytes(model) - sum(chunk_bytes(model))
    return len(specs) * DATA_ALIGNMENT + vectors + sum(chunk_bytes(model, share))


def chunk_bytes(model: Hyperparameters, share: float = 1.0) -> list[int]:
    """Bytes of the chunks of all matrices, in the order of a pass; coded row groups are taken to be of one size."""
    embedding, *others = part_specs(model)
    found = []
    for spec in (*others, embedding):
        for shape in spec.matrices.values():
            nbytes = round(share * tensor_nbytes(model.dtype, shape))
            units = row_group_count(shape[0]) if share < 1 else shape[0]
            cuts = row_ranges(units, nbytes)
            found += [nbytes * last // units - nbytes * first // units for first, last in cuts]
    return found


def coded_share(manifest: Manifest) -> float:
    """What is left of a matrix's bytes in the directory of this manifest, of all of them that are there: 1 uncoded."""
    coded = {
        (part.file, tensor.name): tensor.nbytes for part in manifest.parts.values() for tensor in part.decoded
    }
    stored = [
        tensor.nbytes
        for part in manifest.parts.values()
        for tensor in part.tensors
        if (part.file, tensor.name) in coded
    ]
    return sum(stored) / sum(coded.values()) if coded else 1.0


def process_bytes(model: Hyperparameters, in_use: int, tokenizer_json: int = BLOOMS_TOKENIZER) -> int:
    """What the process will hold before any matrix, where it holds `in_use` bytes without tokenizer and model."""
    vectors = weight_bytes(model) - sum(chunk_bytes(model))
    return in_use + vectors + TOKENIZER_MEMORY * tokenizer_json


def limit(weights: int, streamed: int, rates: Rates, share: float = 1.0) -> float:
    """The least seconds of a pass of one row."""
    return max(streamed / rates.disk, weights / (rates.decoded if share < 1 else rates.memory))


def forecast(
    model: Hyperparameters,
    ram: int,
    process: int,
    rates: Rates,
    prompt_tokens: int,
    new_tokens: int,
    share: float = 1.0,
) -> Forecast:
    """A prompt of `prompt_tokens` and `new_tokens` passes of one row, in `ram` bytes of which `process` are taken.

    `share` is what is left of a matrix's bytes, below 1 where it is losslessly coded. Raises `BloomdeskError` where the
    RAM is too little.
    """
    chunks = chunk_bytes(model, share)
    capacities = (prompt_tokens + new_tokens,)
    shared = memory_plan(MemoryRequest(model, tuple(chunks), ram, process, capacities, prompt_tokens))
    weights, between = weight_bytes(model), SECONDS_BY_BLOCK * model.n_layer
    least = limit(weights, shared.streamed_bytes, rates, share)
    prompt = max(
        limit(weights, sum(chunks), rates, share), multiplications(model, prompt_tokens) / rates.compute
    )
    return Forecast(shared, weights, share, least, least + between, prompt + between)


def multiplications(model: Hyperparameters, rows: int) -> int:
    """Multiply-adds of a pass of `rows` rows with an empty cache; the head is applied to the last one alone."""
    E = model.hidden_size
    block = 12 * E * E * rows + 2 * E * rows * rows
    return model.n_layer * block + model.vocab_size * E
