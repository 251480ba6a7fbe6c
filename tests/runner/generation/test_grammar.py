"""Grammars: what may follow and what must, at any place of a text, and which constraints are refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runner
from runner.errors import BloomdeskError
from runner.generation.grammar import Grammar, GrammarError, Grammars, check, check_in_time
from runner.generation.model import Model
from runner.generation.options import Sampling, with_fields
from scripts.torture.grammar import CASES, DATE, Case
from tests.support.grammars import ENDLESS, MANY_WAYS
from tests.support.streaming import LONGEST

IN_CASES = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def model(prepared) -> Model:
    """Of random weights, with the miniature's tokenizer and rows without a token."""
    return runner.load(prepared()[1])


def grammar_of(model: Model, case: Case) -> Grammar:
    return model.grammars.of(case.sampling())


def walk(grammar: Grammar, seed: int, most: int = 200) -> list[tuple[list[int], list[int], list[int]]]:
    """(ids so far, allowed ids, forced ids) at each place of a text that is drawn among the allowed tokens."""
    matcher, source, ids, found = grammar.matcher(), random.Random(seed), [], []
    while len(ids) < most and not matcher.is_over(ids):
        allowed, forced = matcher.allowed(ids).tolist(), matcher.forced(ids)
        found.append((list(ids), allowed, forced))
        token = source.choice(allowed)
        if token == 2:
            break
        ids.append(token)
    return [*found, (list(ids), [], [])]


# The matcher.


@IN_CASES
def test_a_place_is_known_by_its_tokens_alone(model: Model, case: Case) -> None:
    """However it was reached: token by token, at once, from elsewhere, or by a fork."""
    grammar = grammar_of(model, case)
    places = walk(grammar, 1)
    wanderer, source = grammar.matcher(), random.Random(2)
    for ids, allowed, forced in random.Random(3).sample(places[:-1], min(25, len(places) - 1)):
        assert wanderer.forced(ids) == grammar.matcher().forced(ids) == forced
        fork = wanderer.fork()
        fork.allowed([*ids, source.choice([token for token in allowed if token != 2] or forced)])
        assert wanderer.allowed(ids).tolist() == grammar.matcher().allowed(ids).tolist() == allowed
        assert (2 in allowed) == wanderer.is_accepting(ids)
        assert not forced or allowed == forced[:1]


@IN_CASES
def test_allowed_are_the_tokens_that_can_be_followed_and_no_other(model: Model, case: Case) -> None:
    """No padding, no row without a token, no special one but the end of the text."""
    grammar, vocabulary = grammar_of(model, case), set(model.tokenizer.vocabulary.values())
    assert max(vocabulary) < model.weights.model.vocab_size - 1
    for ids, allowed, forced in walk(grammar, 4)[:-1][:12]:
        assert set(allowed) <= vocabulary - {0, 1, 3}
        matcher = grammar.matcher()
        if not forced:
            ordinary = sorted(vocabulary - {0, 1, 2, 3})
            assert [token for token in ordinary if matcher.possible(ids, [token])] == [
                token for token in allowed if token != 2
            ]
        assert matcher.possible(ids, [*forced, 3, 3]) == len(forced)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(CASES), st.integers(0, 2**32))
def test_what_is_drawn_is_valid_and_forced_tokens_are_the_tokenizers(
    model: Model, case: Case, seed: int
) -> None:
    grammar = grammar_of(model, case)
    ids = walk(grammar, seed)[-1][0]
    text = model.tokenizer.decode(ids)
    assert case.is_valid(text) and grammar.accepts(text.encode())
    assert not grammar.accepts(text.encode()[:-1] + b"\x00")
    start = grammar.matcher().forced([])
    assert start == model.tokenizer.encode(text)[: len(start)]


