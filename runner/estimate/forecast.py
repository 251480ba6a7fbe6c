"""What a model will take of a machine: disk, RAM and seconds, from its shape and the machine's rates.

    a pass of one row   max(streamed bytes / disk, weights / memory) + blocks * SECONDS_BY_BLOCK
    the prompt's pass   max(weights / disk, weights / memory, multiply-adds / compute) + blocks * SECONDS_BY_BLOCK

The prompt's pass is the first, so it also reads what stays resident. Coded weights are fewer bytes of disk and RAM, and
their rate is the decoder's in place of the memory's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.estimate.rates import Rates
from runner.format.coded import LOSSLESS, PLAIN, row_group_count
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import DATA_ALIGNMENT, part_specs, pass_nbytes
from runner.format.manifest import Manifest
from runner.format.quantised import INT4_FORM, INT8_FORM, QUANTISED_FORMS, SCALES_SUFFIX, coding_of
from runner.format.safetensors import Shape, tensor_nbytes
from runner.format.slices import Slice, even
from runner.generation.memory_plan import MemoryPlan, MemoryRequest, memory_plan
from runner.weights.chunks import row_ranges

# The small operations between a block's products, measured with blocks whose weights weigh nothing.
SECONDS_BY_BLOCK = 0.001
# Share of a matrix's bytes that the lossless form takes; docs/performance.md says how that was measured.
LOSSLESS_SHARE = 0.67


@dataclass(frozen=True)
class Stored:
    """How matrices are stored: in a form, of which the lossless one leaves `share` of their bytes."""

    form: str = PLAIN
    share: float = 1.0

    def nbytes(self, name: str, dtype: str, shape: Shape) -> int:
        """Bytes of a matrix of a part."""
        if self.form in QUANTISED_FORMS:
            return sum(
                tensor_nbytes(of, size) for _, of, size in coding_of(self.form, name).stored(name, shape)
            )
        return round(self.share * tensor_nbytes(dtype, shape))

    def rate(self, rates: Rates) -> float:
        """Bytes of plain weights a second that a product of one row does."""
        by_form = {PLAIN: rates.memory, LOSSLESS: rates.decoded, INT8_FORM: rates.int8, INT4_FORM: rates.int4}
        return by_form[self.form]


PLAIN_STORED = Stored()
# Bytes of the process's memory for each byte of tokenizer.json, and the size of BLOOM's.
TOKENIZER_MEMORY = 13
BLOOMS_TOKENIZER = 14_500_438


@dataclass(frozen=True)
class Forecast:
    """One model in one form in one amount of RAM on one machine.

    `stored` is the form of its matrices. `limit_seconds` is the least time of a pass of one row.
    """

    memory_plan: MemoryPlan
    weight_bytes: int
    stored: Stored
    limit_seconds: float
    seconds_per_token: float
    prompt_seconds: float


def weight_bytes(model: Hyperparameters) -> int:
    """Bytes of all tensors that one pass needs."""
    return pass_nbytes(model)


def disk_bytes(model: Hyperparameters, stored: Stored = PLAIN_STORED) -> int:
    """Bytes of all parts: a page for each header, and the matrices as they are stored."""
    specs, vectors = part_specs(model), weight_bytes(model) - sum(chunk_bytes(model))
    matrices = sum(chunk_bytes(model, stored))
    if not model.tie_word_embeddings:
        shape = model.vocab_size, model.hidden_size
        matrices += stored.nbytes("word_embeddings.weight", model.dtype, shape)
    return len(specs) * DATA_ALIGNMENT + vectors + matrices


def chunk_bytes(model: Hyperparameters, stored: Stored = PLAIN_STORED, own: Slice | None = None) -> list[int]:
    """Bytes of the chunks of all matrices, in the order of a pass, as if all coded row groups had one size.

    Those of a slice are fewer.
    """
    embedding, *others = part_specs(model, own)
    found = []
    for spec in (*others, embedding) if model.tie_word_embeddings else others:
        for name, shape in spec.matrices.items():
            nbytes = stored.nbytes(name, model.dtype, shape)
            units = row_group_count(shape[0]) if stored.form == LOSSLESS else shape[0]
            cuts = row_ranges(units, nbytes)
            found += [nbytes * last // units - nbytes * first // units for first, last in cuts]
    return found


def stored_as(manifests: Sequence[Manifest]) -> Stored:
    """How the directories of a model store matrices, with the share of their plain bytes that their own take."""
    stored, plain, form = 0, 0, manifests[0].form
    for part in (part for manifest in manifests for part in manifest.parts.values()):
        decoded = {tensor.name: tensor.nbytes for tensor in part.decoded}
        plain += sum(decoded.values())
        stored += sum(
            tensor.nbytes for tensor in part.tensors if tensor.name.removesuffix(SCALES_SUFFIX) in decoded
        )
    return Stored(form, stored / plain if plain else LOSSLESS_SHARE if form == LOSSLESS else 1.0)


def process_bytes(model: Hyperparameters, in_use: int, tokenizer_json: int = BLOOMS_TOKENIZER) -> int:
    """Bytes that the process will take before any matrix, if it takes `in_use` without tokenizer and model."""
    vectors = weight_bytes(model) - sum(chunk_bytes(model))
    return in_use + vectors + TOKENIZER_MEMORY * tokenizer_json


def limit(weights: int, streamed: int, rates: Rates, stored: Stored = PLAIN_STORED) -> float:
    """Least seconds of a pass of one row: all weights are computed, `streamed` bytes of them read."""
    return max(streamed / rates.disk, weights / stored.rate(rates))


def forecast(
    model: Hyperparameters,
    ram: int,
    process: int,
    rates: Rates,
    prompt_tokens: int,
    new_tokens: int,
    stored: Stored = PLAIN_STORED,
    shares: tuple[int, ...] = even(1),
    draft: int = 0,
) -> Forecast:
    """Forecast of a prompt and of `new_tokens` passes of one row, in `ram` bytes of which `process` are taken.

    The weights are spread over as many disks as there are `shares`, and a draft model takes `draft` bytes. Raises
    `BloomdeskError` if the RAM is too little.
    """
    of_disks = [chunk_bytes(model, stored, Slice(index, shares)) for index in range(len(shares))]
    chunks = tuple(nbytes for own in of_disks for nbytes in own)
    disks = tuple(disk for disk, own in enumerate(of_disks) for _ in own)
    capacities = (prompt_tokens + new_tokens,)
    request = MemoryRequest(model, chunks, ram, process, capacities, prompt_tokens, draft=draft, disks=disks)
    return forecast_of(request, rates, stored)


def forecast_of(
    request: MemoryRequest, rates: Rates, stored: Stored = PLAIN_STORED, machines: int = 1
) -> Forecast:
    """Forecast of a prompt of as many rows as the request has, and of passes of one, on one of equal `machines`.

    What they send one another is not counted. Raises `BloomdeskError` if the RAM is too little.
    """
    model, plan = request.model, memory_plan(request)
    weights, between = weight_bytes(model) // machines, SECONDS_BY_BLOCK * model.n_layer
    least = limit(weights, plan.streamed_bytes, rates, stored)
    computed = multiplications(model, request.rows) / machines / rates.compute
    prompt = max(limit(weights, sum(request.chunks), rates, stored), computed)
    return Forecast(plan, weights, stored, least, least + between, prompt + between)


def multiplications(model: Hyperparameters, rows: int) -> int:
    """Multiply-adds of a pass of `rows` rows with an empty cache; the head is applied to the last row alone."""
    E = model.hidden_size
    block = 12 * E * E * rows + 2 * E * rows * rows
    return model.n_layer * block + model.vocab_size * E
