"""A command on several machines: the one with the first slice carries it out, the others follow its passes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.cli.ram import ram_of
from runner.errors import BloomdeskError
from runner.format.manifest import load_manifest
from runner.format.slice_set import SliceSet, find_all_slices, own_slice

if TYPE_CHECKING:
    from runner.generation.model import Model

# What torchrun sets for the processes that it starts.
_WORLD_SIZE = "WORLD_SIZE"
# Of torch's machine code, which reads it when it is imported.
LOG_LEVEL_VARIABLE = "TORCH_CPP_LOG_LEVEL"


def are_several() -> bool:
    """Whether torchrun has started this process as one of several."""
    return int(os.environ.get(_WORLD_SIZE) or 1) > 1


def follows(directory: Path) -> bool:
    """Whether this process only follows another one. Raises `BloomdeskError` if it has no slice."""
    if not are_several():
        return False
    # Of a lost connection torch would write a page of its own beside the one sentence.
    os.environ.setdefault(LOG_LEVEL_VARIABLE, "ERROR")
    own = load_manifest(directory).slice
    if own is None:
        raise BloomdeskError(
            f"{directory} holds the whole model, and {os.environ[_WORLD_SIZE]} processes were started for it",
            "prepare a slice on each machine, with --slice 1/4 and so on; or run it without torchrun",
        )
    return own.index > 0


def follow(directory: Path, ram: str | None, asked: Mapping[str, Any], session: Path | None = None) -> int:
    """Exit status, after the passes that the first machine asked for; `asked` are the options of the command."""
    from runner.cluster.follow import Follower

    Follower.join(directory, ram_of(ram), asked, session).run()
    return 0


@contextmanager
def awaited() -> Iterator[None]:
    """Have the other machines know why, if this one ends before all have come together."""
    try:
        yield
    except BaseException as error:
        if are_several():
            from runner.cluster.joining import stay_away

            stay_away(error)
        raise


def slices_of(directory: Path, also: Sequence[Path] = ()) -> SliceSet:
    """The slices of a model that this process has: one of several machines its own, else all.

    Raises `BloomdeskError` if it has not all of them.
    """
    return own_slice(directory) if are_several() else find_all_slices(directory, also)


def report(model: Model) -> dict[str, object]:
    """For JSON, what passes with other machines took of the wire, and how long each waited; nothing of one machine."""
    if not are_several():
        return {}
    group = model.lead.group
    return {
        "machines": {
            "count": len(group.names),
            "bytes_sent": group.wire.sent,
            "bytes_received": group.wire.received,
            "messages": group.wire.messages,
            "waiting_seconds": group.wire.waiting_seconds,
            "pass_waiting_seconds": [round(each, 6) for each in model.lead.pass_waits],
        }
    }


@contextmanager
def opened(
    directory: Path,
    ram: str | None,
    asked: Mapping[str, Any],
    also: Sequence[Path] = (),
    on_failure: Callable[[BloomdeskError], None] = lambda failure: None,
) -> Iterator[Model]:
    """The model in a directory or, if torchrun has started several, that of all machines together.

    `also` are slices on other disks, if this machine is alone. `on_failure` is called in a thread if another machine is
    lost between passes.
    """
    if not are_several():
        import runner

        yield runner.load(directory, ram_of(ram), also=also)
        return
    from runner.cluster.lead import LeadModel

    model = LeadModel.join(directory, ram_of(ram), asked)
    model.lead.on_failure = on_failure
    try:
        yield model
    except BaseException as error:
        model.lead.close(error)
        raise
    model.lead.close()
