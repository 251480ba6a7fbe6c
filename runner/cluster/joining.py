"""How the ranks come together: each lays down a card, and they begin if the cards agree.

torchrun's store may still have what an earlier attempt left there. So the rank that torchrun numbers 0 opens a round
with a name of its own, and the others lay their cards into that one until its list of cards has theirs. One that ends
before lays down why in place of its card.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from runner.cluster.group import INTERRUPTED, PATIENCE, Group, reason_of
from runner.errors import BloomdeskError, LastingFailure
from runner.format.digest import digest
from runner.format.manifest import Manifest
from runner.generation.memory_plan import Machine

INTERFACE_VARIABLE, PATIENCE_VARIABLE = "GLOO_SOCKET_IFNAME", "BLOOMDESK_PATIENCE"
# Seconds for all to start and open their slices, and for those who are still starting to hear that one has ended.
LONGEST_START, LONGEST_FAREWELL = 300.0, 30.0
# Seconds between two looks at the cards.
_LOOK = 0.02
_ROUND = "bloomdesk/round"
# What a rank lays down in place of a card, if it ends.
_ENDED = "ended"
_came = threading.Event()


@dataclass(frozen=True)
class Card:
    """What a rank says of itself. All must have the same `versions`, `source`, `form`, `shares` and options `asked`."""

    host: str
    index: int
    shares: tuple[int, ...]
    versions: str
    source: str
    form: str
    asked: Mapping[str, Any]
    machine: Machine
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @classmethod
    def of(cls, manifest: Manifest, asked: Mapping[str, Any], machine: Machine) -> Card:
        """The card of a rank with the slice of `manifest`; `asked` are the options that decide the text."""
        from importlib.metadata import version

        versions = f"bloomdesk {version('bloomdesk')}, torch {torch.__version__.split('+')[0]}"
        return cls(
            machine.name,
            manifest.slice.index,
            manifest.slice.shares,
            versions,
            source_of(manifest),
            manifest.form,
            asked,
            machine,
        )

    @property
    def identity(self) -> str:
        """What distinguishes the weights of its slice from all others."""
        return f"{self.source}, {self.form}, slice {self.index} of {self.shares}"

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Card:
        names = {each.name for each in fields(cls)}
        found = cls(**{name: value for name, value in body.items() if name in names})
        machine = Machine(**body["machine"])
        machine = replace(machine, chunks=tuple(machine.chunks))
        return replace(found, shares=tuple(found.shares), machine=machine)


def source_of(manifest: Manifest) -> str:
    """What all slices of all forms of one checkpoint have in common: its name, commit and the hashes of its shards."""
    shards = sorted({shard.sha256 for part in manifest.parts.values() for shard in part.sources})
    where = manifest.source.repo or "a local checkpoint"
    commit = f" at {manifest.source.commit[:12]}" if manifest.source.commit else ""
    identity = digest({"model": manifest.model.recorded, "shards": shards})
    return f"{where}{commit}, shards {identity[:12]}"


def join(card: Card) -> tuple[Group, list[Card]]:
    """The group of all ranks, numbered by their slices, and their cards in that order.

    Raises `BloomdeskError` that says who differs in what, and `LastingFailure` if not all of them come.
    """
    patience = _patience()
    _came.set()
    try:
        store, number, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=LONGEST_START)))
        name, laid = _meet(store, number, world, asdict(card), LONGEST_START)
    except (RuntimeError, ValueError) as error:
        raise _not_together(error) from error
    _require_nobody_ended(laid)
    cards = [Card.from_json(body) for body in laid]
    _require_agreement(cards, world)
    cards.sort(key=lambda each: each.index)
    names = [each.host for each in cards]
    group = Group(card.index, names, dist.PrefixStore(name, store), number == 0, patience)
    try:
        _connect(group)
    except RuntimeError as error:
        raise _not_together(error) from error
    return group, cards


def stay_away(reason: BaseException) -> None:
    """Tell the others why this process ends before it has come, for as long as they may still be starting."""
    if _came.is_set():
        return
    body = {_ENDED: reason_of(reason), "host": socket.gethostname(), "token": secrets.token_hex(8)}
    try:
        store, number, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=LONGEST_FAREWELL)))
        _meet(store, number, world, body, LONGEST_FAREWELL)
    except (RuntimeError, ValueError):
        return


def _not_together(error: Exception) -> LastingFailure:
    return LastingFailure(
        f"not all machines came together: {str(error).splitlines()[0][:200]}",
        "start the same command on each of them",
    )


def _patience() -> float:
    """Seconds. Raises `BloomdeskError` if the environment has something else."""
    given = os.environ.get(PATIENCE_VARIABLE, str(PATIENCE))
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise BloomdeskError(
            f"{PATIENCE_VARIABLE} is {given!r}, which is no number of seconds",
            f"set it to {PATIENCE:g} or more",
        )
    return seconds


def _meet(
    store: dist.Store, number: int, world: int, body: Mapping[str, Any], seconds: float
) -> tuple[str, list[dict[str, Any]]]:
    """The name of a new round, and what was laid into it: by all, or by some of whom one has ended."""
    if number == 0:
        return _open_round(store, world, body, seconds)
    return _enter_round(store, number, body, seconds)


def _open_round(
    store: dist.Store, world: int, body: Mapping[str, Any], seconds: float
) -> tuple[str, list[dict[str, Any]]]:
    name, deadline = secrets.token_hex(8), time.monotonic() + seconds
    store.set(_ROUND, name)
    # Its own as the others read it, too, or equal options would look different.
    laid, missing = [json.loads(json.dumps(body))], set(range(1, world))
    while missing and time.monotonic() < deadline:
        there = {number for number in missing if store.check([_place(name, number)])}
        missing -= there
        laid += [json.loads(store.get(_place(name, number))) for number in there]
        if _has_ended(laid):
            deadline = min(deadline, time.monotonic() + LONGEST_FAREWELL)
            store.set(_list(name), json.dumps(laid))
        time.sleep(_LOOK)
    if missing and not _has_ended(laid):
        raise ValueError(f"{len(missing)} of {world} have not come within {seconds:.0f} s")
    store.set(_list(name), json.dumps(laid))
    # If they disagree, this process ends, and its store may with it.
    deadline = time.monotonic() + LONGEST_FAREWELL
    while store.add(_readers(name), 0) < len(laid) - 1 and time.monotonic() < deadline:
        time.sleep(_LOOK)
    return name, laid


def _enter_round(
    store: dist.Store, number: int, body: Mapping[str, Any], seconds: float
) -> tuple[str, list[dict[str, Any]]]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        name = store.get(_ROUND).decode()
        store.set(_place(name, number), json.dumps(body))
        if store.check([_list(name)]):
            laid = json.loads(store.get(_list(name)))
            if body["token"] in [each["token"] for each in laid]:
                store.add(_readers(name), 1)
                return name, laid
        time.sleep(_LOOK)
    raise ValueError(f"no round was complete within {seconds:.0f} s")


def _has_ended(laid: Sequence[Mapping[str, Any]]) -> bool:
    return any(_ENDED in body for body in laid)


def _require_nobody_ended(laid: Sequence[Mapping[str, Any]]) -> None:
    """Raise what ended the first of those that did not come."""
    for body in laid:
        if body.get(_ENDED) == INTERRUPTED:
            raise KeyboardInterrupt
        if _ENDED in body:
            raise LastingFailure(
                f"{body['host']} has ended before all had come together: {body[_ENDED]}",
                "start the same command on all machines once that is mended",
            )


def _list(name: str) -> str:
    return f"{name}/cards"


def _readers(name: str) -> str:
    return f"{name}/readers"


def _place(name: str, number: int) -> str:
    return f"{name}/card/{number}"


def _require_agreement(cards: Sequence[Card], world: int) -> None:
    """Raise `BloomdeskError` that names the first rank that does not fit the one with the first slice."""
    first = min(cards, key=lambda each: each.index)
    for other in cards:
        for what in ("versions", "source", "form", "shares"):
            one, another = getattr(first, what), getattr(other, what)
            if one != another:
                raise _disagreement(first, other, what, one, another)
        for name in {**first.asked, **other.asked}:
            one, another = first.asked.get(name), other.asked.get(name)
            if one != another:
                raise _disagreement(first, other, name, one, another)
    _require_all_slices(cards, len(first.shares), world)


def _disagreement(first: Card, other: Card, what: str, one: object, another: object) -> BloomdeskError:
    return BloomdeskError(
        f"{other.host} (slice {other.index + 1}) and {first.host} (slice {first.index + 1}) differ in {what}: "
        f"{str(another)[:100]!r} and {str(one)[:100]!r}",
        "start the same command on each machine, with slices of one checkpoint that were made together",
    )


def _require_all_slices(cards: Sequence[Card], count: int, world: int) -> None:
    held = Counter(each.index for each in cards)
    missing = [str(index + 1) for index in range(count) if not held[index]]
    twice = [each for each in cards if held[each.index] > 1]
    if not missing and not twice and world == count:
        return
    found = f"the model is in {count} slices, and {world} machines are here"
    if twice:
        hosts = " and ".join(each.host for each in twice if each.index == twice[0].index)
        found += f"; {hosts} have the same slice, {twice[0].index + 1}"
    if missing:
        found += f"; missing: slice {', '.join(missing)}"
    raise BloomdeskError(found, "start one process for each slice: torchrun --nnodes N")


def _connect(group: Group) -> None:
    if INTERFACE_VARIABLE not in os.environ:
        os.environ[INTERFACE_VARIABLE] = _interface(alone=len(set(group.names)) == 1)
    dist.init_process_group(
        "gloo",
        store=group.store,
        rank=group.rank,
        world_size=len(group.names),
        timeout=timedelta(seconds=group.patience),
    )


def _interface(*, alone: bool) -> str:
    """The name of the network interface that leads to the machine on which torchrun's ranks meet.

    Raises `BloomdeskError` if there is none, or if it is one that no other machine reaches and this one is not `alone`.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(where)
        own = probe.getsockname()[0]
    if ipaddress.ip_address(own.partition("%")[0]).is_loopback and not alone:
        raise BloomdeskError(
            f"{address}, where all meet, has the address {own} here, which no other machine reaches",
            f"name the interface to use: {INTERFACE_VARIABLE}=eth0",
        )
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == own for each in addresses):
            return name
    raise BloomdeskError(
        f"no network interface has the address {own}, which leads to {address}",
        f"name the interface to use: {INTERFACE_VARIABLE}=eth0",
    )
