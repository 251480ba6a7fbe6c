"""The engine: who comes and goes between passes, what it says when it ends, and what a failed pass costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from runner.errors import BloomdeskError
from runner.generation.model import Model
from runner.generation.options import Sampling
from runner.generation.sequence import Request, Restored
from runner.server.engine import Engine, Growth, Stopped, Unavailable, Work
from tests.support.grammars import LATER
from tests.support.prompts import plain, tokens
from tests.support.serving import GatedModel, engine_of, wait_for


class Ear:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.growths: list[Growth] = []
        self.failure: BloomdeskError | None = None

    def grown(self, growths: Sequence[Growth]) -> None:
        self.growths += growths

    def failed(self, failure: BloomdeskError) -> None:
        self.failure = failure

    def ids(self, place: int = 0) -> list[int]:
        return [token for growth in self.growths if growth.place == place for token in growth.ids]

    @property
    def ends(self) -> int:
        return sum(growth.end is not None for growth in self.growths)


@pytest.fixture
def engine(gated: GatedModel):
    engine = engine_of(gated)
    engine.start()
    wait_for(lambda: engine.is_ready)
    yield engine
    engine.stop()
    gated.let(1000)
    assert engine.join(60)


def submitted(engine: Engine, *requests: Request) -> tuple[Work, Ear]:
    ear = Ear()
    work = Work(requests, ear)
    engine.submit(work)
    return work, ear


def test_requests_join_the_next_pass_and_have_the_tokens_of_their_own_run(
    engine: Engine, gated: GatedModel, model: Model
) -> None:
    first, second = Request(tokens(7, 1), 5), Request(tokens(9, 2), 4)
    _, one = submitted(engine, first)
    wait_for(lambda: len(gated.begun) == 1)
    _, other = submitted(engine, second, first)
    gated.let(1)
    wait_for(lambda: len(gated.begun) == 2)
    assert gated.begun == [1, 3]
    gated.let(100)
    wait_for(lambda: one.ends == 1 and other.ends == 2)
    expected = plain(model, [first, second])
    assert [one.ids(), other.ids(0), other.ids(1)] == [expected[0], expected[1], expected[0]]


def test_cancelled_work_is_in_no_further_pass(engine: Engine, gated: GatedModel, model: Model) -> None:
    stays, goes = Request(tokens(7, 1), 30), Request(tokens(9, 2), 30)
    _, one = submitted(engine, stays)
    work, other = submitted(engine, goes)
    wait_for(lambda: len(gated.begun) >= 1)
    gated.let(1)
    wait_for(lambda: len(gated.begun) == 2)
    engine.cancel(work)
    heard = len(other.growths)
    gated.let(1)
    wait_for(lambda: len(gated.begun) == 3)
    assert gated.begun[-1] == 1 and len(other.growths) == heard + 1
    gated.let(100)
    wait_for(lambda: one.ends == 1)
    assert one.ids() == plain(model, [stays])[0]
    assert other.ends == 0 and engine.waiting == 0


def test_work_that_is_cancelled_before_it_joins_makes_no_pass(engine: Engine, gated: GatedModel) -> None:
    _, one = submitted(engine, Request(tokens(7, 1), 2))
    wait_for(lambda: len(gated.begun) == 1)
    work, other = submitted(engine, Request(tokens(9, 2), 2))
    engine.cancel(work)
    gated.let(100)
    wait_for(lambda: one.ends == 1)
    assert set(gated.begun) == {1} and not other.growths


def test_at_the_end_the_pass_is_finished_and_everybody_is_told(engine: Engine, gated: GatedModel) -> None:
    _, one = submitted(engine, Request(tokens(7, 1), 20))
    wait_for(lambda: len(gated.begun) == 1)
    _, late = submitted(engine, Request(tokens(7, 3), 20))
    engine.stop()
    assert not engine.join(0.01)
    gated.let(1)
    assert engine.join(60)
    assert len(gated.begun) == 1 and one.growths
    assert isinstance(one.failure, Stopped) and isinstance(late.failure, Stopped)
    with pytest.raises(Stopped):
        submitted(engine, Request(tokens(7, 1), 20))


def test_a_pass_that_fails_ends_its_texts_and_the_next_request_is_answered(
    engine: Engine, gated: GatedModel, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Model, "forward_all", fail)
        gated.let(1)
        _, one = submitted(engine, Request(tokens(7, 1), 4))
        wait_for(lambda: one.failure is not None)
    assert "Input/output error" in one.failure.message
    gated.let(100)
    request = Request(tokens(7, 1), 4)
    _, other = submitted(engine, request)
    wait_for(lambda: other.ends == 1)
    assert other.ids() == plain(model, [request])[0]


class Deaf(Ear):
    """Fails at what it hears."""

    def grown(self, growths: Sequence[Growth]) -> None:
        raise LookupError("deaf")


def works_that_fail(model: Model) -> dict[str, tuple[Work, str]]:
    """Works that fail as they are begun, in a pass, or as they are told of it; and the words of their failures."""
    good = Request(tokens(5, 3), 4)
    later = Sampling(json_schema=json.dumps(LATER))
    return {
        "begun": (Work((good, good), Ear(), (Restored(), Restored(ids=None))), "unexpected TypeError"),
        "restored": (
            Work(tuple(model.requests("x", 20, later)), Ear(), (Restored(ids=[5]),)),
            "cannot be followed",
        ),
        "in a pass": (
            Work((good, replace(good, sampling=Sampling(logit_bias={10**6: 1}))), Ear()),
            "IndexError",
        ),
        "by its grammar": (Work(tuple(model.requests("x", 20, later)), Ear()), "Current row has"),
        "told": (Work((good,), Deaf()), "unexpected LookupError: deaf"),
    }


@pytest.mark.parametrize("name", ["begun", "restored", "in a pass", "by its grammar", "told"])
def test_a_work_that_fails_ends_alone(engine: Engine, gated: GatedModel, model: Model, name: str) -> None:
    work, words = works_that_fail(model)[name]
    request = Request(tokens(7, 1), 6)
    _, before = submitted(engine, request)
    wait_for(lambda: len(gated.begun) == 1)
    engine.submit(work)
    _, beside = submitted(engine, request)
    gated.let(100)
    wait_for(lambda: work.listener.failure is not None)
    wait_for(lambda: before.ends == beside.ends == 1)
    assert words in work.listener.failure.message
    assert before.ids() == beside.ids() == plain(model, [request])[0]
    assert engine.is_ready and engine.waiting == 0 and engine.queue() == []


def test_a_model_that_cannot_be_opened_is_said() -> None:
    def fail() -> Model:
        raise BloomdeskError("it is not complete", "prepare it")

    engine = engine_of(fail)
    with pytest.raises(Unavailable, match="still loading"):
        engine.opened()
    engine.start()
    assert engine.join(60)
    with pytest.raises(Unavailable, match="it is not complete"):
        engine.opened()


def test_what_needs_no_pass_makes_none(engine: Engine, gated: GatedModel) -> None:
    _, ear = submitted(engine, Request(tokens(1, 1), 0, Sampling(logprobs=1), scores_prompt=True))
    wait_for(lambda: ear.ends == 1)
    assert gated.begun == []


def test_progress_says_where_the_pass_is(engine: Engine, gated: GatedModel) -> None:
    _, ear = submitted(engine, Request(tokens(7, 1), 2))
    wait_for(lambda: len(gated.begun) == 1)
    assert engine.progress.number == 1 and engine.progress.waiting + engine.progress.active == 1
    gated.let(1)
    wait_for(lambda: len(gated.begun) == 2)
    assert engine.progress.number == 2
    gated.let(10)
    wait_for(lambda: ear.ends == 1)
    wait_for(lambda: engine.progress.active == 0)
