"""Re-splits a checkpoint on disk into a prepared directory; all of it is checked before anything is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import xxhash

from runner.errors import BloomdeskError
from runner.format.coded import PLAIN
from runner.format.layout import COMPANIONS, GENERATION_CONFIG
from runner.format.manifest import Manifest, Source, SourceShard
from toolkit.commands.build import BuildPlan, Summary, carry_out, plan_source_part
from toolkit.commands.schedule import Schedule, schedule_of
from toolkit.hub.hub_cache import blob_name, is_blob, snapshot_of
from toolkit.hub.record import RECORD, load_record
from toolkit.hub.revision import HubFile
from toolkit.io.disk import read_errors, read_if_exists, require_large_files
from toolkit.io.hasher import ShardHashes
from toolkit.io.progress import Progress, silent
from toolkit.parts import destination as target
from toolkit.parts.comparison import comparisons_of
from toolkit.parts.export_record import load_export_record, not_as_exported
from toolkit.parts.manifest_backup import known_parts
from toolkit.parts.part import PlannedPart, check_form_dtype
from toolkit.parts.part_writer import UntiedHead
from toolkit.source.adapter import CONFIG, read_adapter
from toolkit.source.config import read_config, with_ends_of_text
from toolkit.source.dtype import choose_dtype, in_dtype, rounding_notes
from toolkit.source.index import NoWeights, ShardList, find_shards, refuse_foreign
from toolkit.source.key_map import Assignment, assign
from toolkit.source.lfs import fetch_command
from toolkit.source.sample import sample
from toolkit.source.shards import read_listed
from toolkit.source.tensor import SourceTensor
from toolkit.source.torch_zip import names_beside_state

FETCH_AGAIN = "run the same bloomdesk download again: it fetches what is wrong and nothing else"
CHECK_AGAIN = "run the same bloomdesk download again with --check: it fetches what is wrong and nothing else"
KEEP_SOURCE = "convert without --delete-source"
# Size, time of the last change, that of the last change of anything, and number in the file system.
State = tuple[int, int, int, int]


@dataclass
class ShardsOnDisk:
    """The shards of a checkpoint on disk, hashed in a thread while parts are made from them.

    `parts` are the planned parts by file name, in the order of a pass, `sha256` the hashes known beforehand,
    `deletable` the shards to delete once no part needs them, and `seen` each shard's state when its tensors were
    listed. `place` is where a shard's bytes lie.
    """

    parts: Mapping[str, PlannedPart]
    sha256: Mapping[Path, str]
    deletable: tuple[Path, ...]
    seen: Mapping[Path, State]
    place: Callable[[Path], Path]
    hashes: ShardHashes = field(default_factory=ShardHashes)
    done: set[Path] = field(default_factory=set)
    received: int = 0
    resumed: int = 0
    cached: int = 0
    notes: tuple[str, ...] = ()

    def run(self, make: Callable[[Progress], Manifest], progress: Progress) -> Manifest:
        """What `make` returns."""
        with self.hashes:
            return make(progress)

    def part(self, file: str) -> PlannedPart:
        """The part as it was planned; its shards and those of the next one are hashed from now on."""
        files = list(self.parts)
        position = files.index(file)
        for soon in files[position : position + 2]:
            for shard in self.parts[soon].sources:
                self.hashes.begin(self.place(shard))
        return self.parts[file]

    def checked(self, shard: Path) -> SourceShard:
        """The shard with its hash; `BloomdeskError` if that is not the one known beforehand, or it has changed."""
        found = self.hashes.result(self.place(shard))
        if state_of(self.place(shard)) != self.seen[shard]:
            raise BloomdeskError(
                f"{shard} changed while it was read",
                "wait until nothing writes to the source, and run the same command again",
            )
        expected = self.sha256.get(shard, found)
        if found != expected:
            again = "fetch it again with bloomdesk download --check"
            if blob_name(shard) is not None:
                again = f"delete {os.path.realpath(shard)}, and fetch it again: hf download"
            if self.place(shard) != shard:
                again = f"delete {self.place(shard)}, and fetch it again: {fetch_command([shard])}"
            raise BloomdeskError(
                f"{shard} is damaged or has changed: its sha256 is {found}, expected {expected}",
                f"{again}; then convert again: finished parts are kept",
            )
        return SourceShard(shard.name, found, self.seen[shard][0])

    def release(self, needed: frozenset[str], delete: Callable[[Path, str | None], None]) -> None:
        """Delete the deletable shards that are not among `needed`."""
        for shard in self.deletable:
            if shard.name not in needed and shard not in self.done and shard.exists():
                self.done.add(shard)
                delete(shard, self.checked(shard).sha256)


def state_of(shard: Path) -> State:
    """What changes when a shard is written to or another file takes its place; `BloomdeskError` if it can't be read."""
    with read_errors(shard):
        found = shard.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


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

    The LoRA adapter in the directory `adapter` is merged into the weights as peft's merge_and_unload does it.

    Raises `BloomdeskError` before anything is written if the source is not a complete, sound BLOOM, the adapter can't
    be merged, or the destination can't take it; and later if a shard is not what the download
    recorded or the disk fails.
    What is finished then stays, and the same call resumes from it.
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
    try:
        return _plan(source, destination, delete_source, form, dtype, adapter, mend)
    except UntiedHead:
        return _plan(source, destination, delete_source, form, dtype, adapter, mend, is_untied=True)


