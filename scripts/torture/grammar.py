"""Draw many texts under JSON schemas, regular expressions and grammars, and check each by other means than llguidance.

    python -m scripts.torture.grammar --work WORK [--outputs 1000] [--temperature 1.5] [--model PREPARED]

Half of the outputs are drawn with n-grams and a draft model in batches, and the other half one by one without; the
first of each half are then drawn the other way, and must be the same. Exit status 1 if any output is not valid, or is
not the same. By default the model is the miniature.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runner
from runner.generation.grammar import Matcher
from runner.generation.model import Model
from runner.generation.options import GenerationOptions, Sampling
from runner.generation.sequence import Request, Sequence

MOST_TOKENS = 160
BATCH = 16
# Of each half, the outputs that are drawn the other way as well.
COMPARED = 60
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue apple"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
EVENT = {
    "type": "object",
    "properties": {
        "kind": {"const": "an event of the calendar"},
        "day": {"type": "string", "format": "date"},
        "open": {"type": "boolean"},
        "note": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-zé ]{1,10}$"}]},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["kind", "day", "open", "note", "next"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "array",
            "prefixItems": [{"type": "integer", "minimum": -90, "maximum": 90}, {"enum": ["N", "S"]}],
            "items": False,
            "minItems": 2,
        }
    },
}
DATE = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
WORDS = r"[äöüß日本]{2,6}( [a-z]{1,6}){0,3}(\.|!)"
SUM = """
start: term (" + " term){0,3}
term: NUMBER | "(" NUMBER (" - " | " * ") NUMBER ")"
NUMBER: /[1-9][0-9]{0,2}/
"""
QUERY = """
start: "SELECT " columns " FROM " TABLE (" WHERE " COLUMN " = " VALUE)? ";"
columns: "COUNT(*)" | COLUMN ("," COLUMN){0,2}
TABLE: "animals" | "people"
COLUMN: "name" | "age" | "weight"
VALUE: /[0-9]{1,4}/ | /'[a-z]{1,8}'/
"""


@dataclass(frozen=True)
class Case:
    """A constraint by its field of `Sampling`, and whether a text is valid by it."""

    name: str
    field: str
    text: str
    is_valid: Callable[[str], bool]

    def sampling(self, **options: Any) -> Sampling:
        return Sampling(**{self.field: self.text}, **options)


def _is_person(text: str) -> bool:
    found = json.loads(text)
    tags = {"red", "green", "blue apple"}
    return (
        list(found) == ["name", "age", "tags"]
        and isinstance(found["name"], str)
        and len(found["name"]) <= 12
        and type(found["age"]) is int
        and 0 <= found["age"] <= 130
        and len(found["tags"]) <= 3
        and set(found["tags"]) <= tags
    )


def _is_event(text: str) -> bool:
    found = json.loads(text)
    place = found["next"]
    return (
        list(found) == ["kind", "day", "open", "note", "next"]
        and found["kind"] == "an event of the calendar"
        and re.fullmatch(r"\d{4}-\d\d-\d\d", found["day"]) is not None
        and type(found["open"]) is bool
        and (found["note"] is None or re.fullmatch("[a-zé ]{1,10}", found["note"]) is not None)
        and (place is None or (len(place) == 2 and -90 <= place[0] <= 90 and place[1] in ("N", "S")))
    )


def _matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


_TERM = r"([1-9]\d{0,2}|\([1-9]\d{0,2} [-*] [1-9]\d{0,2}\))"
_COLUMN = "(name|age|weight)"
CASES = (
    Case("person", "json_schema", json.dumps(PERSON), _is_person),
    Case("event", "json_schema", json.dumps(EVENT), _is_event),
    Case("date", "regex", DATE, _matches(DATE)),
    Case("words", "regex", WORDS, _matches(WORDS)),
    Case("sum", "grammar", SUM, _matches(rf"{_TERM}( \+ {_TERM}){{0,3}}")),
    Case(
        "query",
        "grammar",
        QUERY,
        _matches(
            rf"SELECT (COUNT\(\*\)|{_COLUMN}(,{_COLUMN}){{0,2}}) FROM (animals|people)"
            rf"( WHERE {_COLUMN} = (\d{{1,4}}|'[a-z]{{1,8}}'))?;"
        ),
    ),
)
PROMPTS = ("John is", "SELECT name FROM", "Le chat", "今天", "{")


@dataclass
class Drawn:
    """Outputs of a case: how many, how many of them are valid, and what they took."""

    outputs: int = 0
    valid: int = 0
    tokens: int = 0
    passes: int = 0

    def add(self, case: Case, text: str, found: Sequence) -> str:
        """What is wrong with the output; empty if nothing is."""
        self.outputs += 1
        self.tokens += len(found.ids)
        self.passes += found.passes
        try:
            is_valid = case.is_valid(text)
        except (ValueError, KeyError, TypeError):
            is_valid = False
        self.valid += is_valid
        if is_valid and found.is_valid:
            return ""
        return f"{case.name}, seed {found.request.sampling.seed}: {found.stop_reason}: {text!r}"


def requests(model: Model, case: Case, seeds: range, temperature: float) -> list[Request]:
    """One request for each seed; the prompts take turns."""
    return [
        model.requests(
            PROMPTS[seed % len(PROMPTS)],
            MOST_TOKENS,
            case.sampling(temperature=temperature, seed=seed),
            number=seed,
        )[0]
        for seed in seeds
    ]


def draw(model: Model, wanted: list[Request], options: GenerationOptions) -> list[Sequence]:
    """The outputs, in the order of the requests."""
    return sorted(model.batch(wanted, options).run(), key=lambda found: found.index)


def torture(
    model: Model, draft: Path | None, outputs: int, temperature: float, cases: tuple[Case, ...] = CASES
) -> tuple[dict[str, Drawn], list[str]]:
    """What was drawn for each case, and what is wrong."""
    together = GenerationOptions(draft=draft, batch=BATCH)
    alone = GenerationOptions(speculate="off", batch=1)
    drawn, wrong = {}, []
    for number, case in enumerate(cases):
        count = outputs // len(cases) + (number < outputs % len(cases))
        seeds = range(1000 * number, 1000 * number + count)
        counts = drawn[case.name] = Drawn()
        for part, options, other in (
            (seeds[: count // 2], together, alone),
            (seeds[count // 2 :], alone, together),
        ):
            wanted = requests(model, case, part, temperature)
            found = draw(model, wanted, options) if wanted else []
            wrong += filter(None, (counts.add(case, model.text(each), each) for each in found))
            again = draw(model, wanted[:COMPARED], other) if wanted else []
            for one, two in zip(found, again, strict=False):
                if (one.ids, one.stop_reason) != (two.ids, two.stop_reason):
                    wrong.append(f"{case.name}, seed {one.request.sampling.seed}: differs with {other}")
    return drawn, wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where the miniature and its draft are made")
    parser.add_argument("--outputs", type=int, default=1000)
    parser.add_argument("--temperature", type=float, default=1.5)
    parser.add_argument("--model", type=Path, help="another prepared directory, without a draft")
    given = parser.parse_args()
    directory, draft = (given.model, None) if given.model else _miniature(given.work)
    began, model = time.perf_counter(), runner.load(directory)
    masks, plain = [], Matcher.allowed

    def timed(self: Matcher, ids: list[int]) -> Any:
        start = time.perf_counter()
        found = plain(self, ids)
        masks.append(time.perf_counter() - start)
        return found

    Matcher.allowed = timed
    drawn, wrong = torture(model, draft, given.outputs, given.temperature)
    for name, found in drawn.items():
        print(
            f"{name:>8}  {found.valid} of {found.outputs} valid, {found.tokens / found.outputs:.1f} tokens each, "
            f"{found.tokens / found.passes:.2f} tokens a pass"
        )
    masks.sort()
    print(
        f"{len(masks):,} masks: median {1e3 * masks[len(masks) // 2]:.2f} ms, most {1e3 * masks[-1]:.1f} ms"
    )
    print("\n".join(wrong[:20]))
    valid, count = (
        sum(found.valid for found in drawn.values()),
        sum(found.outputs for found in drawn.values()),
    )
    print(f"{valid} of {count} outputs are valid, in {time.perf_counter() - began:.0f} s")
    return 1 if wrong else 0


def _miniature(work: Path) -> tuple[Path, Path]:
    """The miniature and its draft, prepared in `work` unless they are there."""
    from scripts.fakehub import checkpoint
    from toolkit.commands.convert import convert

    for name, make in (("bloom", checkpoint.miniature), ("draft", checkpoint.draft)):
        if not (work / name).exists():
            make(work / f"{name}-source")
            convert(work / f"{name}-source", work / name)
    return work / "bloom", work / "draft"


if __name__ == "__main__":
    sys.exit(main())