def schemas() -> st.SearchStrategy[dict]:
    """JSON schemas of bounded values, nested in any way."""
    leaves = st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": [1, {"ü": None}]}]),
        st.lists(st.text(max_size=5), min_size=1, max_size=3).map(lambda texts: {"enum": texts}),
        st.integers(0, 6).map(lambda most: {"type": "string", "maxLength": most}),
        st.tuples(st.integers(-99, 99), st.integers(0, 300)).map(
            lambda ends: {"type": "integer", "minimum": ends[0], "maximum": ends[0] + ends[1]}
        ),
    )
    names = st.text(st.characters(codec="utf-8"), max_size=4)

    def nested(inner: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
        return st.one_of(
            st.tuples(inner, st.integers(0, 2)).map(
                lambda found: {"type": "array", "items": found[0], "minItems": found[1], "maxItems": 3}
            ),
            st.lists(inner, min_size=1, max_size=3).map(lambda found: {"anyOf": found}),
            st.dictionaries(names, st.tuples(inner, st.booleans()), max_size=3).map(
                lambda found: {
                    "type": "object",
                    "properties": {name: schema for name, (schema, _) in found.items()},
                    "required": [name for name, (_, is_needed) in found.items() if is_needed],
                    "additionalProperties": False,
                }
            ),
        )

    return st.recursive(leaves, nested, max_leaves=6)


def fits(value: object, schema: dict) -> bool:
    """Whether a value is valid by one of `schemas`."""
    if "anyOf" in schema:
        return any(fits(value, each) for each in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kinds = {
        "boolean": bool,
        "null": type(None),
        "string": str,
        "integer": int,
        "array": list,
        "object": dict,
    }
    if type(value) is not kinds[schema["type"]]:
        return False
    match value:
        case str():
            return len(value) <= schema["maxLength"]
        case list():
            return schema["minItems"] <= len(value) <= 3 and all(fits(x, schema["items"]) for x in value)
        case dict():
            known = schema["properties"]
            fitting = all(name in known and fits(inner, known[name]) for name, inner in value.items())
            return fitting and set(schema["required"]) <= set(value)
        case bool() | None:
            return True
        case int():
            return schema["minimum"] <= value <= schema["maximum"]
    return False


@settings(max_examples=60, deadline=None)
@given(schemas(), st.integers(0, 2**32))
def test_whatever_the_schema_what_is_drawn_fits(model: Model, schema: dict, seed: int) -> None:
    grammar = model.grammars.of(Sampling(json_schema=json.dumps(schema, ensure_ascii=False)))
    places = walk(grammar, seed, 2000)
    text = model.tokenizer.decode(places[-1][0])
    assert fits(json.loads(text), schema)
    for ids, allowed, forced in places[:-1:7]:
        assert grammar.matcher().forced(ids) == forced and grammar.matcher().allowed(ids).tolist() == allowed


def test_an_interruption_inside_the_matcher_changes_nothing(model: Model) -> None:
    grammar = grammar_of(model, CASES[0])
    ids, allowed, _ = walk(grammar, 1)[20]

    class Interrupting(list):
        def __getitem__(self, key: object) -> object:
            if isinstance(key, slice) and key.start is not None:
                raise KeyboardInterrupt
            return super().__getitem__(key)

    matcher = grammar.matcher()
    matcher.allowed(ids[:7])
    with pytest.raises(KeyboardInterrupt):
        matcher.allowed(Interrupting(ids))
    assert matcher.allowed(ids).tolist() == allowed


def test_a_text_that_is_not_of_the_grammar_is_an_error(model: Model) -> None:
    with pytest.raises(GrammarError, match="beyond 1 tokens"):
        grammar_of(model, CASES[2]).matcher().allowed(model.tokenizer.encode("x"))


# Options.


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"json_schema": '{"type": "strin"}'}, "the JSON schema cannot be used: Invalid type: strin"),
        ({"json_schema": "{"}, "not valid JSON"),
        ({"json_schema": "[1]"}, "it must be an object"),
        ({"json_schema": "false"}, "Unsatisfiable"),
        ({"json_schema": "[" * 100_000}, "not valid JSON|cannot be used"),
        ({"json_schema": '{"items":' * 300 + "{}" + "}" * 300}, "recursion"),
        ({"regex": "(ab"}, "the regular expression cannot be used: .*unclosed group$"),
        ({"regex": "(?=ab)"}, "look-ahead"),
        ({"regex": "(" * 20_000 + ")" * 20_000}, "cannot be used"),
        ({"grammar": "start: foo"}, 'the grammar cannot be used: .*unknown name: "foo"'),
        ({"grammar": "rubbish"}, "the grammar cannot be used"),
        ({"grammar": "start: " + "(" * 20_000}, "nested"),
    ],
)
def test_an_unsound_constraint_is_one_sentence(model: Model, wrong: dict[str, str], message: str) -> None:
    for use in (lambda: check(Sampling(**wrong)), lambda: model.generate("x", sampling=Sampling(**wrong))):
        with pytest.raises(BloomdeskError, match=message) as error:
            use()
        assert "\n" not in error.value.message and len(error.value.message) < 400


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"regex": "(a?){500}a{500}"}, "the regular expression cannot be used: .*too many expressions"),
        (
            {"json_schema": '{"type": "string", "pattern": "^(a?){500}a{500}$"}'},
            "the JSON schema cannot be used",
        ),
        ({"json_schema": '{"$ref": "#"}'}, "the JSON schema cannot be used: .*NoExtension"),
        (
            {"json_schema": json.dumps(MANY_WAYS)},
            "the JSON schema cannot be used: .*Current row has 4940 items",
        ),
        ({"grammar": "start: start"}, "the grammar cannot be used: .*NoExtension"),
    ],
)
def test_a_constraint_that_no_text_can_begin_by_is_refused_before_any_pass(
    model: Model, wrong: dict[str, str], message: str
) -> None:
    with pytest.raises(BloomdeskError, match=message) as error:
        model.requests("x", 4, Sampling(**wrong))
    assert "\n" not in error.value.message and len(error.value.message) < 400


