"""Validation: each line of a batch is checked before any is done."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from runner.errors import BloomdeskError
from runner.generation.model import Model
from runner.generation.sequence import Request
from runner.server.engine import Stopped, Unavailable
from runner.server.errors import ApiError, explained, quoted
from runner.server.jobs.batches import Batch
from runner.server.jobs.lines import lines_of, order_of, read_line
from runner.server.settings import Settings

# With as many the rest is not looked at.
MOST_ERRORS = 100
INVALID = "invalid_request"


class Validation:
    """The check of the file at `path`; `total` lines so far, and `errors` as OpenAI has them."""

    def __init__(
        self, batch: Batch, path: Path, settings: Settings, check: Callable[[Request], None]
    ) -> None:
        """`check` raises `BloomdeskError` for a request that can never fit."""
        self.total = 0
        self.errors: list[dict[str, Any]] = []
        self._batch, self._settings, self._check = batch, settings, check
        self._lines = lines_of(path, settings.most_body_bytes)
        self._numbers: dict[str, int] = {}
        # What has been found to fit.
        self._capacity = 0

    def go_on(self, model: Model, count: int) -> bool:
        """Check the next `count` lines; whether there is nothing more to check."""
        for line, data in islice(self._lines, count):
            self.total += 1
            if self.total > self._settings.most_lines:
                most = f"a batch may have up to {self._settings.most_lines:,} lines"
                self._add(line.number, ApiError(400, most, code="too_many_lines"))
                return True
            if error := self._error_of(line.number, data, model):
                self._add(line.number, error)
                if len(self.errors) == MOST_ERRORS:
                    return True
            count -= 1
        if count and not self.total:
            self._add(None, ApiError(400, "there is no line in the file", code="empty_file"))
        return count > 0

    def _error_of(self, number: int, data: bytes, model: Model) -> ApiError | None:
        """What is wrong with a line. Raises what is no fault of the line."""
        try:
            self._check_line(number, data, model)
        except ApiError as error:
            return error
        except (BloomdeskError, OSError, MemoryError):
            raise
        except Exception as error:
            return ApiError(500, f"unexpected {type(error).__name__}: {error}", code="failed")
        return None

    def _check_line(self, number: int, data: bytes, model: Model) -> None:
        line = read_line(data, self._batch.order.endpoint, self._settings.most_body_bytes)
        first = self._numbers.setdefault(line.custom_id, number)
        if first != number:
            raise ApiError(
                400,
                f"custom_id {quoted(line.custom_id)} is that of line {first}",
                "custom_id",
                "duplicate_custom_id",
            )
        order = order_of(line, number, self._batch, model, self._settings)
        largest = max(order.requests, key=lambda request: request.capacity)
        if largest.capacity > self._capacity:
            try:
                self._check(largest)
            except (Stopped, Unavailable):
                raise
            except BloomdeskError as error:
                raise explained(error, "body.max_tokens") from None
            self._capacity = largest.capacity

    def _add(self, number: int | None, error: ApiError) -> None:
        found = {"code": error.code or INVALID, "message": error.message, "param": error.param}
        self.errors.append({**found, "line": number})
