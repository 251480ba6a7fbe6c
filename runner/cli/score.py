"""The command `score`: the perplexity of a long text, or the log-probability of each line of a file."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.cli import machines
from runner.cli.guard import note, status_after
from runner.cli.pass_status import PassStatus
from runner.cli.prompts import lines_of, parsed_line, require_known, require_own_ids
from runner.cli.report import Row, print_rows
from runner.cli.results import Results, model_of, require_usable_name
from runner.cli.terminal import StatusLine
from runner.errors import BloomdeskError, reading
from runner.units import duration, number

if TYPE_CHECKING:
    from runner.generation.model import Model
    from runner.generation.scorer import ScoredText, Text

DEFAULT_CONTEXT, DEFAULT_STRIDE = 2048, 512
# Of a line.
FIELDS = ("text", "context", "continuation", "id")
# Bytes; far above what anybody waits for.
LARGEST_TEXT = 2**30


@dataclass(frozen=True)
class ScoreOptions:
    """What to score: a `.txt` in windows of `context` tokens, each `stride` further, or the lines of a `.jsonl`."""

    directory: Path
    file: Path
    out: Path | None = None
    ram: str | None = None
    as_json: bool = False
    context: int | None = None
    stride: int | None = None
    also: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Line:
    """Line number `line`, from 1, of a file of texts: a `context`, or none, and the `continuation` that is scored."""

    index: int
    line: int
    context: str | None
    continuation: str
    id: str | int | None = None

    @property
    def key(self) -> tuple[str, str | int]:
        return ("index", self.index) if self.id is None else ("id", self.id)

    @property
    def identity(self) -> dict[str, object]:
        """The field of a result that says which text it is of."""
        text = json.dumps([self.context, self.continuation])
        return {"text_sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}


@machines.awaited()
def score(options: ScoreOptions) -> int:
    """Exit status, after the scores were printed or written. Raises `BloomdeskError` for what cannot be scored."""
    if machines.follows(options.directory):
        return machines.follow(options.directory, options.ram, _asked(options))
    if options.out is not None:
        require_usable_name(options.out, options.file)
    if options.file.suffix == ".jsonl":
        if options.context is not None or options.stride is not None:
            raise BloomdeskError(
                f"--context and --stride are for a long text, and {options.file} has lines of texts",
                "leave them out",
            )
        return _score_lines(options)
    if options.file.suffix == ".txt":
        return _score_text(_with_windows(options))
    raise BloomdeskError(
        f"{options.file} is no file to score: its name must end in .txt or .jsonl",
        'a .txt is one text; each line of a .jsonl is {"text": ...} or {"context": ..., "continuation": ...}',
    )


def _with_windows(options: ScoreOptions) -> ScoreOptions:
    context = DEFAULT_CONTEXT if options.context is None else options.context
    if context < 2:
        raise BloomdeskError(f"--context must be at least 2 tokens, found {context}")
    stride = min(DEFAULT_STRIDE, context // 2) if options.stride is None else options.stride
    if not 1 <= stride < context:
        raise BloomdeskError(f"--stride must be at least 1 and below --context, found {stride} and {context}")
    return replace(options, context=context, stride=stride)


def _score_text(options: ScoreOptions) -> int:
    with reading(options.file):
        if options.file.stat().st_size > LARGEST_TEXT:
            raise BloomdeskError(f"{options.file} is larger than {LARGEST_TEXT:,} bytes")
        try:
            # Ends of lines as they are.
            text = options.file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise BloomdeskError(f"{options.file} is not valid UTF-8 text") from None
    with _opened(options) as model:
        return _score_windows(model, options, text)


def _score_windows(model: Model, options: ScoreOptions, text: str) -> int:
    from runner.generation.scorer import windows

    texts = list(windows(model.tokenizer.encode(text), options.context, options.stride))
    if not texts:
        raise BloomdeskError(f"{options.file} has fewer than 2 tokens: nothing can be scored")
    identity = {
        "text_sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
        "context": options.context,
        "stride": options.stride,
    }
    done: dict[int, Mapping[str, Any]] = {}
    start = time.perf_counter()
    with _results(options, [Window(each.index, identity) for each in texts]) as results:
        if results is not None:
            done.update(results.lines)
        left = [each for each in texts if each.index not in done]

        def write(found: ScoredText) -> None:
            line = {
                "begin": found.text.index * options.stride,
                "tokens": len(found.scores),
                "logprob": found.logprob,
            }
            done[found.text.index] = line
            if results is not None:
                results.append(found.text.index, {**identity, **line})

        status = _run(model, left, write, len(done))
    if status:
        return status
    scored = sum(line["tokens"] for line in done.values())
    logprob = math.fsum(line["logprob"] for line in done.values())
    fields = {
        "tokens": scored,
        "logprob": logprob,
        "perplexity": _perplexity(-logprob / scored),
        "bits_per_byte": -logprob / math.log(2) / len(text.encode()),
        "context": options.context,
        "stride": options.stride,
    }
    shown = "beyond all numbers" if fields["perplexity"] is None else f"{fields['perplexity']:.4f}"
    perplexity = f"{shown}, {fields['bits_per_byte']:.4f} bits a byte"
    how = f"{scored:,} tokens in {len(texts)} windows of {options.context:,}, each {options.stride:,} further"
    rows = [
        Row("perplexity", perplexity, fields),
        Row("of", f"{how}; {duration(time.perf_counter() - start)}"),
    ]
    print_rows(rows, as_json=options.as_json)
    return 0


def _perplexity(loss: float) -> float | None:
    """None if it is more than a float64 holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return None


