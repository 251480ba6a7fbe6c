"""Downloads and converts shard by shard, so that a disk need not hold the checkpoint twice.

The plan comes from the Hub's small files and the first bytes of one shard. Killed at any moment, the same command
resumes: the manifest says which parts there are, the staging directory which shards have arrived.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.coded import PLAIN
from runner.format.layout import COMPANIONS, GENERATION_CONFIG
from runner.format.manifest import Manifest, Source
from toolkit.commands.arrivals import ArrivingShards, load_staging, staged_bytes
from toolkit.commands.build import BuildPlan, Summary, carry_out
from toolkit.commands.download import read_small_file
from toolkit.commands.schedule import schedule_of
from toolkit.hub import revision as hub
from toolkit.hub.revision import Revision
from toolkit.hub.transfer import CONNECTIONS, read_range
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
) -> Summary:
    """Make a prepared directory of `repo`, or resume one: `plan_preparation` and `carry_out` in one."""
    return carry_out(plan_preparation(repo, destination, revision, form, connections, dtype), progress)


def plan_preparation(
    repo: str,
    destination: Path,
    revision: str | None = None,
    form: str = PLAIN,
    connections: int = CONNECTIONS,
    dtype: str | None = None,
    mend: frozenset[str] | None = None,
) -> BuildPlan:
    """What is to be fetched and made; nothing is written to `destination`.

    By default the `dtype` is the one that transformers would choose. `mend` are the recorded parts that are damaged or
    missing, if only these are to be made again. If `destination` has parts of `repo` already and no revision is named,
    their commit is resumed. Raises `BloomdeskError` if the Hub refuses, the repo holds no BLOOM or none that has the
    form `form`, the directory has another source or form, or the disk is too small.
    """
    existing = target.load_existing(destination)
    if existing is not None:
        # The wrong form is reported before the Hub is asked.
        target.check_form(destination, existing, form)
        if revision is None and existing.source.repo == repo:
            revision = existing.source.commit
    found = hub.resolve(repo, revision)
    chosen = hub.needed(found, lambda index: read_small_file(found, index, destination))
    companions, index, names = _read_small_files(chosen, destination)
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
            head = _head_on_the_hub(chosen, names[0])
            # Without an index the one shard holds every tensor.
            assignment = assignment or assign(head, model)
            in_dtype(head, assignment.keys, model.dtype)
        choice = choose_dtype(dtype or chosen.dtype, companions["config.json"], head)
    check_form_dtype(choice.dtype, form)
    origin = Source(chosen.repo, chosen.commit)
    fresh = Manifest(replace(model, dtype=choice.dtype), origin, form=form)
    manifest = target.resume(destination, existing, fresh, companions, mend)
    known = known_parts(destination, existing) if existing is not None else {}
    sizes = {file.path: file.size for file in chosen.files}
    schedule = schedule_of(manifest, index, assignment, sizes, mend)
    if mend is None:
        _refuse_other_shards(destination, manifest, chosen)
    load_staging(destination, chosen, schedule.shards)
    peak = schedule.peak_bytes
    to_come = peak - staged_bytes(destination, schedule.shards)
    target.require_free_space(destination, to_come, schedule.needs, companions)
    shards = ArrivingShards(destination, manifest, schedule, chosen, index, connections, choice.why)
    return BuildPlan(
        destination,
        existing,
        manifest,
        known,
        companions,
        schedule,
        shards,
        peak,
        schedule.shard_bytes,
        notes=assignment.notes if assignment is not None else (),
    )


def _refuse_other_shards(destination: Path, manifest: Manifest, chosen: Revision) -> None:
    """Raise `BloomdeskError` if parts were made from shards that are not those of the revision."""
    for shard in (shard for record in manifest.parts.values() for shard in record.sources):
        file = chosen.find(shard.file)
        if file is None or file.sha256 not in (None, shard.sha256):
            raise target.another_source(destination, f"parts of another {shard.file}")


def _read_small_files(chosen: Revision, destination: Path) -> tuple[dict[str, bytes], ShardList, list[str]]:
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
        data = read_small_file(chosen, file, destination)
        if suffix is None:
            target.check_companion(path, data)
            companions[file.path] = data
        else:
            index = ShardList((), path, parse_index(data, suffix, f"{file.path} of {chosen}"))
    return companions, index or ShardList(tuple(map(Path, names))), names


def _head_on_the_hub(revision: Revision, shard: str) -> dict[str, SourceTensor]:
    """The tensors of one shard with their dtypes, from its first bytes; `BloomdeskError` if they do not show them."""
    file = revision.find(shard)
    assert file is not None
    return read_head_of_shard(Path(shard), read_range(revision, file, 0, min(HEAD_BYTES, file.size)))
