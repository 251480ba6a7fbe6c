"""Downloads and converts shard by shard, so that a disk need not hold the checkpoint twice.

The plan comes from the Hub's small files and the first bytes of one shard. Killed at any moment, the same command
resumes: the manifest says which parts there are, the staging directory which shards have arrived.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import xxhash

from runner.errors import BloomdeskError
from runner.format.coded import PLAIN
from runner.format.layout import COMPANIONS, GENERATION_CONFIG, REQUIRED_COMPANIONS
from runner.format.manifest import Manifest, Source
from runner.format.slices import Slice
from toolkit.commands.arrivals import ArrivingShards
from toolkit.commands.build import BuildPlan, Destination, Summary, carry_out
from toolkit.commands.destinations import common, destination_of, kept_by_any, require_space
from toolkit.commands.download import read_small_file
from toolkit.commands.placement import Placement, placed, resumed
from toolkit.commands.schedule import Schedule, schedule_of
from toolkit.commands.staged_rows import StagedRows, excerpt_sizes
from toolkit.commands.staged_shards import StagedShards, is_staging, staged_bytes
from toolkit.hub import revision as hub
from toolkit.hub.line import Line
from toolkit.hub.record import load_record
from toolkit.hub.revision import Revision
from toolkit.hub.transfer import CONNECTIONS, read_range
from toolkit.io.disk import read_if_exists, require_large_files
from toolkit.io.progress import Progress, silent
from toolkit.parts import destination as target
from toolkit.parts.manifest_backup import known_parts
from toolkit.parts.part import check_form_dtype
from toolkit.source.config import decode_config, with_ends_of_text
from toolkit.source.dtype import choose_dtype, in_dtype
from toolkit.source.index import FORMS, ShardList, parse_index
from toolkit.source.key_map import assign
from toolkit.source.shards import HEAD_BYTES, read_head_of_shard
from toolkit.source.tensor import SourceTensor


def prepare(
    repo: str,
    destination: Path,
    revision: str | None = None,
    progress: Progress = silent,
    connections: int = CONNECTIONS,
    *,
    form: str = PLAIN,
    dtype: str | None = None,
    line: Line | None = None,
    own: Slice | None = None,
    also: Sequence[Path] = (),
    shares: Sequence[int] = (),
    check_whole: bool = False,
) -> Summary:
    """Make a prepared directory of `repo`, or resume one: `plan_preparation` and `carry_out` in one.

    With a slice `own` only the bytes of its rows are fetched; with `check_whole` all of them come by, once. With
    directories `also` each of them gets a slice, and the first is that of `destination`, by their `shares`.
    """
    placement = placed(destination, own, also, shares)
    plan = plan_preparation(
        repo,
        destination,
        revision,
        form,
        connections,
        dtype,
        line=line,
        placement=placement,
        check_whole=check_whole,
    )
    return carry_out(plan, progress)


def plan_preparation(
    repo: str,
    destination: Path,
    revision: str | None = None,
    form: str = PLAIN,
    connections: int = CONNECTIONS,
    dtype: str | None = None,
    mend: frozenset[str] | None = None,
    line: Line | None = None,
    placement: Placement | None = None,
    check_whole: bool = False,
) -> BuildPlan:
    """What is to be fetched and made; nothing is written to `destination`, nor to those beside it in `placement`.

    If that is one slice, only the bytes of its rows are fetched. With `check_whole` its shards are read through all the
    same, and so are those of parts that were made without.

    By default the `dtype` is the one that transformers would choose. `mend` are the recorded parts that are damaged or
    missing, if only these are to be made again. If `destination` has parts of `repo` already and no revision is named,
    their commit is resumed; if all are there, the Hub is not asked. Raises `BloomdeskError` if the Hub refuses, the
    repo holds no BLOOM or none that has the form `form`, the directory has another source or form, or the disk is too
    small.
    """
    existing = target.load_existing(destination)
    if existing is not None:
        # The wrong form is reported before the Hub is asked.
        target.check_form(destination, existing, form)
    if placement is None:
        placement = placed(destination) if mend is None else resumed(destination, existing)
    line, named = line or Line(), revision is not None and mend is None
    if existing is not None and existing.source.repo == repo:
        revision = revision or existing.source.commit
        has_more_to_do = check_whole and existing.unproven_shards
        if mend is None and revision.lower() == existing.source.commit and not has_more_to_do:
            whole = _plan_of_nothing(placement, existing, dtype, line)
            if whole is not None:
                return whole
    found = hub.resolve(repo, revision, line, named=named)
    _refuse_other_commit(destination, existing, found, revision)
    chosen = hub.needed(found, lambda index: read_small_file(found, index, destination, line))
    companions, index, names = _read_small_files(chosen, destination, line)
    model = decode_config(Path("config.json"), companions["config.json"], "BF16")
    model = with_ends_of_text(model, Path(GENERATION_CONFIG), companions.get(GENERATION_CONFIG))
    if mend is not None and existing is not None:
        companions = target.recorded_alone(existing, companions)
        model = replace(model, eos_token_id=existing.model.eos_token_id)
    if target.is_untied(existing):
        model = replace(model, tie_word_embeddings=False)
    assignment = assign(index.weight_map, model) if index.weight_map is not None else None
    choice = target.dtype_to_resume(destination, existing, dtype)
    if choice is None:
        head = {}
        if chosen.dtype is None:
            head = _head_on_the_hub(chosen, names[0], line)
            # Without an index the one shard holds every tensor.
            assignment = assignment or assign(head, model)
            in_dtype(head, assignment.keys, model.dtype)
        choice = choose_dtype(dtype or chosen.dtype, companions["config.json"], head)
    check_form_dtype(choice.dtype, form)
    origin = Source(chosen.repo, chosen.commit)
    fresh = Manifest(replace(model, dtype=choice.dtype), origin, form=form)
    destinations = tuple(
        destination_of(placement, directory, target.load_existing(directory), fresh, companions, mend)
        for directory in placement.directories
    )
    if mend is None:
        _refuse_other_shards(destination, kept_by_any(destinations), chosen)
    own, to_prove = common(destinations).slice, frozenset[str]()
    if check_whole and own is not None:
        destinations, to_prove = _without_unproven(destinations)
    manifest = common(destinations)
    sizes = {file.path: file.size for file in chosen.files}
    schedule = schedule_of(manifest, index, assignment, sizes, mend)
    staged = (destination, chosen, schedule.shards, index, connections, line)
    staging: StagedShards | StagedRows = StagedShards(*staged)
    bytes_to_fetch = schedule.shard_bytes
    if own is not None:
        staging = StagedRows(*staged, model=manifest.model, own=own, whole=check_whole)
        excerpts = excerpt_sizes(manifest.model, own, index, assignment, sizes)
        schedule = replace(
            schedule,
            shard_sizes=excerpts,
            part_sizes={**schedule.part_sizes, **dict.fromkeys(to_prove, 0)},
        )
        bytes_to_fetch = bytes_to_fetch if check_whole else schedule.shard_bytes
    staging.load()
    peak = _require_space(destinations, schedule, companions)
    return BuildPlan(
        destinations,
        companions,
        schedule,
        ArrivingShards(staging, manifest, schedule, index, choice.why),
        peak,
        bytes_to_fetch,
        to_prove=to_prove,
        notes=assignment.notes if assignment is not None else (),
    )


def _without_unproven(
    destinations: tuple[Destination, ...],
) -> tuple[tuple[Destination, ...], frozenset[str]]:
    """The directory of one slice without the parts that were made from rows of unproven shards; and these parts.

    What such a part was made from need not be what a new one in its place is made from.
    """
    (only,) = destinations
    to_prove = frozenset(file for file, record in only.manifest.parts.items() if not record.is_proven)
    parts = {file: record for file, record in only.manifest.parts.items() if file not in to_prove}
    known = {file: record for file, record in only.known.items() if record.is_proven or file in to_prove}
    return (replace(only, manifest=replace(only.manifest, parts=parts), known=known),), to_prove


def _require_space(
    destinations: Sequence[Destination], schedule: Schedule, companions: Mapping[str, bytes]
) -> int:
    """The most bytes of disk at any time; `BloomdeskError` if a disk has too few. Shards arrive on the first one."""
    first, *others = destinations
    # Parts that only the others lack take nothing of it.
    sizes = {file: 0 for file in schedule.needs} | schedule.of(first.manifest).needed_sizes
    own = replace(schedule, part_sizes=sizes)
    require_large_files(first.directory, sizes | {shard: own.shard_sizes[shard] for shard in own.shards})
    to_come = own.peak_bytes - staged_bytes(first.directory, own.shards)
    target.require_free_space(first.directory, to_come, own.needs, companions)
    return own.peak_bytes + (require_space(others, schedule, companions) if others else 0)


def _plan_of_nothing(
    placement: Placement, existing: Manifest, dtype: str | None, line: Line
) -> BuildPlan | None:
    """The plan for directories to which nothing is missing, made without the Hub, or None if they are not such."""
    destination, found = placement.directories[0], []
    companions: dict[str, bytes] = {}
    for directory in placement.directories:
        held = target.load_existing(directory)
        if held is None or held.slice != placement.slices[directory] or held.source != existing.source:
            return None
        small = _small_files_of(directory, held)
        if small is None or target.missing_parts(target.drop_missing(directory, held)):
            return None
        companions |= small
        found.append(Destination(directory, held, held, known_parts(directory, held)))
    kept_by_any(found)
    target.dtype_to_resume(destination, existing, dtype)
    staging, left = destination / target.STAGING, None
    if os.path.lexists(staging):
        # Shards that an earlier run has left are deleted by what its record says of them.
        with suppress(BloomdeskError):
            left = load_record(staging) if is_staging(staging) else None
        if left is None or left.commit != existing.source.commit:
            return None
    source = existing.source
    chosen = left.revision if left is not None else Revision(source.repo or "", source.commit or "", ())
    schedule = schedule_of(existing, ShardList(()), None, {})
    staging = StagedShards(destination, chosen, (), ShardList(()), CONNECTIONS, line)
    shards = ArrivingShards(staging, existing, schedule, ShardList(()))
    return BuildPlan(tuple(found), companions, schedule, shards, peak_bytes=0)


def _small_files_of(directory: Path, manifest: Manifest) -> dict[str, bytes] | None:
    """The small files of a directory, or None if one is not the recorded one, or one that is needed is missing."""
    companions = {}
    for name, record in manifest.companions.items():
        data = read_if_exists(directory / name, target.LARGEST_COMPANION)
        if data is None or xxhash.xxh3_128_hexdigest(data) != record.xxh3_128:
            return None
        companions[name] = data
    return companions if companions.keys() >= set(REQUIRED_COMPANIONS) else None


def _refuse_other_commit(
    destination: Path, existing: Manifest | None, found: Revision, revision: str | None
) -> None:
    """Raise `BloomdeskError` if the directory has parts of another commit of the same repo: a branch moves."""
    if existing is not None and existing.parts and existing.source.repo == found.repo:
        held = existing.source.commit or ""
        if held != found.commit:
            raise BloomdeskError(
                f"{destination} was started from another source: it has parts of {found.repo} at {held[:12]}, "
                f"and --revision {revision} is {found.commit[:12]} now",
                "leave out --revision to resume it, or give a new directory",
            )


def _refuse_other_shards(destination: Path, manifest: Manifest, chosen: Revision) -> None:
    """Raise `BloomdeskError` if parts were made from shards that are not those of the revision."""
    for shard in (shard for record in manifest.parts.values() for shard in record.sources):
        file = chosen.find(shard.file)
        if file is None or file.sha256 not in (None, shard.sha256):
            raise target.another_source(destination, f"parts of another {shard.file}")


def _read_small_files(
    chosen: Revision, destination: Path, line: Line
) -> tuple[dict[str, bytes], ShardList, list[str]]:
    """The small files that a prepared directory has, the index, and the names of the shards; all stays in memory."""
    companions, names, index = {}, [], None
    for file in chosen.files:
        path = Path(file.path)
        suffix = next((suffix for name, _, suffix in FORMS if name == file.path), None)
        if suffix is None and file.path not in COMPANIONS:
            names.append(file.path)
            continue
        if file.size > target.LARGEST_COMPANION:
            raise BloomdeskError(
                f"{file.path} of {chosen} has {file.size:,} bytes: no such file is that large"
            )
        data = read_small_file(chosen, file, destination, line)
        if suffix is None:
            target.check_companion(path, data)
            companions[file.path] = data
        else:
            index = ShardList((), path, parse_index(data, suffix, f"{file.path} of {chosen}"))
    return companions, index or ShardList(tuple(map(Path, names))), names


def _head_on_the_hub(revision: Revision, shard: str, line: Line) -> dict[str, SourceTensor]:
    """The tensors of one shard with their dtypes, from its first bytes; `BloomdeskError` if they do not show them."""
    file = revision.find(shard)
    assert file is not None
    return read_head_of_shard(Path(shard), read_range(revision, file, 0, min(HEAD_BYTES, file.size), line))
