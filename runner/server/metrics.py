"""`/metrics`: numbers in Prometheus' text form, read when they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runner.server.engine import Engine
from runner.system import memory

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics(Collector):
    """The numbers of an engine, and how requests were answered."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # By path and status.
        self._requests: Counter[tuple[str, int]] = Counter()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def count(self, path: str, status: int) -> None:
        """Count a request; `path` is that of its route."""
        self._requests[path, status] += 1

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        totals, progress = self._engine.totals, self._engine.progress
        for name, words, value in (
            ("passes", "Passes made", totals.passes),
            ("pass_seconds", "Seconds of passes", totals.pass_seconds),
            ("prompt_tokens", "Tokens of prompts", totals.prompt_tokens),
            ("new_tokens", "New tokens", totals.new_tokens),
            ("read_bytes", "Bytes of weights that passes needed from files", self._engine.bytes_read),
        ):
            yield CounterMetricFamily(f"bloomdesk_{name}", words, value)
        for name, words, value in (
            ("ready", "Whether the model is there", float(self._engine.is_ready)),
            ("active_texts", "Texts that share the pass", progress.active),
            ("waiting_texts", "Texts that wait for a pass", self._engine.waiting),
            ("pass_part", "Parts of the pass that are done", progress.part),
            ("pass_parts", "Parts of the pass", progress.parts),
            (
                "disk_bytes_per_second",
                "Bytes of weights that the pass reads a second",
                progress.bytes_per_second,
            ),
            ("memory_bytes", "RAM of the process", memory.memory_in_use()),
        ):
            yield GaugeMetricFamily(f"bloomdesk_{name}", words, value)
        requests = CounterMetricFamily("bloomdesk_requests", "Requests answered", labels=("path", "status"))
        for (path, status), count in sorted(self._requests.items()):
            requests.add_metric((path, str(status)), count)
        yield requests


class Counted:
    """Counts how each request was answered."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                # A path that does not exist could be any text.
                self._metrics.count(route.path if route else "other", message["status"])
            await send(message)

        await self._app(scope, receive, watched)
