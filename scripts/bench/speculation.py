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
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import runner
from runner.generation.model import Model
from runner.generation.options import GenerationOptions
from scripts.bench import turns
from scripts.bench.harness import Column, Row, save, table
from scripts.bench.peers.forms import convert, is_prepared
from scripts.bench.turns import CannotRun, machine, say
from scripts.fakehub import checkpoint as make_checkpoint
from scripts.miniature.files import unseen_lines
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


def measure(
    model: Model, draft: Path, name: str, prompts: Sequence[str], way: Way, expected: Sequence[list[int]]
) -> tuple[Row, list[list[int]]]:
    """Run all prompts one way; what came of it, and the answers. Nothing is compared where nothing is expected.

    A pass counts for each of the prompts that it carries.
    """
    options = {"speculate": way.speculate, "draft": draft if way.draft else None}
    runs, answers, began = [], [], time.perf_counter()
    if way.batch:
        requests = [model.requests(prompt, MOST_TOKENS)[0] for prompt in prompts]
        runs = [model.batch(requests, GenerationOptions(MOST_TOKENS, batch=way.batch, **options))]
        done = sorted(runs[0].run(), key=lambda each: each.index)
        answers, passes = [list(each.ids) for each in done], sum(each.passes for each in done)
    else:
        for prompt in prompts:
            runs.append(model.generate(prompt, max_new_tokens=MOST_TOKENS, **options))
            answers.append(list(runs[-1]))
        passes = sum(each.passes for each in runs)
    count, tokens = len(prompts), sum(map(len, answers))
    summed = ("proposed", "accepted", "drafting_seconds")
    return {
        "prompts": name,
        "way": way.name,
        "count": count,
        "identical": sum(map(list.__eq__, answers, expected or answers)),
        "tokens": tokens,
        "passes": passes,
        **{fact: sum(getattr(each, fact) for each in runs) for fact in summed},
        "seconds": time.perf_counter() - began,
        "tokens_per_pass": tokens / passes,
        # Without the passes of the prompts and the token that each of these gives.
        "after_the_prompt": (tokens - count) / (passes - count),
    }, answers


def unseen(count: int) -> list[str]:
    """`count` of the unseen prompts, as many of each kind as can be."""
    lines = unseen_lines(make_checkpoint.MINIATURE)
    by_kind = {kind: [line["prompt"] for line in lines if line["kind"] == kind] for kind in KINDS}
    turns_ = zip(*by_kind.values(), strict=True)
    return [prompt for group in turns_ for prompt in group][:count]


def edits(texts: Sequence[Text], count: int) -> list[str]:
    """A command and the question for another one with the same condition on the same table."""
    groups: dict[str, list[Text]] = defaultdict(list)
    for text in texts:
        table, condition = re.search(r"FROM (\w+) WHERE (.*?)(?: ORDER BY \w+)?$", text.answer).groups()
        groups[f"{table} {condition}"].append(text)
    pairs = [(group[0], other) for group in groups.values() for other in group[1:]]
    pairs = [(first, second) for first, second in pairs if first.answer.strip() != second.answer.strip()]
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


def prepared(work: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The prepared directory of the miniature or its draft in `work`."""
    if not is_prepared(work / name):
        make(work / f"{name}-source")
    return convert(work / f"{name}-source", work / name)


def run(given: argparse.Namespace, work: Path) -> list[Row]:
    """All ways over all sets, a set at a time."""
    directory = prepared(work, "miniature", make_checkpoint.miniature)
    draft = prepared(work, "draft", make_checkpoint.draft)
    model = runner.load(directory)
    rows: list[Row] = []
    for name, prompts in prompt_sets(given.prompts, given.repeating).items():
        plain, expected = measure(model, draft, name, prompts, PLAIN, ())
        of_set = [plain, *(measure(model, draft, name, prompts, way, expected)[0] for way in WAYS)]
        for row in of_set:
            gain = f"{row['tokens_per_pass']:.2f} tokens a pass, {row['identical']} identical"
            say(f"{name}, {row['way']}: {gain}")
        rows += of_set
        save(given.json, "speculation", {"measured": rows}, work)
    return rows


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


def compared(rows: Sequence[Row]) -> list[Row]:
    """Each row with its share of draft tokens that were right, and its time beside the plain one's."""
    plain = {row["prompts"]: row["seconds"] for row in rows if row["way"] == PLAIN.name}
    return [
        {
            **row,
            "right": row["accepted"] / row["proposed"] if row["proposed"] else None,
            "times_plain": row["seconds"] / plain[row["prompts"]],
        }
        for row in rows
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
            rows = run(given, work)
    except CannotRun as error:
        say(str(error))
        return 2
    print(f"{machine(work)}\n\n{table(COLUMNS, compared(rows))}")
    return 0 if all(row["identical"] == row["count"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
