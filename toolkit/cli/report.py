"""What the toolkit's commands say of plans and results."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from runner.cli.report import Row
from runner.errors import explained, in_shell
from runner.format.coded import PLAIN
from runner.format.slices import Slice
from runner.system.disk import UNKNOWN_SPACE
from runner.units import duration, number, percent, rate, size

if TYPE_CHECKING:
    from toolkit.commands.build import BuildPlan, Summary
    from toolkit.commands.download import DownloadPlan, DownloadSummary
    from toolkit.commands.info import Info
    from toolkit.commands.repair import Repaired
    from toolkit.commands.verify import VerifyReport

_STATES = {
    "sound": "  (there)",
    "unchecked": "  (there, to be checked)",
    "partial": "  (partly there)",
    "changed": "  (changed since it was downloaded: to be renamed, and fetched)",
    "foreign": "  (another file, not from this program: in the way)",
    "absent": "",
}


def amount(nbytes: int, seconds: float) -> str:
    """ "4.93 GB in 10 s, 493 MB/s"."""
    return f"{size(nbytes)} in {duration(seconds)}, {rate(nbytes / max(seconds, 1e-9))}"


def fetched(done: Summary | DownloadSummary) -> str:
    """ "352 GB fetched, 1.2 GB were there already"."""
    there = f", {size(done.resumed)} were there already" if done.resumed else ""
    copied = f", {size(done.cached)} copied from the Hub's cache" if done.cached else ""
    return f"{size(done.received)} fetched{copied}{there}"


def written(what: str, done: Summary) -> str:
    """ "72 parts written (4.93 GB in 10 s, 493 MB/s), 0 kept; 4.93 GB of the source deleted"."""
    text = f"{len(done.written)} {what} written"
    if done.written:
        text += f" ({amount(done.bytes_written, done.seconds)})"
    text += f", {len(done.kept)} kept"
    # Shards that prepare fetched are its own, and the user had no source.
    if done.received or done.resumed or done.cached:
        return f"{text}; {fetched(done)}"
    return f"{text}; {size(done.bytes_deleted)} of the source deleted" if done.bytes_deleted else text


def completed_lines(destination: Path, done: Summary, own: Slice | None = None) -> Iterator[str]:
    """That a prepared directory is complete, what that took, and the next command; `own` if it is one slice alone."""
    yield f"{destination} is complete: {written('parts', done)}"
    if own is not None and own.count > 1:
        yield f"  next: make the other slices; bloomdesk info {in_shell(destination)} --also DIR says which are there"
        return
    yield f'  next: bloomdesk generate {in_shell(destination)} "PROMPT"'


def download_lines(plan: DownloadPlan) -> Iterator[str]:
    """What a download has to fetch, and whether the disk has free space for it."""
    for planned in plan.files:
        cached = "  (in the Hub's cache)" if planned.is_cached else ""
        yield f"{planned.file.size:>15,}  {planned.file.path}{_STATES[planned.state]}{cached}"
    yield f"{plan.revision.total:>15,}  bytes in {len(plan.files)} files of {plan.revision}"
    still = f"still to fetch: {size(plan.to_fetch - plan.to_copy)}"
    if plan.to_copy:
        still += f", to copy from the Hub's cache: {size(plan.to_copy)}"
    if plan.free >= UNKNOWN_SPACE:
        yield f"{still}, what is free in {plan.directory} is not known"
        return
    verdict = "it fits" if plan.fits else f"it does not fit: {size(plan.to_fetch - plan.free)} too little"
    yield f"{still}, free in {plan.directory}: {size(plan.free)}: {verdict}"


def downloaded_lines(done: DownloadSummary, directory: Path) -> Iterator[str]:
    """What a download has fetched and kept, how each file is known to be right, and what became of wrong ones."""
    files = f"{len(done.fetched)} files fetched and checked against their hashes, {len(done.kept)} kept"
    if done.kept:
        trusted = len(done.kept) - len(done.hashed)
        how = [
            f"{len(done.hashed)} hashed now" if done.hashed else "",
            f"{trusted} of the size and date that they had when they were checked" if trusted else "",
        ]
        files += f", {' and '.join(filter(None, how))}"
    yield f"{done.revision} is in {directory}: {files} ({fetched(done)})"
    for name in done.dropped:
        yield f"{name} was damaged on the disk and has been fetched again"
    for path in done.set_aside:
        yield f"{path} had changed since it was downloaded: it is kept under this name"


def intention(plan: BuildPlan) -> str:
    """The parts that are there, those to be made, and the disk that they take."""
    there, to_make = len(plan.manifest.parts), len(plan.schedule.needs)
    if not to_make:
        return f"all {there} parts are there"
    if plan.to_prove:
        compared = f", {len(plan.to_prove)} of them to be compared with the bytes of whole shards"
        there, to_make = there + len(plan.to_prove), to_make - len(plan.to_prove)
    else:
        compared = ""
    cut = ", because blocks are cut across shards" if plan.schedule.shards_at_a_time > 2 else ""
    rows = "the rows of " if plan.slice is not None else ""
    about = "" if plan.manifest.form == PLAIN else "about "
    return (
        f"{there} parts are there{compared}, {to_make} to be made; "
        f"{about}{size(plan.peak_bytes)} of disk at the fullest moment, "
        f"with {rows}at most {plan.schedule.shards_at_a_time} shards beside the parts{cut}"
    )


def damage_lines(report: VerifyReport) -> Iterator[str]:
    """What is damaged, a line each."""
    for damage in report.damage:
        yield f"{damage.file}{f': {damage.tensor}' if damage.tensor else ''}: {damage.what}"


def verify_lines(report: VerifyReport, seconds: float) -> Iterator[str]:
    """What was found, how it was checked, and the next command."""
    if not report.is_unfinished:
        yield from damage_lines(report)
    yield from unchecked_lines(report)
    for leftover in report.leftovers:
        yield f"{leftover}: left over from an interrupted conversion; the next one replaces it"
    how = f"all of {amount(report.bytes_read, seconds)}"
    if report.sample is not None:
        how = f"all headers and tensors at random, {percent(report.share)} of the bytes: "
        how += amount(report.bytes_read, seconds)
    if report.quick:
        how = "sizes and headers"
    checked = f"{report.files_checked} files checked ({how})"
    if report.sound:
        yield f"{report.directory} is sound: {checked}"
        return
    if report.is_unfinished:
        there, missing = report.files_checked, len(report.missing)
        sound = "" if report.unchecked else ", and these are sound"
        yield f"{report.directory} is not complete: {there} of {there + missing} files are made{sound}; {checked}"
    elif report.damage:
        files = len({damage.file for damage in report.damage})
        yield f"{report.directory} is damaged: {files} files, see above; {checked}"
    if report.unchecked:
        yield f"{report.directory} could not be checked: {len(report.unchecked)} files, see above; {checked}"
    yield f"  next: {report.next_command if report.damage else unread_hint(report)}"


def unchecked_lines(report: VerifyReport) -> Iterator[str]:
    """What could not be read, a line each."""
    for item in report.unchecked:
        yield f"{item.file}: {item.what}"


def unread_hint(report: VerifyReport) -> str:
    """What to do about the first file that could not be read."""
    number = report.unchecked[0].errno
    step = (
        explained(OSError(number, os.strerror(number)))[1]
        if number is not None
        else explained(MemoryError())[1]
    )
    if number == errno.EIO:
        step += f"; if a file is lost, delete it, then: {report.next_command}"
    return step or "mend that, and run the same command again"


def repair_lines(done: Repaired, seconds: float) -> Iterator[str]:
    """What a repair did, or that there was nothing to do, and what is left to do."""
    directory = done.report.directory
    if done.report.sound:
        yield from verify_lines(done.report, seconds)
    elif done.parts or done.small_files:
        yield f"{directory}: {len(done.parts)} parts and {len(done.small_files)} small files made anew"
    if done.manifest.missing:
        there, missing = len(done.manifest.parts), len(done.manifest.missing)
        yield f"{directory} is not complete: {there} parts are there, {missing} files are still to be made"
        yield f"  next: {done.manifest.command(directory)}"
    elif not done.report.sound:
        yield f"{directory} is whole again"


def info_rows(found: Info) -> Iterator[Row]:
    """What a prepared directory holds, and what using it takes."""
    manifest, model, source = found.manifest, found.manifest.model, found.manifest.source
    missing = len(manifest.missing)
    unit, one = ("billion", 1e9) if found.parameters >= 1e9 else ("million", 1e6)
    yield Row("source", f"{source.repo} at {source.commit}" if source.repo else "a local checkpoint")
    state = f"not complete: {missing} files are still to be made" if missing else "complete"
    if found.damaged:
        state = f"damaged: {len(found.damaged)} files are missing or cut, {found.damaged[0]} first"
    if found.unread:
        first = found.unread[0]
        state = f"not known: {len(found.unread)} files can't be looked at, {first.file} first: {first.what}"
    yield Row("state", state)
    directory = in_shell(found.directory)
    if found.unread:
        yield Row("next", f"bloomdesk verify {directory}")
    elif found.damaged:
        yield Row("next", f"bloomdesk repair {directory}{'' if source.repo else ' --source SRC'}")
    elif missing:
        yield Row("next", f"{manifest.command(found.directory)} resumes where it stopped")
    yield from _slice_rows(found)
    yield Row("model", f"{number(found.parameters / one)} {unit} parameters, {model.dtype}")
    shape = f"{model.n_layer} blocks, hidden size {model.hidden_size:,}, {model.n_head} heads"
    yield Row("shape", f"{shape}, vocabulary {model.vocab_size:,}")
    files = f"{len(manifest.parts)} parts and {len(manifest.companions)} small files"
    yield Row("files", f"{files}, {size(found.bytes)}")
    share = f", {number(found.ratio)} of the {size(found.plain_bytes)} that plain weights take"
    yield Row("stored", manifest.form + ("" if manifest.form == PLAIN else share))
    yield Row("a pass reads", size(found.pass_bytes))
    yield Row("KV cache", f"{size(found.kv_cache_bytes_per_token)} for each token of prompt and output")


def _slice_rows(found: Info) -> Iterator[Row]:
    """Which slice a directory is, and where the others are."""
    own = found.manifest.slice
    if own is None:
        return
    yield Row("holds", f"{own.described}: some rows of every matrix")
    if unproven := len(found.manifest.unproven_shards):
        what = (
            f"rows of {unproven:,} shards, whose sha256 was not compared: prepare --check-whole compares it"
        )
        yield Row("made from", what)
    for each in found.places:
        if each["index"] == own.index:
            continue
        made_in = f"; it was made in {each['made_in']}" if each["made_in"] else ""
        where = (
            f"in {each['directory']}" if each["directory"] else f"not found{made_in}: --also DIR says where"
        )
        yield Row(f"slice {each['index'] + 1}/{own.count}", where)