def _plan(
    source: Path,
    destination: Path,
    delete_source: bool,
    form: str,
    dtype: str | None,
    adapter_path: Path | None,
    mend: frozenset[str] | None,
    *,
    is_untied: bool = False,
) -> BuildPlan:
    """The plan if the head is the embedding, or `is_untied`; `UntiedHead` if that is found out now."""
    if not source.is_dir():
        raise BloomdeskError(f"{source} is not a directory", "download a checkpoint: bloomdesk download")
    if os.path.realpath(source) == os.path.realpath(destination):
        raise BloomdeskError(f"{destination} is the source itself", "give another directory to write to")
    refuse_foreign(source)
    # A wrong architecture is reported before its tensors are.
    model = read_config(source / "config.json", "BF16")
    companions = _read_companions(source)
    existing = target.load_existing(destination)
    model = with_ends_of_text(model, source / GENERATION_CONFIG, companions.get(GENERATION_CONFIG))
    if mend is not None and existing is not None:
        companions = target.recorded_alone(existing, companions)
        model = replace(model, eos_token_id=existing.model.eos_token_id)
    if is_untied or target.is_untied(existing):
        model = replace(model, tie_word_embeddings=False)
    shards = _find_shards(source, destination, existing, mend)
    seen = {path: state_of(shards.place(path)) for path in shards.files}
    tensors = read_listed(shards)
    # There are no keys only if a single file is gone, and everything is made.
    keys = shards.weight_map or tensors
    assignment = assign(keys, model) if keys or existing is None else None
    chosen = target.dtype_to_resume(destination, existing, dtype)
    if chosen is None:
        first = {key: tensor for key, tensor in tensors.items() if tensor.file == shards.files[0]}
        chosen = choose_dtype(dtype, companions["config.json"], first)
    model = replace(model, dtype=chosen.dtype)
    check_form_dtype(chosen.dtype, form)
    tensors = in_dtype(tensors, assignment.keys if assignment is not None else (), chosen.dtype)
    origin, sha256 = _recorded_source(source, shards, companions)
    if existing is not None and existing.source.repo is None and load_record(source) is None:
        # Begun by a version that did not know the cache of the Hub.
        origin = existing.source
    notes: tuple[str, ...] = ()
    others: tuple[Path, ...] = ()
    if adapter_path is not None:
        adapter = read_adapter(adapter_path)
        if assignment is None:
            raise BloomdeskError(
                f"{source} has no shards any more, so nothing can be compared with {destination}, nor merged",
                "leave out --adapter",
            )
        others = (adapter.path / CONFIG, adapter.file)
        tensors = adapter.applied(tensors, assignment.plain_names(model))
        seen[adapter.file] = state_of(adapter.file)
        notes = (f"{adapter.path} is merged into the weights; it was trained on {adapter.base}",)
        # The Hub has no such weights.
        origin = Source()
    exported = _exported_hashes(source, companions)
    if mend is not None and existing is not None:
        # The hashes of the tensors tell whether it is the recorded source.
        origin, sha256 = existing.source, {}
    fresh = Manifest(model, origin, form=form)
    manifest = target.resume(destination, existing, fresh, companions, mend)
    # A cache of the Hub has no record either: only its directory's name says the commit.
    is_unrecorded = origin.repo is None or load_record(source) is None
    if mend is None and target.missing_parts(manifest) and is_unrecorded:
        manifest, notes = _with_samples(destination, manifest, shards, others, notes)
    known = known_parts(destination, existing) if existing is not None else {}
    schedule = schedule_of(
        manifest, shards, assignment, {path.name: size for path, (size, *_) in seen.items()}, mend
    )
    parts, comparisons = {}, ()
    if assignment is not None:
        parts = _plan_parts(schedule, manifest, shards, tensors, assignment, exported)
        comparisons = comparisons_of(manifest, assignment, tensors) if mend is None else ()
    rounding = rounding_notes(tensors.values(), chosen.why)
    if delete_source and rounding:
        raise BloomdeskError(f"{rounding[0]}; with the source the bits would be lost", KEEP_SOURCE)
    if delete_source and adapter_path is not None:
        raise BloomdeskError(f"the weights of {source} can't be had back from merged ones", KEEP_SOURCE)
    deletable = _deletable(shards) if delete_source else ()
    peak = schedule.growth(frozenset(path.name for path in deletable))
    require_large_files(destination, {file: schedule.part_sizes[file] for file in schedule.needs})
    target.require_free_space(destination, peak, schedule.needs, companions)
    on_disk = ShardsOnDisk(parts, sha256, deletable, seen, shards.place)
    return BuildPlan(
        destination,
        existing,
        manifest,
        known,
        companions,
        schedule,
        on_disk,
        peak,
        comparisons=comparisons,
        notes=(
            *(assignment.notes if assignment is not None else ()),
            *(
                ()
                if shards.files
                else (f"{source} has no shards any more, so nothing was compared with them",)
            ),
            *rounding,
            *notes,
        ),
    )


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


