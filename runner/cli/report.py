"""Reports of rows, printed as aligned lines or as one JSON object, and the rows that `bench` and `plan` share."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.units import number, rate, size

if TYPE_CHECKING:
    from runner.estimate.rates import Rates
    from runner.generation.session_files import SessionFiles


@dataclass(frozen=True)
class Row:
    """A line of a report: `label` and `words` for people, `fields` for --json. Without words, a blank line."""

    label: str = ""
    words: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


def print_rows(rows: Iterable[Row], *, as_json: bool = False) -> None:
    """Print a report for people, or for programs."""
    if as_json:
        print(json.dumps({key: value for row in rows for key, value in row.fields.items()}))
    else:
        print_lines(f"{row.label:>12}  {row.words}" if row.words else "" for row in rows)


def print_json(fields: Mapping[str, Any]) -> None:
    """Print one line of JSON; characters that standard output cannot encode are JSON's escapes."""
    encoding = codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name
    print(json.dumps(fields, ensure_ascii=not encoding.startswith("utf")), flush=True)


def print_lines(lines: Iterable[str]) -> None:
    """Print each line as soon as it is known."""
    for line in lines:
        print(line)


def rates_row(rates: Rates) -> Row:
    """What disk, memory and processor give."""
    of_each = f" of {' and '.join(map(rate, rates.disks))}" if rates.disks else ""
    words = (
        f"disk {rate(rates.disk)}{of_each}, memory {rate(rates.memory)}, lossless {rate(rates.decoded)}, "
        f"int8 {rate(rates.int8)}, int4 {rate(rates.int4)}, "
        f"{number(rates.compute / 1e9)} billion multiply-adds/s"
    )
    return Row("rates", words, {"rates": asdict(rates)})


def session_rows(directory: Path) -> Iterator[Row] | None:
    """What the session in `directory` holds; None if that is no session."""
    from runner.generation.session_files import SESSION, SessionFiles

    if not (directory / SESSION).is_file():
        return None
    return _session_rows(directory, SessionFiles.load(directory))


def _session_rows(directory: Path, found: SessionFiles) -> Iterator[Row]:
    request = found.request
    yield Row("session", str(directory), {"directory": str(directory), "fingerprint": request.fingerprint})
    prompt, new = len(request.prompt_ids), found.new_ids
    words = f"{prompt:,} tokens of prompt, {len(new):,} new ones"
    yield Row("text", words, {"prompt_token_ids": list(request.prompt_ids), "token_ids": list(new)})
    words = f"{found.positions:,} positions, {size(found.nbytes)}"
    yield Row("cache", words, {"positions": found.positions, "bytes": found.nbytes})
    options = {name: value for name, value in request.options.items() if value not in (None, {}, [])}
    yield Row(
        "options",
        ", ".join(f"{name} {' '.join(str(value).split())}" for name, value in options.items()),
        {"options": options},
    )
