"""The files of `--json-schema` and `--grammar`, and the text of `--regex`, as fields of `Sampling`."""

from __future__ import annotations

from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.safetensors import read_text
from runner.generation.options import GRAMMAR, JSON_SCHEMA, REGEX, Sampling

# Bytes.
LARGEST_CONSTRAINT = 2**24


def read_constraint(json_schema: Path | None, regex: str | None, grammar: Path | None) -> dict[str, str]:
    """The fields of `Sampling` that were given, with the texts of their files.

    Raises `BloomdeskError`, which names the file, if more than one was given, it cannot be read, or it is unsound.
    """
    given = {JSON_SCHEMA: json_schema, REGEX: regex, GRAMMAR: grammar}
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return {}
    if len(names) > 1:
        first, second = (f"--{name.replace('_', '-')}" for name in names[:2])
        raise BloomdeskError(f"{first} and {second} exclude each other", "leave one out")
    from runner.generation.grammar import check

    (name,) = names
    path = given[name]
    found = {name: read_text(path, LARGEST_CONSTRAINT) if isinstance(path, Path) else path}
    try:
        check(Sampling(**found))
    except BloomdeskError as error:
        if isinstance(path, Path):
            raise BloomdeskError(f"{path}: {error.message}", error.hint) from None
        raise
    return found
