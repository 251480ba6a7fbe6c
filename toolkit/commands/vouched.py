"""What vouches for a checkpoint on disk: a download's record, the Hub's cache, Git LFS, an export's record, samples.

bloomdesk-download.json          repo, commit, the sha256 of each shard, the hashes of small files
models--NAME/snapshots/COMMIT    repo and commit; the name of each blob is its sha256
pointers of Git LFS              the sha256 of each shard
bloomdesk-export.json            the xxh3-128 of each tensor and small file
the manifest's source_samples    what the shards were like when the first parts were made
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import xxhash

from runner.errors import BloomdeskError
from runner.format.layout import COMPANIONS
from runner.format.manifest import Manifest, Source
from toolkit.hub.hub_cache import blob_name, is_blob, snapshot_of
from toolkit.hub.record import RECORD, DownloadRecord, load_record
from toolkit.hub.revision import HubFile
from toolkit.io.disk import read_if_exists
from toolkit.parts import destination as target
from toolkit.parts.export_record import load_export_record, not_as_exported
from toolkit.source.index import ShardList
from toolkit.source.sample import sample

FETCH_AGAIN = "run the same bloomdesk download again: it fetches what is wrong and nothing else"
CHECK_AGAIN = "run the same bloomdesk download again with --check: it fetches what is wrong and nothing else"


@dataclass(frozen=True)
class Vouched:
    """What is known of a source before its bytes are read: repo and commit, and hashes.

    `shards` are the sha256 of shards, `tensors` the xxh3-128 of tensors by key. It `is_recorded` if a download has
    recorded every file.
    """

    origin: Source = field(default_factory=Source)
    shards: Mapping[Path, str] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    is_recorded: bool = False


def read_companions(source: Path) -> dict[str, bytes]:
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


def vouched(source: Path, shards: ShardList, companions: Mapping[str, bytes]) -> Vouched:
    """What a download, the Hub's cache, pointers or an export have recorded of the source.

    Raises `BloomdeskError` if a record is damaged, or a file shows already that it is not the recorded one.
    """
    record = load_record(source)
    if record is not None:
        return _downloaded(source, record, shards, companions)
    if shards.objects:
        return Vouched(shards={path: known.sha256 for path, known in shards.objects.items()})
    return _exported(source, companions) or _cached(source, shards, companions) or Vouched()


def _downloaded(
    source: Path, record: DownloadRecord, shards: ShardList, companions: Mapping[str, bytes]
) -> Vouched:
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
    return Vouched(Source(record.repo, record.commit), hashes, is_recorded=True)


def _check_recorded(path: Path, known: HubFile, data: bytes) -> None:
    digest = known.digest()
    digest.update(data)
    if wrong := known.difference(digest):
        raise BloomdeskError(f"{path} is damaged or has changed: {wrong}", CHECK_AGAIN)


def _exported(source: Path, companions: Mapping[str, bytes]) -> Vouched | None:
    record = load_export_record(source)
    if record is None:
        return None
    for known in record.small_files:
        data = companions.get(known.file)
        if data is not None and xxhash.xxh3_128_hexdigest(data) != known.xxh3_128:
            raise not_as_exported(source / known.file)
    return Vouched(
        tensors={tensor.name: tensor.xxh3_128 for shard in record.shards for tensor in shard.tensors}
    )


def _cached(source: Path, shards: ShardList, companions: Mapping[str, bytes]) -> Vouched | None:
    """None unless all files are as a cache of the Hub has them.

    The shards are hashed while parts are made from them; here they count by the names of the blobs to which they lead.
    """
    snapshot, names = snapshot_of(source), {path: blob_name(path) for path in shards.files}
    hashes = {path: name for path, name in names.items() if name is not None}
    if snapshot is None or not shards.files or len(hashes) < len(names):
        return None
    if not all(is_blob(source / name, data) for name, data in companions.items()):
        return None
    return Vouched(Source(*snapshot), hashes)


def with_samples(
    destination: Path, manifest: Manifest, shards: ShardList, others: tuple[Path, ...]
) -> tuple[Manifest, tuple[str, ...]]:
    """The manifest with samples of the source's shards and `others`, and sentences for the user.

    While all shards are there, what the parts were made from is compared with them; later only the samples tell that
    the rest is of the same checkpoint. Raises `BloomdeskError` if it is not.
    """
    samples = {path.name: sample(shards.place(path)) for path in (*shards.files, *others)}
    gone = sorted({*(shards.weight_map or {}).values()} - samples.keys())
    if not gone or not manifest.parts:
        return replace(manifest, samples=samples), ()
    if not manifest.samples:
        return manifest, (
            f"{gone[0]} is gone, and parts were made from it by a version of bloomdesk that recorded nothing of the "
            "other shards: they were not compared with what they were then",
        )
    begun = {name: found for name, found in manifest.samples.items() if name not in gone}
    if differing := sorted(name for name, _ in samples.items() ^ begun.items()):
        raise BloomdeskError(
            f"{destination} was made from another state of the source: {differing[0]} is not what it was when "
            f"{gone[0]} was still there",
            "give the checkpoint that the directory was begun from, with its --adapter if it had one; "
            "or convert this one into a new directory",
        )
    return manifest, ()
