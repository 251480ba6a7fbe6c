"""Re-splits a checkpoint on disk into a prepared directory; all of it is checked before anything is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.coded import PLAIN
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import GENERATION_CONFIG
from runner.format.manifest import Manifest, Source
from runner.format.quantised import QUANTISED_FORMS
from runner.format.slices import Slice
from toolkit.commands.build import BuildPlan, Destination, Summary, carry_out, plan_source_part
from toolkit.commands.convert_prepared import is_prepared, plan_from_prepared
from toolkit.commands.destinations import common, destination_of, kept_by_any, require_space
from toolkit.commands.placement import Placement, placed, resumed
from toolkit.commands.schedule import Schedule, schedule_of
from toolkit.commands.shards_on_disk import KEEP_SOURCE, ShardsOnDisk, deletable, state_of
from toolkit.commands.vouched import Vouched, read_companions, vouched, with_samples
from toolkit.io.progress import Progress, silent
from toolkit.parts import destination as target
from toolkit.parts.comparison import comparisons_of
from toolkit.parts.part import PlannedPart, check_form_dtype
from toolkit.parts.part_writer import UntiedHead
from toolkit.source.adapter import Adapter, read_adapter
from toolkit.source.config import read_config, with_ends_of_text
from toolkit.source.dtype import choose_dtype, in_dtype, rounding_notes
from toolkit.source.index import NoWeights, ShardList, find_shards, refuse_foreign
from toolkit.source.key_map import Assignment, assign
from toolkit.source.shards import read_listed
from toolkit.source.tensor import SourceTensor


def convert(
    source: Path,
    destination: Path,
    progress: Progress = silent,
    *,
    form: str = PLAIN,
    dtype: str | None = None,
    adapter: Path | None = None,
    own: Slice | None = None,
    also: Sequence[Path] = (),
    shares: Sequence[int] = (),
) -> Summary:
    """Make a prepared directory of the checkpoint in `source`, or resume one of the same source and form.

    The source may be a prepared directory itself, plain or lossless. The LoRA adapter in the directory `adapter` is
    merged into the weights as peft's merge_and_unload does it. With a slice `own` only its rows are stored; with
    directories `also` each of them gets a slice, and the first is that of `destination`, by their `shares`.

    Raises `BloomdeskError` before anything is written if the source is not a complete, sound BLOOM, the adapter can't
    be merged, or the destination can't take it; and later if a shard is not what the download recorded, or the disk
    fails. What is finished then stays, and the same call resumes from it.
    """
    placement = placed(destination, own, also, shares)
    plan = plan_conversion(source, destination, form=form, dtype=dtype, adapter=adapter, placement=placement)
    return carry_out(plan, progress)


def plan_conversion(
    source: Path,
    destination: Path,
    *,
    delete_source: bool = False,
    form: str = PLAIN,
    dtype: str | None = None,
    adapter: Path | None = None,
    mend: frozenset[str] | None = None,
    placement: Placement | None = None,
) -> BuildPlan:
    """Everything that `convert` checks before it writes; it writes nothing.

    By default the `dtype` is the one that transformers would choose. With `delete_source` each shard is deleted as
    soon as the parts made from it are on disk and checked. `mend` are the recorded parts that are damaged or missing,
    if only these are to be made again. `placement` is that of `destination` and others, if it gets a slice.
    """
    placement = placement or placed(destination)
    asked = _Asked(source, destination, placement, delete_source, form, dtype, adapter, mend)
    try:
        return _plan(asked)
    except UntiedHead:
        return _plan(replace(asked, is_untied=True))


@dataclass(frozen=True)
class _Asked:
    """What `plan_conversion` was asked for; `is_untied` if the head has turned out not to be the embedding."""

    source: Path
    destination: Path
    placement: Placement
    delete_source: bool
    form: str
    dtype: str | None
    adapter: Path | None
    mend: frozenset[str] | None
    is_untied: bool = False


def _plan(asked: _Asked) -> BuildPlan:
    """The plan; `UntiedHead` if the head is found not to be the embedding."""
    source, destination, mend = asked.source, asked.destination, asked.mend
    if not source.is_dir():
        raise BloomdeskError(
            f"{source} is not a directory",
            "give that of a checkpoint; bloomdesk download REPO DIR fetches one",
        )
    for each in asked.placement.directories:
        if os.path.realpath(source) == os.path.realpath(each):
            raise BloomdeskError(f"{each} is the source itself", "give another directory to write to")
    if is_prepared(source):
        if asked.delete_source or asked.adapter is not None:
            option = "--adapter" if asked.adapter is not None else "--delete-source"
            raise BloomdeskError(
                f"{source} is prepared already, and {option} is for checkpoints", f"leave out {option}"
            )
        return plan_from_prepared(source, asked.placement, asked.form, asked.dtype, mend)
    refuse_foreign(source)
    existing, model, companions = _small_files(asked)
    if mend is not None:
        asked = replace(asked, placement=resumed(destination, existing))
    shards = _find_shards(source, destination, existing, mend)
    seen = {path: state_of(shards.place(path)) for path in shards.files}
    tensors = read_listed(shards)
    # There are no keys only if a single file is gone, and everything is made.
    keys = shards.weight_map or tensors
    assignment = assign(keys, model) if keys or existing is None else None
    chosen = target.dtype_to_resume(destination, existing, asked.dtype)
    if chosen is None:
        first = {key: tensor for key, tensor in tensors.items() if tensor.file == shards.files[0]}
        chosen = choose_dtype(asked.dtype, companions["config.json"], first)
    model = replace(model, dtype=chosen.dtype)
    check_form_dtype(chosen.dtype, asked.form)
    tensors = in_dtype(tensors, assignment.keys if assignment is not None else (), chosen.dtype)
    known = vouched(source, shards, companions)
    adapter = _adapter(asked, assignment)
    if adapter is not None and assignment is not None:
        tensors = adapter.applied(tensors, assignment.plain_names(model))
        seen[adapter.file] = state_of(adapter.file)
    fresh = Manifest(model, _origin(asked, existing, known), form=asked.form)
    notes = _notes(shards, assignment, tensors.values(), adapter, chosen.why)
    sampled = None
    if mend is None and not (known.is_recorded and adapter is None):
        others = adapter.files if adapter is not None else ()
        sampled = partial(with_samples, shards=shards, others=others)
    destinations, about_samples = _destinations(asked, existing, fresh, companions, sampled)
    manifest = common(destinations)
    schedule = schedule_of(
        manifest, shards, assignment, {path.name: size for path, (size, *_) in seen.items()}, mend
    )
    parts, comparisons = {}, ()
    if assignment is not None:
        parts = _plan_parts(schedule, manifest, shards, tensors, assignment, known.tensors)
        if mend is None:
            comparisons = comparisons_of(kept_by_any(destinations), assignment, tensors)
    to_delete = ()
    if asked.delete_source:
        _refuse_loss(asked, tensors.values(), adapter, chosen.why)
        to_delete = deletable(shards)
    names = frozenset(path.name for path in to_delete)
    peak = require_space(destinations, schedule, companions, names, source)
    # The hashes of the tensors tell whether what mends is the recorded source.
    sha256 = known.shards if mend is None else {}
    return BuildPlan(
        destinations,
        companions,
        schedule,
        ShardsOnDisk(parts, sha256, to_delete, seen, shards.place),
        peak,
        comparisons=comparisons,
        notes=notes + about_samples,
    )


def _destinations(
    asked: _Asked,
    existing: Manifest | None,
    fresh: Manifest,
    companions: Mapping[str, bytes],
    sampled: Callable[[Path, Manifest], tuple[Manifest, tuple[str, ...]]] | None,
) -> tuple[tuple[Destination, ...], tuple[str, ...]]:
    """The directories to make, the first of which has the manifest `existing`, and sentences for the user.

    `sampled` adds samples of the shards to a manifest.
    """
    found, notes = [], ()
    for directory in asked.placement.directories:
        held = existing if directory == asked.destination else target.load_existing(directory)
        each = destination_of(asked.placement, directory, held, fresh, companions, asked.mend)
        if sampled is not None and target.missing_parts(each.manifest):
            manifest, notes = sampled(directory, each.manifest)
            each = replace(each, manifest=manifest)
        found.append(each)
    return tuple(found), notes


def _small_files(asked: _Asked) -> tuple[Manifest | None, Hyperparameters, dict[str, bytes]]:
    """The destination's manifest, and the source's model and small files; a wrong architecture is reported first."""
    model = read_config(asked.source / "config.json", "BF16")
    companions = read_companions(asked.source)
    existing = target.load_existing(asked.destination)
    model = with_ends_of_text(model, asked.source / GENERATION_CONFIG, companions.get(GENERATION_CONFIG))
    if asked.mend is not None and existing is not None:
        companions = target.recorded_alone(existing, companions)
        model = replace(model, eos_token_id=existing.model.eos_token_id)
    if asked.is_untied or target.is_untied(existing):
        model = replace(model, tie_word_embeddings=False)
    return existing, model, companions


def _adapter(asked: _Asked, assignment: Assignment | None) -> Adapter | None:
    """The adapter to merge; `BloomdeskError` if it is not sound, or there is nothing to merge it into."""
    if asked.adapter is None:
        return None
    adapter = read_adapter(asked.adapter)
    if assignment is None:
        raise BloomdeskError(
            f"{asked.source} has no shards any more, so nothing can be compared with {asked.destination}, nor merged",
            "leave out --adapter",
        )
    return adapter


def _origin(asked: _Asked, existing: Manifest | None, known: Vouched) -> Source:
    """Repo and commit that the manifest names."""
    if asked.adapter is not None and asked.mend is None:
        # The Hub has no such weights.
        return Source()
    is_older = existing is not None and existing.source.repo is None and not known.is_recorded
    # A repair keeps what is recorded; a version that did not know the Hub's cache has recorded nothing of it.
    return existing.source if existing is not None and (asked.mend is not None or is_older) else known.origin


def _notes(
    shards: ShardList,
    assignment: Assignment | None,
    tensors: Iterable[SourceTensor],
    adapter: Adapter | None,
    why: str,
) -> tuple[str, ...]:
    """What the user should know of the source."""
    found = [*(assignment.notes if assignment is not None else ()), *rounding_notes(tensors, why)]
    if not shards.files:
        found.append("the source has no shards any more, so nothing was compared with them")
    if adapter is not None:
        found.append(f"{adapter.path} is merged into the weights; it was trained on {adapter.base}")
    return tuple(found)


def _refuse_loss(asked: _Asked, tensors: Iterable[SourceTensor], adapter: Adapter | None, why: str) -> None:
    """Raise `BloomdeskError` if the source could not be had back from what is made of it."""
    source = asked.source
    if not asked.placement.is_whole:
        raise BloomdeskError(f"the other slices of {source} are made elsewhere, and need it", KEEP_SOURCE)
    if asked.form in QUANTISED_FORMS:
        raise BloomdeskError(f"the weights of {source} can't be had back from {asked.form}", KEEP_SOURCE)
    if rounding := rounding_notes(tensors, why):
        raise BloomdeskError(f"{rounding[0]}; with the source the bits would be lost", KEEP_SOURCE)
    if adapter is not None:
        raise BloomdeskError(f"the weights of {source} can't be had back from merged ones", KEEP_SOURCE)


def _find_shards(
    source: Path, destination: Path, existing: Manifest | None, mend: frozenset[str] | None
) -> ShardList:
    """The source's shards; those that parts were made from may be gone, all of them once everything is made."""
    if existing is None:
        return find_shards(source)
    made_from = {shard.file for record in existing.parts.values() for shard in record.sources}
    try:
        return find_shards(source, made_from)
    except NoWeights:
        if mend or target.missing_parts(target.drop_missing(destination, existing)):
            raise
        return ShardList(())


def _plan_parts(
    schedule: Schedule,
    manifest: Manifest,
    shards: ShardList,
    tensors: Mapping[str, SourceTensor],
    assignment: Assignment,
    exported: Mapping[str, str],
) -> dict[str, PlannedPart]:
    """The parts to make; `BloomdeskError` if a shard of one is gone or a tensor does not fit.

    `exported` are the hashes that tensors have by the record of an export.
    """
    parts = {}
    for file in schedule.needs:
        keys = assignment.parts[file].values()
        gone = [key for key in keys if key not in tensors]
        if gone:
            shard = (shards.weight_map or {})[gone[0]]
            raise BloomdeskError(
                f"{shard} is missing, and {file} must be made from it",
                "run the download again: it fetches what is missing and nothing else",
            )
        part = plan_source_part(file, manifest, assignment, tensors)
        parts[file] = replace(part, hashes={key: exported[key] for key in keys if key in exported})
    return parts
