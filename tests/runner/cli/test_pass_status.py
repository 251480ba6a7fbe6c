"""What is said of a pass while it is under way."""

from __future__ import annotations

from runner.cli.pass_status import PassStatus


def test_a_long_pass_says_when_the_next_token_comes_and_the_last() -> None:
    clock, read = [100.0], [0]
    status = PassStatus(lambda: read[0], lambda: clock[0])
    clock[0], read[0] = 110.0, 5 * 10**9
    assert status.of(18, 72, left=4) == (
        "[part 18 of 72, 500 MB/s, next token in 30 s, all in at most 2 min 30 s]",
        "[part 18 of 72, 500 MB/s, next token in 30 s]",
        "[part 18 of 72, 500 MB/s]",
        "[part 18 of 72]",
    )
    clock[0] = 140.0
    status.of(72, 72, left=3)
    clock[0] = 145.0
    assert status.of(36, 72, left=3)[0] == "[part 36 of 72, next token in 5 s, all in at most 85 s]"


def test_a_short_pass_says_where_it_is() -> None:
    clock = [0.0]
    status = PassStatus(lambda: 0, lambda: clock[0])
    clock[0] = 0.5
    assert status.of(36, 72, left=3) == ("[part 36 of 72]", "[part 36 of 72]")
    assert PassStatus(lambda: 0, lambda: 7.0).of(1, 72)[-1] == "[part 1 of 72]"
