"""The ranks but 0: each makes its part of every pass that rank 0 orders, until that ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.cluster import orders
from runner.cluster.gather import LEAD, SliceGather
from runner.cluster.group import Group
from runner.generation.memory_plan import MemoryRequest, memory_plan
from runner.model.forward import ModelRunner


@dataclass(frozen=True)
class FollowingModel(ModelRunner):
    """A model of which this machine has one slice, but not the first."""

    gathering: SliceGather

    @property
    def gather(self) -> SliceGather:
        return self.gathering


class Follower:
    """Does what rank 0 orders; `own` says what this machine has of RAM and weights."""

    def __init__(self, group: Group, model: FollowingModel, own: MemoryRequest) -> None:
        self._group, self._model, self._own = group, model, own
        self._caches = orders.Caches(model.new_cache)

    def run(self) -> None:
        """Return when rank 0 says that all is done. Raises what `Group` raises, and what fails here."""
        act = {orders.PASS: self._make_pass, orders.SIGN: self._give_sign}
        try:
            while (order := self._group.told(LEAD))["order"] != orders.END:
                act[order["order"]](order)
        except BaseException as error:
            self._group.say_farewell(error)
            raise

    def _make_pass(self, order: Mapping[str, Any]) -> None:
        stream = self._model.weights.stream
        self._caches.follow(order["caches"])
        if request := orders.planned(order, self._own):
            plan = memory_plan(request)
            self._model.arrange(plan)
        self._model.forward_all(orders.segments_of(order, self._caches))

    def _give_sign(self, order: Mapping[str, Any]) -> None:
        self._group.tell(None, [LEAD])
