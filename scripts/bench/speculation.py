"""How many tokens a pass gives with a draft, with lookup and with both, and whether they are the plain ones.

    python -m scripts.bench.speculation --work WORK --json speculation.json

On the miniature with the draft that was trained beside it, over three sets of prompts:

    unseen   200 of miniature/unseen.jsonl, a third of each kind
    edit     an SQL command that selects, counts or deletes, then the question for another one on the same rows
    table    three rows of questions with their commands, then the question of a fourth that differs in its values

The latter two are texts that repeat themselves, in all that the miniature knows; none was chosen by what comes out.
Every answer is compared with that of plain decoding, token by token. Tokens a pass count every pass, the prompt's
included, which can give but one; beside it stands what the passes after that one gave. How much is proposed depends on
what passes and proposals take on the machine, so the figures of two runs differ a little, and the tokens do not.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import runner
from runner.generation.model import Model
from runner.generation.options import GenerationOptions
from scripts.bench import turns
from scripts.bench.harness import Column, save, table
from scripts.bench.peers.forms import convert, is_prepared
from scripts.bench.turns import CannotRun, machine, say
from scripts.fakehub import checkpoint as make_checkpoint
from scripts.miniature.texts import KINDS, Text, draw_texts

MOST_TOKENS = 104  # of an answer: no text of the miniature is longer
ROWS_OF_A_TABLE = 3
TEXT_SEED, TEXTS = 7, 1500  # from which the sets that repeat themselves are taken
BATCH = 16


@dataclass(frozen=True)
class Way:
    """What proposes; in a batch the prompts of a set share their passes."""

    name: str
    speculate: str
    draft: bool = False
    batch: int | None = None


PLAIN = Way("plain", "off")
WAYS = (
    Way("lookup", "lookup"),
    Way("draft", "off", draft=True),
    Way("both", "lookup", draft=True),
    Way(f"both, batch of {BATCH}", "lookup", draft=True, batch=BATCH),
)


@dataclass
class Result:
    """One way over one set. A pass counts for each of the prompts that it carries."""

    prompts: str
    way: str
    count: int
    identical: int
    tokens: int
    passes: int
    proposed: int
    accepted: int
    drafting_seconds: float
    seconds: float

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / self.passes

    @property
    def after_the_prompt(self) -> float:
        """Tokens a pass without the passes of the prompts and the token that each of these gives."""
        return (self.tokens - self.count) / (self.passes - self.count)

    def as_json(self) -> dict[str, Any]:
        rates = {"tokens_per_pass": self.tokens_per_pass, "after_the_prompt": self.after_the_prompt}
        return asdict(self) | rates


def measure(
    model: Model, draft: Path, name: str, prompts: Sequence[str], way: Way, expected: Sequence[list[int]]
) -> tuple[Result, list[list[int]]]:
    """Run all prompts one way; what came of it, and the answers. Nothing is compared where nothing is expected."""
    options = {"speculate": way.speculate, "draft": draft if way.draft else None}
    result = Result(name, way.name, len(prompts), 0, 0, 0, 0, 0, 0.0, 0.0)
    answers: list[list[int]] = [[] for _ in prompts]
    began = time.perf_counter()
    if way.batch:
        requests = [model.requests(prompt, MOST_TOKENS)[0] for prompt in prompts]
        runs = [model.batch(requests, GenerationOptions(MOST_TOKENS, batch=way.batch, **options))]
        for found in runs[0].run():
            answers[found.index] = list(found.ids)
            result.passes += found.passes
    else:
        runs = []
        for index, prompt in enumerate(prompts):
            generation = model.generate(prompt, max_new_tokens=MOST_TOKENS, **options)
            answers[index] = list(generation)
            result.passes += generation.passes
            runs.append(generation)
    result.seconds = time.perf_counter() - began
    result.tokens = sum(map(len, answers))
    result.proposed, result.accepted = (sum(run.proposed for run in runs), sum(run.accepted for run in runs))
    result.drafting_seconds = sum(run.drafting_seconds for run in runs)
    result.identical = sum(map(list.__eq__, answers, expected or answers))
    return result, answers


def unseen(count: int) -> list[str]:
    """`count` of the unseen prompts, as many of each kind as can be."""
    text = (make_checkpoint.MINIATURE / "unseen.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    by_kind = {kind: [line["prompt"] for line in lines if line["kind"] == kind] for kind in KINDS}
    turns_ = zip(*by_kind.values(), strict=True)
    return [prompt for group in turns_ for prompt in group][:count]


def edits(texts: Sequence[Text], count: int) -> list[str]:
    """A command and the question for another one with the same condition on the same table."""
    groups: dict[str, list[Text]] = defaultdict(list)
    for text in texts:
        table, condition = re.search(r"FROM (\w+) WHERE (.*?)(?: ORDER BY \w+)?;", text.answer).groups()
        groups[f"{table} {condition}"].append(text)
    pairs = [(group[0], other) for group in groups.values() for other in group[1:]]
    pairs = [(first, second) for first, second in pairs if first.answer != second.answer]
    return [f"{first.prompt}{first.answer}\n{second.prompt}" for first, second in pairs][:count]


def tables(texts: Sequence[Text], count: int) -> list[str]:
    """Rows of one wording that differ in their values, and the question of the next row."""
    groups: dict[str, list[Text]] = defaultdict(list)
    for text in texts:
        groups[re.sub(r"'[^']*'|\d+", "_", text.answer)].append(text)
    found = []
    for group in groups.values():
        for first in range(0, len(group) - ROWS_OF_A_TABLE, ROWS_OF_A_TABLE + 1):
            *rows, last = group[first : first + ROWS_OF_A_TABLE + 1]
            found.append("".join(f"{row.prompt}{row.answer}\n" for row in rows) + last.prompt)
    return found[:count]


def prompt_sets(count: int, repeating: int) -> dict[str, list[str]]:
    texts = draw_texts("sql", TEXTS, TEXT_SEED, unseen=True)
    return {"unseen": unseen(count), "edit": edits(texts, repeating), "table": tables(texts, repeating)}


def checkpoints(work: Path) -> tuple[Path, Path]:
    """Prepared directories of the miniature and its draft in `work`."""
    made = []
    for name, make in (("miniature", make_checkpoint.miniature), ("draft", make_checkpoint.draft)):
        directory = work / name
        if not is_prepared(directory):
            make(work / f"{name}-source")
            convert(work / f"{name}-source", directory)
        made.append(directory)
    return made[0], made[1]


def run(given: argparse.Namespace, work: Path) -> list[Result]:
    """All ways over all sets, a set at a time."""
    directory, draft = checkpoints(work)
    model = runner.load(directory)
    results: list[Result] = []
    for name, prompts in prompt_sets(given.prompts, given.repeating).items():
        plain, expected = measure(model, draft, name, prompts, PLAIN, ())
        results.append(plain)
        for way in WAYS:
            results.append(measure(model, draft, name, prompts, way, expected)[0])
        for result in results[-1 - len(WAYS) :]:
            say(
                f"{name}, {result.way}: {result.tokens_per_pass:.2f} tokens a pass, {result.identical} identical"
            )
        save(given.json, "speculation", {"measured": [each.as_json() for each in results]}, work)
    return results


COLUMNS = (
    Column("prompts", "prompts"),
    Column("way", "way"),
    Column("answers", "count", "d"),
    Column("identical", "identical", "d"),
    Column("tokens", "tokens", "d"),
    Column("passes", "passes", "d"),
    Column("tokens/pass", "tokens_per_pass"),
    Column("after the prompt", "after_the_prompt"),
    Column("proposed", "proposed", "d"),
    Column("right", "right", ".1%"),
    Column("drafting s", "drafting_seconds"),
    Column("seconds", "seconds", ".1f"),
    Column("x plain", "times_plain"),
)


def rows_of(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The table's rows: each result, its share of draft tokens that were right, and its time beside the plain one's."""
    plain = {result.prompts: result.seconds for result in results if result.way == PLAIN.name}
    return [
        {
            **result.as_json(),
            "right": result.accepted / result.proposed if result.proposed else None,
            "times_plain": result.seconds / plain[result.prompts],
        }
        for result in results
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what proposals gain on the miniature.")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--prompts", type=int, default=200, metavar="N", help="unseen ones")
    parser.add_argument(
        "--repeating", type=int, default=24, metavar="N", help="of each kind that repeats itself"
    )
    parser.add_argument("--json", type=Path, metavar="OUT")
    given = parser.parse_args()
    work = given.work.resolve()
    try:
        with turns.sole_worker(work):
            turns.check_room(work, 2**26)
            results = run(given, work)
    except CannotRun as error:
        say(str(error))
        return 2
    print(f"{machine(work)}\n\n{table(COLUMNS, rows_of(results))}")
    return 0 if all(result.identical == result.count for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
