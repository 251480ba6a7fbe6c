"""What the commands say of plans and results, in lines of text; `cli` prints them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from runner.format.coded import PLAIN
from toolkit.cli.terminal import duration, gigabytes, parameters

if TYPE_CHECKING:
    from toolkit.commands.build import BuildPlan
    from toolkit.commands.download import DownloadPlan
    from toolkit.commands.info import Info
    from toolkit.commands.verify import VerifyReport

_STATES = {
    "sound": "  (there)",
    "unchecked": "  (there, to be checked)",
    "partial": "  (begun)",
    "absent": "",
}


def traffic(received: int, resumed: int, seconds: float) -> str:
    """ "352.49 GB in 8 h 20 min, 11.8 MB/s; 1.20 GB were there already"."""
    there = f"; {gigabytes(resumed)} were there already" if resumed else ""
    return pace(received, seconds) + there


def pace(count: int, seconds: float) -> str:
    """ "4.93 GB in 10 s, 493 MB/s"."""
    rate = f", {count / seconds / 1e6:,.3g} MB/s" if count and seconds else ""
    return f"{gigabytes(count)} in {duration(seconds)}{rate}"


def download_lines(plan: DownloadPlan) -> Iterator[str]:
    """What a download has to fetch, and whether the disk has room for it."""
    for planned in plan.files:
        yield f"{planned.file.size:>15,}  {planned.file.path}{_STATES[planned.state]}"
    yield f"{plan.total:>15,}  bytes in {len(plan.files)} files of {plan.revision}"
    verdict = (
        "it fits" if plan.fits else f"it does not fit: {gigabytes(plan.to_fetch - plan.free)} too little"
    )
    yield (
        f"still to fetch: {gigabytes(plan.to_fetch)}, free in {plan.directory}: {gigabytes(plan.free)}: {verdict}"
    )


def intention(plan: BuildPlan) -> str:
    """What is there, what will be made, and what that takes of the disk."""
    there, to_make = len(plan.manifest.parts), len(plan.schedule.needs)
    if not to_make:
        return f"all {there} parts are there"
    cut = ", because blocks are cut across shards" if plan.schedule.shards_at_a_time > 2 else ""
    about = "" if plan.manifest.form == PLAIN else "about "
    return (
        f"{there} parts are there, {to_make} to be made; "
        f"{about}{gigabytes(plan.peak_bytes)} of disk at the fullest moment, "
        f"with at most {plan.schedule.shards_at_a_time} shards beside the parts{cut}"
    )


def damage_lines(report: VerifyReport) -> Iterator[str]:
    """What is damaged, a line each."""
    for damage in report.damage:
        yield f"{damage.file}{f': {damage.tensor}' if damage.tensor else ''}: {damage.what}"


def report_lines(report: VerifyReport, seconds: float) -> Iterator[str]:
    """What was found, how it was looked for, and what to run next."""
    yield from damage_lines(report)
    for leftover in report.leftovers:
        yield f"{leftover}: left over from an interrupted conversion; the next one replaces it"
    how = f"all of {pace(report.bytes_read, seconds)}"
    if report.sample is not None:
        how = f"headers and {report.share:.1%} of the bytes at random: {pace(report.bytes_read, seconds)}"
    if report.quick:
        how = "sizes and headers"
    checked = f"{report.files_checked} files checked ({how})"
    if report.sound:
        yield f"{report.directory} is sound: {checked}"
    else:
        files = len({damage.file for damage in report.damage})
        yield f"{report.directory} is damaged: {files} files, see above; {checked}"
        yield f"  next: bloomdesk repair {report.directory}"


def info_lines(found: Info) -> Iterator[str]:
    """What a prepared directory holds, and what using it takes."""
    manifest, model = found.manifest, found.manifest.model
    source = manifest.source
    state = (
        "complete"
        if not manifest.missing
        else f"not complete: {len(manifest.missing)} files are still to be made"
    )
    rows = {
        "source": f"{source.repo} at {source.commit}" if source.repo else "a local checkpoint",
        "state": state,
        "model": f"{parameters(found.parameters)}, {model.dtype}",
        "shape": f"{model.n_layer} blocks, hidden size {model.hidden_size:,}, {model.n_head} heads, "
        f"vocabulary {model.vocab_size:,}",
        "files": f"{len(manifest.parts)} parts and {len(manifest.companions)} small files, {gigabytes(found.bytes)}",
        "stored": _stored(found),
        "a pass reads": gigabytes(found.pass_bytes),
        "KV cache": f"{gigabytes(found.kv_cache_bytes_per_token)} for each token of prompt and output",
    }
    for name, value in rows.items():
        yield f"{name:>12}  {value}"


def _stored(found: Info) -> str:
    """ "plain", or "lossless, 0.672 of the 352.49 GB that plain weights take"."""
    form = found.manifest.form
    if form == PLAIN:
        return form
    return f"{form}, {found.ratio:.3f} of the {gigabytes(found.plain_bytes)} that plain weights take"
