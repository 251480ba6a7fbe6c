"""Forecasts of several machines: what goes over the wire, and that more machines never cost time on a fast wire."""

from __future__ import annotations

import pytest

from runner.errors import BloomdeskError
from runner.estimate.family import hyperparameters
from runner.estimate.forecast import forecast
from runner.estimate.machines import Network, forecast_machines
from runner.estimate.rates import Rates

BLOOM = hyperparameters("bloom")
RATES = Rates(disk=3e9, memory=30e9, compute=70e9, decoded=12e9, int8=20e9, int4=20e9)
RAM, PROCESS, LENGTHS = 16 * 10**9, 5 * 10**8, (16, 64)
GIGABIT = 125e6


def test_the_bytes_of_a_token_of_the_real_model() -> None:
    """7 hidden sizes a block, 70 blocks, 2 bytes; each machine sends its part to each of the others."""
    whole = 7 * 14336 * 70 * 2
    assert [Network(count, GIGABIT).bytes_sent(BLOOM, 1) for count in (1, 2, 4)] == [
        0,
        whole // 2,
        whole * 3 // 4,
    ]
    assert Network(4, GIGABIT).bytes_sent(BLOOM, 128) == 128 * (whole * 3 // 4)


def test_one_machine_is_forecast_as_before() -> None:
    one = forecast_machines(BLOOM, RAM, PROCESS, RATES, *LENGTHS, Network(1, GIGABIT))
    alone = forecast(BLOOM, RAM, PROCESS, RATES, *LENGTHS)
    assert (one.seconds_per_token, one.prompt_seconds) == (alone.seconds_per_token, alone.prompt_seconds)


def test_n_machines_take_about_an_nth() -> None:
    def seconds(count: int) -> float:
        return forecast_machines(
            BLOOM, RAM, PROCESS, RATES, *LENGTHS, Network(count, GIGABIT)
        ).seconds_per_token

    one = seconds(1)
    for count in (2, 3, 4, 8):
        # What stays in the RAM of each is less to read for all.
        assert seconds(count) < one / (0.9 * count)
    assert (
        forecast_machines(
            BLOOM, 32 * 10**9, PROCESS, RATES, *LENGTHS, Network(16, GIGABIT)
        ).memory_plan.streamed_bytes
        == 0
    )


def test_a_slow_wire_shows() -> None:
    slow, fast = (
        forecast_machines(BLOOM, RAM, PROCESS, RATES, *LENGTHS, Network(4, rate)) for rate in (1e6, GIGABIT)
    )
    sent = Network(4, 1).bytes_sent(BLOOM, 1)
    assert slow.seconds_per_token - fast.seconds_per_token == pytest.approx(sent / 1e6 - sent / GIGABIT)


@pytest.mark.parametrize(("machines", "rate"), [(0, 1.0), (2, 0.0)])
def test_impossible_networks_are_refused(machines: int, rate: float) -> None:
    with pytest.raises(BloomdeskError):
        Network(machines, rate)
