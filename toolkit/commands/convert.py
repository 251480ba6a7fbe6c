"""Re-splits a checkpoint on disk into a prepared directory; all of it is checked before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.coded import PLAIN
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import GENERATION_CONFIG
from runner.format.manifest import Manifest, Source
from runner.format.quantised import QUANTISED_FORMS
from toolkit.commands.build import BuildPlan, Summary, carry_out, plan_source_part
from toolkit.commands.convert_prepared import is_prepared, plan_from_prepared
from toolkit.commands.schedule import Schedule, schedule_of
from toolkit.commands.shards_on_disk import KEEP_SOURCE, ShardsOnDisk, deletable, state_of
from toolkit.commands.vouched import Vouched, read_companions, vouched, with_samples
from toolkit.io.disk import require_large_files
from toolkit.io.progress import Progress, silent
from toolkit.parts import destination as target
from toolkit.parts.comparison import comparisons_of
from toolkit.parts.manifest_backup import known_parts
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
) -> Summary:
    """Make a prepared directory of the checkpoint in `source`, or resume one of the same source and form.

    The source may be a prepared directory itself, plain or lossless. The LoRA adapter in the directory `adapter` is
    merged into the weights as peft's merge_and_unload does it.

    Raises `BloomdeskError` before anything is written if the source is not a complete, sound BLOOM, the adapter can't
    be merged, or the destination can't take it; and later if a shard is not what the download recorded, or the disk
    fails. What is finished then stays, and the same call resumes from it.
    """
    return carry_out(plan_conversion(source, destination, form=form, dtype=dtype, adapter=adapter), progress)


def plan_conversion(
    source: Path,
    destination: Path,
    *,
    delete_source: bool = False,
    form: str = PLAIN,
    dtype: str | None = None,
    adapter: Path | None = None,
    mend: frozenset[str] | None = None,
) -> BuildPlan:
    """Everything that `convert` checks before it writes; it writes nothing.

    By default the `dtype` is the one that transformers would choose. With `delete_source` each shard is deleted as
    soon as the parts made from it are on disk and checked. `mend` are the recorded parts that are damaged or missing,
    if only these are to be made again.
    """
    asked = _Asked(source, destination, delete_source, form, dtype, adapter, mend)
    try:
        return _plan(asked)
    except UntiedHead:
        return _plan(replace(asked, is_untied=True))


@dataclass(frozen=True)
class _Asked:
    """What `plan_conversion` was asked for; `is_untied` if the head has turned out not to be the embedding."""

    source: Path
    destination: Path
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
        raise BloomdeskError(f"{source} is not a directory", "download a checkpoint: bloomdesk download")
    if os.path.realpath(source) == os.path.realpath(destination):
        raise BloomdeskError(f"{destination} is the source itself", "give another directory to write to")
    if is_prepared(source):
        if asked.delete_source or asked.adapter is not None:
            option = "--adapter" if asked.adapter is not None else "--delete-source"
            raise BloomdeskError(
                f"{source} is prepared already, and {option} is for checkpoints", f"leave out {option}"
            )
        return plan_from_prepared(source, destination, asked.form, asked.dtype, mend)
    refuse_foreign(source)
    existing, model, companions = _small_files(asked)
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
    manifest = target.resume(destination, existing, fresh, companions, mend)
    notes = _notes(shards, assignment, tensors.values(), adapter, chosen.why)
    if mend is None and target.missing_parts(manifest) and not (known.is_recorded and adapter is None):
        others = adapter.files if adapter is not None else ()
        manifest, about_samples = with_samples(destination, manifest, shards, others)
        notes += about_samples
    schedule = schedule_of(
        manifest, shards, assignment, {path.name: size for path, (size, *_) in seen.items()}, mend
    )
    parts, comparisons = {}, ()
    if assignment is not None:
        parts = _plan_parts(schedule, manifest, shards, tensors, assignment, known.tensors)
        comparisons = comparisons_of(manifest, assignment, tensors) if mend is None else ()
    to_delete = ()
    if asked.delete_source:
        _refuse_loss(asked, tensors.values(), adapter, chosen.why)
        to_delete = deletable(shards)
    peak = schedule.growth(frozenset(path.name for path in to_delete))
    require_large_files(destination, {file: schedule.part_sizes[file] for file in schedule.needs})
    target.require_free_space(destination, peak, schedule.needs, companions)
    # The hashes of the tensors tell whether what mends is the recorded source.
    sha256 = known.shards if mend is None else {}
    return BuildPlan(
        destination,
        existing,
        manifest,
        known_parts(destination, existing) if existing is not None else {},
        companions,
        schedule,
        ShardsOnDisk(parts, sha256, to_delete, seen, shards.place),
        peak,
        comparisons=comparisons,
        notes=notes,
    )


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
