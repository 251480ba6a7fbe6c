"""Files of prompts: `.txt`, one a line, or `.jsonl`, one JSON object a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from runner.errors import BloomdeskError, reading
from runner.generation.options import GREEDY, SAMPLING_FIELDS, Sampling, can_be_written, is_whole, with_fields

# Bytes; a longer line is not a prompt.
LONGEST_LINE = 2**24
STANDARD_INPUT = Path("-")
OTHER_FIELDS = {"prompt", "id", "max_new_tokens"}
# From 0 to 1: how like a field's name an unknown one must be to count as misspelt.
LIKENESS = 0.8


@dataclass(frozen=True)
class Prompt:
    """Prompt number `index`, from 0, in line `line` of its file, from 1.

    `max_new_tokens` is None without its own.
    """

    index: int
    line: int
    text: str
    id: str | int | None = None
    max_new_tokens: int | None = None
    sampling: Sampling = GREEDY

    @property
    def identity(self) -> dict[str, str]:
        """The field of a result that says which text it is of."""
        return {"prompt": self.text}

    @property
    def choices(self) -> set[int]:
        """The numbers of its continuations."""
        return set(range(self.sampling.n))

    @property
    def key(self) -> tuple[str, str | int]:
        """What its result is known by: its id if it has one."""
        return ("index", self.index) if self.id is None else ("id", self.id)


def read_prompt(path: Path | None) -> str:
    """The prompt in the file at `path`, or on standard input if that is "-" or None, without its last line's end.

    Raises `BloomdeskError` if it can't be read, is no UTF-8, or is longer than any prompt.
    """
    path = STANDARD_INPUT if path is None else path
    where = name_of(path)
    read = sys.stdin.buffer.read if path == STANDARD_INPUT else partial(_read_bytes, path)
    with reading(Path(where)):
        data = read(LONGEST_LINE + 1)
    if len(data) > LONGEST_LINE:
        raise BloomdeskError(f"{where}: longer than {LONGEST_LINE:,} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BloomdeskError(f"{where}: not valid UTF-8 text") from None
    return text.removesuffix("\n").removesuffix("\r")


def _read_bytes(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        return file.read(most)


def read_prompts(path: Path, sampling: Sampling = GREEDY) -> tuple[Prompt, ...]:
    """All prompts of a file, without its blank lines.

    A line of a `.txt` file, of standard input ("-") or of another pipe is a prompt as it stands. A line of a `.jsonl`
    file is an object with "prompt", and optionally "id", "max_new_tokens" and the fields of `Sampling`, in place of
    those of `sampling`; other fields are ignored, unless they look like one of these misspelt. Raises `BloomdeskError`
    with the number of the line for anything else, and if the file cannot be read, holds no prompt, or has an id twice.
    """
    if path.suffix not in (".txt", ".jsonl") and not is_piped(path):
        raise BloomdeskError(
            f"{path} is not a file of prompts: its name must end in .txt or .jsonl",
            "put one prompt on each line of a .txt, or one object with a prompt on each line of a .jsonl",
        )
    with reading(path):
        prompts = tuple(_prompts(path, sampling))
    if not prompts:
        raise BloomdeskError(f"{name_of(path)} holds no prompt")
    require_own_ids(path, prompts)
    return prompts


class Numbered(Protocol):
    """What stands in line `line` of a file, known by `key`, which is its `id` if it has one."""

    line: int
    id: str | int | None

    @property
    def key(self) -> tuple[str, str | int]: ...


def require_own_ids(path: Path, items: Iterable[Numbered]) -> None:
    """Raise `BloomdeskError` if two lines have the same id."""
    lines: dict[tuple[str, str | int], int] = {}
    for item in items:
        before = lines.setdefault(item.key, item.line)
        if before != item.line:
            where = f"{name_of(path)}, line {item.line}"
            raise BloomdeskError(f"{where}: the id {item.id!r} is that of line {before}")


def require_known(where: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise `BloomdeskError` if one of `names` looks like one of the `known` misspelt; others are ignored."""
    for name in names:
        if name not in known and (near := get_close_matches(name, known, 1, LIKENESS)):
            raise BloomdeskError(f'{where}: unknown "{name}"', f'did you mean "{near[0]}"?')


def name_of(path: Path) -> str:
    """A file of prompts as a sentence names it."""
    return "standard input" if path == STANDARD_INPUT else str(path)


def _prompts(path: Path, sampling: Sampling) -> Iterator[Prompt]:
    is_json = path.suffix == ".jsonl"
    parsed = partial(_parsed, path, sampling) if is_json else partial(Prompt, sampling=sampling)
    filled = ((number, line) for number, line in lines_of(path) if line.strip())
    return (parsed(index, number, line) for index, (number, line) in enumerate(filled))


def is_piped(path: Path) -> bool:
    """Whether the path stands for what another program writes: "-", /dev/stdin, or a pipe of the shell."""
    return path == STANDARD_INPUT or (not path.suffix and (path.is_fifo() or str(path) == "/dev/stdin"))


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, without line ends."""
    with nullcontext(sys.stdin.buffer) if path == STANDARD_INPUT else path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise BloomdeskError(f"{name_of(path)}, line {number}: longer than {LONGEST_LINE:,} bytes")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise BloomdeskError(f"{name_of(path)}, line {number}: not valid UTF-8 text") from None
            yield number, text.removesuffix("\n").removesuffix("\r")


def _parsed(path: Path, sampling: Sampling, index: int, number: int, line: str) -> Prompt:
    where = f"{path}, line {number}"
    expected = 'an object with a text as its "prompt"'
    given, identity = parsed_line(where, line, expected)
    if not isinstance(given.get("prompt"), str):
        raise BloomdeskError(f"{where}: expected {expected}")
    count = given.get("max_new_tokens")
    if count is not None and not (is_whole(count) and count >= 1):
        raise BloomdeskError(f'{where}: "max_new_tokens" is a whole number of at least 1')
    own = {name: given[name] for name in given if name in SAMPLING_FIELDS}
    require_known(where, given, [*SAMPLING_FIELDS, *OTHER_FIELDS])
    try:
        return Prompt(index, number, given["prompt"], identity, count, with_fields(sampling, own))
    except BloomdeskError as error:
        raise BloomdeskError(f"{where}: {error.message}", error.hint) from None


def parsed_line(where: str, line: str, expected: str) -> tuple[dict[str, Any], str | int | None]:
    """The object of a line, and its "id"; `BloomdeskError` if the line is not what is `expected`."""
    try:
        given = json.loads(line, object_pairs_hook=partial(_each_once, where))
    except (ValueError, RecursionError):
        raise BloomdeskError(f"{where}: not valid JSON") from None
    if not isinstance(given, dict):
        raise BloomdeskError(f"{where}: expected {expected}")
    identity = given.get("id")
    if not is_whole(identity) and not isinstance(identity, str | None):
        raise BloomdeskError(f'{where}: an "id" is a text or a whole number')
    if isinstance(identity, str) and not can_be_written(identity):
        raise BloomdeskError(f'{where}: the "id" is not valid UTF-8 text', "give one without lone surrogates")
    return given, identity


def _each_once(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these fields. Raises `BloomdeskError` if one is there twice: one of the two would be ignored."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BloomdeskError(f'{where}: "{twice}" is there twice', "leave one out")
    return found
