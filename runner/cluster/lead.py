"""Rank 0: it has the prompts, the batch and the text, and tells the others each pass before it makes its own part."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from runner.cluster import orders
from runner.cluster.gather import SliceGather
from runner.cluster.group import SECONDS_BETWEEN_SIGNS, Group
from runner.cluster.joining import Card, join
from runner.cluster.sessions import LeadSession
from runner.errors import BloomdeskError, LastingFailure
from runner.format.slice_set import own_slice
from runner.generation.memory_plan import Machine, MemoryPlan, MemoryRequest
from runner.generation.model import Model
from runner.generation.sequence import Request
from runner.model.forward import OnPart
from runner.model.kv_cache import Segment

# Passes whose waits are kept.
MOST_WAITS = 10_000


class Lead:
    """Gives the orders. Once one pass has failed, the ranks are not at one place any more, and every later one fails.

    While nothing happens, a thread asks the others for a sign of life; `on_failure` is called there if one gives none.
    """

    def __init__(self, group: Group, machines: Sequence[Machine]) -> None:
        self.group, self.machines = group, tuple(machines)
        self.numbers = orders.CacheNumbers()
        self.failure: BaseException | None = None
        self.on_failure: Callable[[BloomdeskError], None] = lambda failure: None
        # Seconds that each of the last passes has waited for others.
        self.pass_waits = deque[float](maxlen=MOST_WAITS)
        self._plan: MemoryRequest | None = None
        self._ends = threading.Event()
        self._signs = threading.Thread(target=self._ask_for_signs, name="signs of life", daemon=True)
        self._signs.start()

    def plan_for(self, plan: MemoryRequest) -> None:
        """Have the others plan their RAM for the same passes, with the next one."""
        self._plan = plan

    @contextmanager
    def giving(self, order: dict[str, Any]) -> Iterator[None]:
        """Tell the others an order, and have them until its own part is done."""
        with self.group.lock:
            if self.failure:
                raise self._lasting()
            try:
                self.group.tell(order, self.group.others)
                yield
            except BaseException as error:
                self.failure = error
                raise

    def _lasting(self) -> LastingFailure:
        if isinstance(self.failure, LastingFailure):
            return self.failure
        return LastingFailure(
            f"the machines are not together any more: {self.failure}", "start all of them again"
        )

    @contextmanager
    def making_pass(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Have the others make the pass, too."""
        order, before = orders.pass_order(segments, self.numbers, self._plan), self.group.wire.waiting_seconds
        with self.giving(order):
            self._plan = None
            yield
        self.pass_waits.append(self.group.wire.waiting_seconds - before)

    def answers(self, order: dict[str, Any]) -> list[Any]:
        """What each of the others says to an order."""
        with self.giving(order):
            return [self.group.told(each) for each in self.group.others]

    def give(self, order: dict[str, Any]) -> None:
        """Tell the others an order that has no part for rank 0."""
        with self.giving(order):
            return

    def close(self, reason: BaseException | None = None) -> None:
        """End the others: all is done, or rank 0 ends for a `reason`."""
        self._ends.set()
        reason = self.failure or reason
        if reason is None:
            self.give({"order": orders.END})
        else:
            self.group.leave(reason)

    def _ask_for_signs(self) -> None:
        between = min(SECONDS_BETWEEN_SIGNS, self.group.patience / 4)
        while not self._ends.wait(between) and not self.failure:
            if self.group.lock.acquire(blocking=False):
                try:
                    self.answers({"order": orders.SIGN})
                except BaseException:
                    self.on_failure(self._lasting())
                finally:
                    self.group.lock.release()


@dataclass(frozen=True, repr=False)
class LeadModel(Model):
    """A model of which this machine has the first slice."""

    lead: Lead
    gathering: SliceGather
    # What distinguishes these weights from all others, with the slice.
    identity: str

    @classmethod
    def join(cls, directory: Path, ram: int | None, asked: Mapping[str, Any]) -> LeadModel:
        """The model whose first slice is in `directory`, together with those who have the others.

        `asked` are the options that all must have been given. Raises what `Model.open` and `joining.join` raise.
        """
        slices = own_slice(directory)
        own = Model.of(slices, ram)
        stream, heads = own.weights.stream, len(own.weights.heads)
        machine = Machine.here(own.ram, own.process_nbytes, stream.chunks, heads)
        card = Card.of(slices.first, asked, machine)
        group, cards = join(card)
        lead = Lead(group, [replace(each.machine, name=group.title(each.index)) for each in cards[1:]])
        gathering = SliceGather(group, own.weights.model, own.weights.slice)
        parts = own.weights, own.tokenizer, own.grammars, own.ram, own.process_nbytes
        return cls(*parts, lead, gathering, card.identity)

    @property
    def gather(self) -> SliceGather:
        return self.gathering

    def memory_request(self, capacities: Iterable[int], rows: int) -> MemoryRequest:
        return replace(super().memory_request(capacities, rows), machines=self.lead.machines)

    def arrange(self, plan: MemoryPlan) -> None:
        super().arrange(plan)
        self.lead.plan_for(plan.request)

    def session(self, directory: Path, request: Request, warn: Callable[[str], None]) -> LeadSession:
        return LeadSession(directory, self.identity, request, warn, self.lead)

    def forward_all(self, segments: Sequence[Segment], on_part: OnPart | None = None) -> list[torch.Tensor]:
        with self.lead.making_pass(segments):
            return super().forward_all(segments, on_part)
