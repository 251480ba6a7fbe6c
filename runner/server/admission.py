"""Admission: which requests may wait for a pass, and when one that may not should come again."""

from __future__ import annotations

from http import HTTPStatus

from runner.errors import BloomdeskError
from runner.server.engine import Engine
from runner.server.errors import ApiError, explained
from runner.server.orders import Order

# Seconds.
SOONEST, LATEST = 1, 3600


def check_fits(order: Order, engine: Engine) -> None:
    """Raise `ApiError`, with the figures, if one of the requests can never fit."""
    try:
        # Of requests that differ in nothing else, the one with the most positions.
        engine.check(max(order.requests, key=lambda request: request.capacity))
    except BloomdeskError as error:
        raise explained(error, "max_tokens") from None


def admit(order: Order, engine: Engine, most_waiting: int) -> None:
    """Raise `ApiError` if too many wait already."""
    waiting, new = engine.waiting, len(order.requests)
    if new > most_waiting:
        raise ApiError(
            HTTPStatus.BAD_REQUEST, f"at most {most_waiting:,} texts of a request, found {new:,}", "n"
        )
    if waiting + new > most_waiting:
        seconds = min(LATEST, max(SOONEST, round(engine.seconds_to_room)))
        raise ApiError(
            HTTPStatus.TOO_MANY_REQUESTS,
            f"{waiting:,} texts are waiting for a pass, and at most {most_waiting:,} may; "
            f"try again in {seconds} s",
            code="queue_full",
            headers={"Retry-After": str(seconds)},
        )
