"""The forecast for several machines like this one: each computes its slice, and between products they gather.

a pass of one row   max(streamed bytes of a slice / disk, weights of a slice / memory) + small operations + gathers
gathers             4 in a block: SECONDS_BY_PEER for each other machine, and the bytes that one sends over its wire
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from runner.errors import BloomdeskError
from runner.estimate.forecast import PLAIN_STORED, Forecast, Stored, chunk_bytes, forecast_of
from runner.estimate.rates import Rates
from runner.format.hyperparameters import Hyperparameters
from runner.format.slices import Slice, even
from runner.generation.memory_plan import MemoryRequest
from runner.weights.checkpoint import TORCH_DTYPES

# Of one small gather, for each other machine; measured with two to four ranks that share two cores, so an upper bound.
SECONDS_BY_PEER = 0.0007
GATHERS_BY_BLOCK = 4
# Widths of what a block gathers, in hidden sizes: context, dense, dense_h_to_4h, dense_4h_to_h.
GATHERED_WIDTHS = 1 + 1 + 4 + 1


@dataclass(frozen=True)
class Network:
    """`machines` of one kind, each of which sends and receives `rate` bytes a second at once."""

    machines: int
    rate: float

    def __post_init__(self) -> None:
        if self.machines < 1 or not self.rate > 0:
            raise BloomdeskError("there must be at least one machine, and a network that carries something")

    def bytes_sent(self, model: Hyperparameters, rows: int) -> int:
        """Bytes that each machine sends for a pass of `rows` rows: its part of each gather, to each of the others."""
        row = GATHERED_WIDTHS * model.n_layer * model.hidden_size * TORCH_DTYPES[model.dtype].itemsize
        return rows * row * (self.machines - 1) // self.machines

    def gather_seconds(self, model: Hyperparameters, rows: int) -> float:
        """Seconds of all gathers of a pass, as if nothing were computed meanwhile."""
        waits = SECONDS_BY_PEER * (self.machines - 1) * GATHERS_BY_BLOCK * model.n_layer
        return waits + self.bytes_sent(model, rows) / self.rate


def forecast_machines(
    model: Hyperparameters,
    ram: int,
    process: int,
    rates: Rates,
    prompt_tokens: int,
    new_tokens: int,
    network: Network,
    stored: Stored = PLAIN_STORED,
) -> Forecast:
    """Forecast of a prompt and of `new_tokens` passes of one row, with `ram` bytes in each machine of `network`.

    Each has the first slice of equal ones, which is never the smallest. Raises `BloomdeskError` if the RAM is too
    little.
    """
    own = Slice(0, even(network.machines))
    chunks, heads = tuple(chunk_bytes(model, stored, own)), len(own.rows(model.n_head))
    capacities = (prompt_tokens + new_tokens,)
    request = MemoryRequest(model, chunks, ram, process, capacities, prompt_tokens, heads=heads)
    found = forecast_of(request, rates, stored, network.machines)
    return replace(
        found,
        seconds_per_token=found.seconds_per_token + network.gather_seconds(model, 1),
        prompt_seconds=found.prompt_seconds + network.gather_seconds(model, prompt_tokens),
    )
