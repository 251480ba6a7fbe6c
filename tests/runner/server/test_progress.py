"""What clients that wait are told."""

from __future__ import annotations

from runner.server.progress import PassWatch, Progress


def test_words_say_pass_block_rate_and_seconds() -> None:
    found = Progress(3, 42, 72, 2.1e9, 22, 4, 0)
    assert found.words == "pass 3, block 41 of 70, 2.1 GB/s, 22 s to the next token"
    assert Progress(3, active=2).words == "pass 3"
    assert Progress(waiting=2).words == "2 waiting for a pass"


def test_a_watch_measures_the_pass() -> None:
    now, read = [10.0], [100]
    watch = PassWatch(lambda: read[0], lambda: now[0])
    assert watch.begin(1, 0) == Progress(1, active=1)
    now[0], read[0] = 14.0, 4100
    assert watch.after(2, 8, 1, 0) == Progress(1, 2, 8, 1000.0, 12.0, 1, 0)
    now[0] = 20.0
    watch.begin(2, 1)
    now[0] = 21.0
    assert watch.after(8, 8, 2, 1) == Progress(2, 8, 8, 0.0, 0.0, 2, 1)