def _with_samples(
    destination: Path,
    manifest: Manifest,
    shards: ShardList,
    others: tuple[Path, ...],
    notes: tuple[str, ...],
) -> tuple[Manifest, tuple[str, ...]]:
    """The manifest with samples of the source's shards and `others`, and `notes` for the user, perhaps with one more.

    While all shards are there, what the parts were made from is compared with them; later only the samples tell that
    the rest is of the same checkpoint. Raises `BloomdeskError` if it is not.
    """
    samples = {path.name: sample(shards.place(path)) for path in (*shards.files, *others)}
    gone = sorted({*(shards.weight_map or {}).values()} - samples.keys())
    if not gone or not manifest.parts:
        return replace(manifest, samples=samples), notes
    if not manifest.samples:
        return manifest, (
            *notes,
            f"{gone[0]} is gone, and parts were made from it by a version of bloomdesk that recorded nothing of the "
            "other shards: they were not compared with what they were then",
        )
    begun = {name: found for name, found in manifest.samples.items() if name not in gone}
    if differing := sorted(name for name, _ in samples.items() ^ begun.items()):
        raise BloomdeskError(
            f"{destination} was made from another state of the source: {differing[0]} is not what it was when "
            f"{gone[0]} was still there",
            "give the checkpoint that the directory was begun from, and the --adapter if one was merged; for these, "
            "give a new directory",
        )
    return manifest, notes


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