@dataclass(frozen=True)
class Window:
    """A window of a long text, as results know it."""

    index: int
    identity: Mapping[str, object]

    @property
    def key(self) -> tuple[str, str | int]:
        return "index", self.index


def _score_lines(options: ScoreOptions) -> int:
    with reading(options.file):
        lines = tuple(_lines(options.file))
    if not lines:
        raise BloomdeskError(f"{options.file} holds no text")
    require_own_ids(options.file, lines)
    with _opened(options) as model:
        return _score_lines_with(model, options, lines)


def _score_lines_with(model: Model, options: ScoreOptions, lines: Sequence[Line]) -> int:
    texts = [_tokens(options, line, model) for line in lines]
    by_index = {line.index: line for line in lines}
    start, tokens = time.perf_counter(), 0
    with _results(options, lines) as results:
        left = [text for text in texts if results is None or text.index not in results.done]

        def write(found: ScoredText) -> None:
            nonlocal tokens
            line = by_index[found.text.index]
            named = {} if line.id is None else {"id": line.id}
            scored = [each.logprob for each in found.scores]
            # The first token of a text has nothing before it.
            unknown = [None] if line.context is None else []
            result = {
                **named,
                "tokens": list(found.text.ids[found.text.first - len(unknown) :]),
                "logprob": found.logprob,
                "token_logprobs": [*unknown, *scored],
                "is_greedy": found.is_greedy,
            }
            tokens += len(scored)
            if results is None:
                print(json.dumps({"index": line.index, **result}), flush=True)
            else:
                results.append(line.index, {**line.identity, **result})

        status = _run(model, left, write, len(texts) - len(left))
    seconds = time.perf_counter() - start
    note(f"{len(left)} texts, {tokens:,} tokens scored, {number(len(left) / seconds)} texts a second")
    return status


def _lines(path: Path) -> Iterator[Line]:
    filled = ((number, line) for number, line in lines_of(path) if line.strip())
    for index, (line_number, line) in enumerate(filled):
        where = f"{path}, line {line_number}"
        expected = '"text", or "context" and "continuation", each a text'
        given, identity = parsed_line(where, line, expected)
        require_known(where, given, FIELDS)
        texts = [given.get(name) for name in ("text", "context", "continuation")]
        kinds = [isinstance(each, str) for each in texts]
        if kinds == [True, False, False] and not given.keys() & {"context", "continuation"}:
            yield Line(index, line_number, None, given["text"], identity)
        elif kinds == [False, True, True] and "text" not in given:
            yield Line(index, line_number, given["context"], given["continuation"], identity)
        else:
            raise BloomdeskError(f"{where}: expected {expected}")


def _tokens(options: ScoreOptions, line: Line, model: Model) -> Text:
    """The tokens of a line. Spaces at the end of a context belong to the continuation, as its first token has them."""
    from runner.generation.scorer import Text

    where = f"{options.file}, line {line.line}"

    def encode(text: str) -> list[int]:
        try:
            return model.tokenizer.encode(text)
        except BloomdeskError:
            raise BloomdeskError(
                f"{where}: not valid UTF-8 text", "give it without lone surrogates"
            ) from None

    if line.context is None:
        ids, first = encode(line.continuation), 1
    else:
        context = line.context.rstrip()
        ids, first = encode(line.context + line.continuation), len(encode(context))
        if not first:
            bos = model.weights.model.bos_token_id
            if bos is None:
                raise BloomdeskError(
                    f"{where}: an empty context, and the model has no token that begins a text"
                )
            ids, first = [bos, *ids], 1
    if first >= len(ids):
        raise BloomdeskError(f"{where}: no token is left to score", "give a text of at least two tokens")
    return Text(line.index, ids, first)


def _results(options: ScoreOptions, items: Sequence[Any]) -> Results | nullcontext[None]:
    if options.out is None:
        return nullcontext()
    return Results(options.out, items, model_of(options.directory, options.also))


def _run(model: Model, texts: Sequence[Text], write: Any, before: int) -> int:
    if not texts:
        return 0
    line, done = StatusLine(sys.stderr), before
    count = before + len(texts)
    status_of = PassStatus(lambda: model.weights.stream.traffic.bytes_read)

    def on_part(part: int, parts: int) -> None:
        line.show(*(f"{done} of {count} done {status}" for status in status_of.of(part, parts)))

    scorer = model.scorer(texts, on_part)
    try:
        for found in scorer.run():
            line.clear()
            done += 1
            write(found)
    except KeyboardInterrupt as stop:
        line.clear()
        print(f"interrupted: {done} of {count} are done", file=sys.stderr)
        return status_after(stop)
    finally:
        line.clear()
    return 0


def _opened(options: ScoreOptions) -> AbstractContextManager[Model]:
    return machines.opened(options.directory, options.ram, _asked(options), options.also)


def _asked(options: ScoreOptions) -> dict[str, object]:
    return {"command": "score", "FILE": options.file.name}
