"""What a model will take of a machine: disk, RAM and seconds, from its shape and the machine's rates.

    a pass of one row   max(streamed bytes / disk, weights / memory) + blocks * SECONDS_BY_BLOCK
    the prompt's pass   max(weights / disk, weights / memory, multiply-adds / compute) + blocks * SECONDS_BY_BLOCK

The prompt's pass is the first, so it also reads what stays resident. Losslessly coded weights are fewer bytes of disk
and RAM, and their rate is the decoder's in place of the memory's.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.estimate.rates import Rates
from runner.format.coded import row_group_count
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import DATA_ALIGNMENT, part_specs, pass_nbytes
from runner.format.manifest import Manifest
from runner.format.safetensors import tensor_nbytes
from runner.generation.memory_plan import MemoryPlan, MemoryRequest, memory_plan
from runner.weights.chunks import row_ranges

# The small operations between a block's products, measured with blocks whose weights weigh nothing.
SECONDS_BY_BLOCK = 0.001
# Share of a matrix's bytes that the lossless form takes; docs/performance.md says how that was measured.
LOSSLESS_SHARE = 0.67
# Bytes of the process's memory for each byte of tokenizer.json, and the size of BLOOM's.
TOKENIZER_MEMORY = 13
BLOOMS_TOKENIZER = 14_500_438


@dataclass(frozen=True)
class Forecast:
    """One model in one form in one amount of RAM on one machine.

    `share` is the stored bytes of a matrix divided by the plain ones, below 1 if it is coded. `limit_seconds` is the
    least time of a pass of one row.
    """

    memory_plan: MemoryPlan
    weight_bytes: int
    share: float
    limit_seconds: float
    seconds_per_token: float
    prompt_seconds: float


def weight_bytes(model: Hyperparameters) -> int:
    """Bytes of all tensors that one pass needs."""
    return pass_nbytes(model)


def disk_bytes(model: Hyperparameters, share: float = 1.0) -> int:
    """Bytes of all parts: a page for each header, and `share` of the bytes of plain matrices."""
    specs, vectors = part_specs(model), weight_bytes(model) - sum(chunk_bytes(model))
    matrices = sum(chunk_bytes(model, share))
    if not model.tie_word_embeddings:
        matrices += round(share * tensor_nbytes(model.dtype, (model.vocab_size, model.hidden_size)))
    return len(specs) * DATA_ALIGNMENT + vectors + matrices


def chunk_bytes(model: Hyperparameters, share: float = 1.0) -> list[int]:
    """Bytes of the chunks of all matrices, in the order of a pass, as if all coded row groups had one size."""
    embedding, *others = part_specs(model)
    found = []
    for spec in (*others, embedding) if model.tie_word_embeddings else others:
        for shape in spec.matrices.values():
            nbytes = round(share * tensor_nbytes(model.dtype, shape))
            units = row_group_count(shape[0]) if share < 1 else shape[0]
            cuts = row_ranges(units, nbytes)
            found += [nbytes * last // units - nbytes * first // units for first, last in cuts]
    return found


def coded_share(manifest: Manifest) -> float:
    """Stored bytes of the matrices that a directory has, divided by their plain bytes: 1 if they are not coded."""
    stored = plain = 0
    for part in manifest.parts.values():
        decoded = {tensor.name: tensor.nbytes for tensor in part.decoded}
        plain += sum(decoded.values())
        stored += sum(tensor.nbytes for tensor in part.tensors if tensor.name in decoded)
    return stored / plain if plain else 1.0


def process_bytes(model: Hyperparameters, in_use: int, tokenizer_json: int = BLOOMS_TOKENIZER) -> int:
    """Bytes that the process will take before any matrix, if it takes `in_use` without tokenizer and model."""
    vectors = weight_bytes(model) - sum(chunk_bytes(model))
    return in_use + vectors + TOKENIZER_MEMORY * tokenizer_json


def limit(weights: int, streamed: int, rates: Rates, share: float = 1.0) -> float:
    """Least seconds of a pass of one row: all weights are computed, `streamed` bytes of them read."""
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
    """Forecast of a prompt and of `new_tokens` passes of one row, in `ram` bytes of which `process` are taken.

    Raises `BloomdeskError` if the RAM is too little.
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
    """Multiply-adds of a pass of `rows` rows with an empty cache; the head is applied to the last row alone."""
    E = model.hidden_size
    block = 12 * E * E * rows + 2 * E * rows * rows
    return model.n_layer * block + model.vocab_size * E