def _exported_hashes(source: Path, companions: Mapping[str, bytes]) -> dict[str, str]:
    """Each tensor's xxh3-128 by the record of the export that `source` is, if it is one.

    Raises `BloomdeskError` if the record is damaged, or a small file is not the recorded one.
    """
    record = load_export_record(source)
    if record is None:
        return {}
    for known in record.small_files:
        data = companions.get(known.file)
        if data is not None and xxhash.xxh3_128_hexdigest(data) != known.xxh3_128:
            raise not_as_exported(source / known.file)
    return {tensor.name: tensor.xxh3_128 for shard in record.shards for tensor in shard.tensors}


def _read_companions(source: Path) -> dict[str, bytes]:
    """The source's small files; `BloomdeskError` if one is not what its name says, or not what a download recorded."""
    try:
        return target.read_companions(source)
    except BloomdeskError:
        # The record knows how to get a damaged one again.
        record = load_record(source)
        for name in COMPANIONS if record is not None else ():
            data = read_if_exists(source / name, target.LARGEST_COMPANION)
            if data is not None and name in record.files:
                _check_recorded(source / name, record.files[name], data)
        raise


def _check_recorded(path: Path, known: HubFile, data: bytes) -> None:
    digest = known.digest()
    digest.update(data)
    if wrong := known.difference(digest):
        raise BloomdeskError(f"{path} is damaged or has changed: {wrong}", CHECK_AGAIN)


def _recorded_source(
    source: Path, shards: ShardList, companions: Mapping[str, bytes]
) -> tuple[Source, dict[Path, str]]:
    """Repo and commit, and each shard's sha256, if a download or pointers of Git LFS have recorded them."""
    record = load_record(source)
    if record is None:
        if shards.objects:
            return Source(), {path: known.sha256 for path, known in shards.objects.items()}
        return _cached_source(source, shards, companions)
    hashes = {}
    for path in (*shards.files, *(source / name for name in companions)):
        known = record.files.get(path.name)
        if known is None:
            raise BloomdeskError(
                f"{path} is not of the download that {source / RECORD} records",
                "move it out of the directory; or, if this is a checkpoint of your own by now, delete that record",
            )
        size = path.stat().st_size
        if size != known.size:
            raise BloomdeskError(
                f"{path} has {size:,} bytes, the download recorded {known.size:,}", FETCH_AGAIN
            )
        if path not in shards.files:
            _check_recorded(path, known, companions[path.name])
        elif known.sha256 is not None:
            hashes[path] = known.sha256
    return Source(record.repo, record.commit), hashes


def _cached_source(
    source: Path, shards: ShardList, companions: Mapping[str, bytes]
) -> tuple[Source, dict[Path, str]]:
    """Repo and commit, and each shard's sha256, if all files are as a cache of the Hub has them; else none of it.

    The shards are hashed while parts are made from them; here they count by the names of the blobs to which they lead.
    """
    snapshot, names = snapshot_of(source), {path: blob_name(path) for path in shards.files}
    hashes = {path: name for path, name in names.items() if name is not None}
    if snapshot is None or not shards.files or len(hashes) < len(names):
        return Source(), {}
    if not all(is_blob(source / name, data) for name, data in companions.items()):
        return Source(), {}
    return Source(*snapshot), hashes


def _deletable(shards: ShardList) -> tuple[Path, ...]:
    if shards.objects:
        raise BloomdeskError(
            f"{next(iter(shards.objects))} is a pointer of Git LFS, whose object other branches may need",
            "convert without --delete-source, and delete the clone afterwards",
        )
    for path in shards.files:
        others = names_beside_state(path) if path.suffix == ".bin" else ()
        if others:
            raise BloomdeskError(
                f"{path} also holds {', '.join(others[:3])} beside the weights, which would be lost",
                KEEP_SOURCE,
            )
    links = [path for path in shards.files if path.is_symlink()]
    if links:
        raise BloomdeskError(
            f"{links[0]} is a link, as in a Hub cache: deleting it would free nothing",
            "convert without --delete-source, or download into a plain directory",
        )
    folder = shards.files[0].parent if shards.files else Path()
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BloomdeskError(f"{folder}: its shards can't be deleted", KEEP_SOURCE)
    return shards.files