@pytest.mark.slow
def test_a_check_ends_in_time_whatever_the_schema() -> None:
    check_in_time(Sampling(json_schema="{}"), LONGEST)
    with pytest.raises(BloomdeskError, match="the JSON schema cannot be used: Invalid type: strin"):
        check_in_time(Sampling(json_schema='{"type": "strin"}'), LONGEST)
    with pytest.raises(BloomdeskError, match="the JSON schema cannot be used: it takes longer than 1 s"):
        check_in_time(Sampling(json_schema=json.dumps(ENDLESS)), 1)


def test_a_schema_of_too_many_texts_is_refused(model: Model) -> None:
    with pytest.raises(BloomdeskError, match="too big"):
        model.requests(
            "x", 4, Sampling(json_schema=json.dumps({"enum": [f"text {n}" for n in range(50_000)]}))
        )


def test_whatever_llguidance_raises_is_an_error_of_the_constraint(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        pass

    def panic(*_: object, **__: object) -> None:
        raise Panic("assertion failed\n<backtrace>\n0: somewhere")

    import llguidance

    monkeypatch.setattr(llguidance, "LLMatcher", panic)
    panic.grammar_from_regex = str
    with pytest.raises(BloomdeskError, match=r"the regular expression cannot be used: assertion failed$"):
        model.requests("x", 4, Sampling(regex="never asked before"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"json_schema": "{}", "regex": "a"}, "json_schema and regex exclude each other"),
        ({"regex": "a", "grammar": "start: /a/"}, "regex and grammar exclude"),
        ({"regex": "a", "ignore_eos": True}, "regex and ignore_eos exclude"),
        ({"json_schema": {"type": "string"}}, '"json_schema" is a text, found'),
    ],
)
def test_contradictions_are_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(BloomdeskError, match=message):
        Sampling(**wrong)


def test_fields_of_a_line_take_the_place_of_a_constraint() -> None:
    before = Sampling(regex="a")
    assert with_fields(before, {"json_schema": {"type": "string"}}).constraint == (
        "json_schema",
        '{"type": "string"}',
    )
    assert with_fields(before, {"regex": None}).constraint is None
    assert with_fields(before, {"stop": "x"}).constraint == ("regex", "a")
    assert json.loads(with_fields(before, {"json_schema": True}).json_schema) is True
    for wrong in ({"regex": 3}, {"grammar": {}}, {"json_schema": 3}):
        with pytest.raises(BloomdeskError, match="is a text"):
            with_fields(before, wrong)
    with pytest.raises(BloomdeskError, match="exclude each other"):
        with_fields(before, {"regex": DATE, "grammar": "start: /a/"})


def test_a_missing_extra_is_said_with_its_command(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(BloomdeskError, match="needs llguidance") as error:
        runner.load(model.weights.stream.chunks[0].file.path.parent).generate(
            "x", sampling=Sampling(regex="a")
        )
    assert error.value.hint == "pip install 'bloomdesk[grammar]'"


def test_grammars_are_compiled_once_and_their_ram_counts(model: Model) -> None:
    grammars = Grammars(model.tokenizer, model.weights.model.vocab_size, {2})
    assert grammars.of(Sampling()) is None and grammars.nbytes == 0
    assert grammars.of(CASES[0].sampling()) is grammars.of(CASES[0].sampling(temperature=1.0, seed=2))
    object.__setattr__(grammars, "nbytes", 10**6)
    counted = replace(model, grammars=grammars).memory_request([9], 1)
    plain = replace(model, grammars=Grammars(model.tokenizer, 1024, {2})).memory_request([9], 1)
    assert counted.process - plain.process == 10**6
    with pytest.raises(BloomdeskError, match="no end-of-text token"):
        Grammars(model.tokenizer, 1024, ()).of(CASES[0].sampling())
