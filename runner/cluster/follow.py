"""The ranks but 0: each makes its part of every pass that rank 0 orders, until that ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.cluster import orders
from runner.cluster.gather import LEAD, SliceGather
from runner.cluster.group import Group
from runner.cluster.joining import Card, join
from runner.cluster.sessions import FollowerSession
from runner.format.slice_set import own_slice
from runner.generation.memory_plan import Machine, MemoryRequest, default_total, memory_plan
from runner.model.forward import ModelRunner
from runner.system import memory
from runner.weights.checkpoint import Weights


@dataclass(frozen=True)
class FollowingModel(ModelRunner):
    """A model of which this machine has one slice, but not the first."""

    gathering: SliceGather

    @property
    def gather(self) -> SliceGather:
        return self.gathering


class Follower:
    """Does what rank 0 orders; `own` says what this machine has of RAM and weights."""

    def __init__(
        self, group: Group, model: FollowingModel, own: MemoryRequest, session: FollowerSession | None = None
    ) -> None:
        self._group, self._model, self._own, self._session = group, model, own, session
        self._caches = orders.Caches(model.new_cache)

    @classmethod
    def join(
        cls, directory: Path, ram: int | None, asked: Mapping[str, Any], session: Path | None = None
    ) -> Follower:
        """A follower with the slice in `directory`, which keeps its positions in the directory `session`.

        `asked` are the options that all must have been given.

        Raises what `Weights.open` and `joining.join` raise.
        """
        memory.give_freed_memory_back()
        slices = own_slice(directory)
        weights = Weights.of(slices)
        own = Machine.here(
            ram or default_total(), memory.memory_in_use(), weights.stream.chunks, len(weights.heads)
        )
        card = Card.of(slices.first, asked, own)
        kept = FollowerSession(session, card.identity) if session else None
        group, _ = join(card)
        model = FollowingModel(weights, SliceGather(group, weights.model, weights.slice))
        request = MemoryRequest(weights.model, own.chunks, own.ram, own.process, (1,), 1, heads=own.heads)
        return cls(group, model, request, kept)

    def run(self) -> None:
        """Return when rank 0 says that all is done. Raises what `Group` raises, and what fails here."""
        act = {
            orders.PASS: self._make_pass,
            orders.SIGN: self._give_sign,
            orders.SESSION: self._say_positions,
            orders.KEEP: self._keep,
            orders.FILL: self._fill,
            orders.SAVE: self._save,
        }
        try:
            while (order := self._group.told(LEAD))["order"] != orders.END:
                act[order["order"]](order)
        except BaseException as error:
            self._group.leave(error)
            raise

    def _make_pass(self, order: Mapping[str, Any]) -> None:
        self._caches.follow(order["caches"])
        if request := orders.planned(order, self._own):
            self._model.arrange(memory_plan(replace(request, keep=self._model.weights.stream.resident)))
        self._model.forward_all(orders.segments_of(order, self._caches))

    def _give_sign(self, order: Mapping[str, Any]) -> None:
        self._group.tell(None, [LEAD])

    def _say_positions(self, order: Mapping[str, Any]) -> None:
        self._group.tell(self._session.stops(order["ids"]), [LEAD])

    def _keep(self, order: Mapping[str, Any]) -> None:
        self._session.keep(order["positions"])

    def _fill(self, order: Mapping[str, Any]) -> None:
        self._caches.follow(order["caches"])
        self._session.fill(self._caches.at(order["cache"], 0))

    def _save(self, order: Mapping[str, Any]) -> None:
        self._session.save(self._caches[order["cache"]], order["records"])
