"""Counts and times of a server, in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from typing import Any

from lowrank.serve.engine import ServeEngine

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """Seconds, in buckets."""

    def __init__(self) -> None:
        self.counts = [0] * (len(_SECONDS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """One measurement."""
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str) -> list[str]:
        """Cumulative, as the format has it."""
        lines, reached = [], 0
        for bound, count in zip((*map(str, _SECONDS), "+Inf"), self.counts):
            reached += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {reached}')
        return [*lines, f"{name}_sum {self.sum:.6f}", f"{name}_count {reached}"]


class Metrics:
    """Everything that is counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._tokens: Counter[str] = Counter()
        self._cancelled = 0
        self._seconds = Histogram()
        self._first_token = Histogram()

    def count_request(self, route: str, status: int) -> None:
        """`route`: the pattern, never what a client wrote."""
        with self._lock:
            self._requests[route, status] += 1

    def count_answers(
        self, prompt_tokens: int, answer_tokens: int, seconds: float, first_token: float | None, cancelled: bool
    ) -> None:
        """A request came to its end, or its client left."""
        with self._lock:
            self._tokens["prompt"] += prompt_tokens
            self._tokens["answer"] += answer_tokens
            self._cancelled += cancelled
            self._seconds.add(seconds)
            if first_token is not None:
                self._first_token.add(first_token)

    def text(self, engine: ServeEngine) -> str:
        """All of it, with what the engine does now."""
        load, served_models = engine.load(), engine.served_models()
        gauges = {
            "lowrank_answers_running": load.running,
            "lowrank_answers_waiting": load.waiting,
            "lowrank_adapters_registered": sum(served.parent is not None for served in served_models),
            "lowrank_adapters_resident": sum(served.parent is not None and served.resident for served in served_models),
        }
        if load.free_tokens is not None:
            gauges["lowrank_cache_free_tokens"] = load.free_tokens
        with self._lock:
            lines = ["# TYPE lowrank_requests_total counter"]
            lines += [
                f'lowrank_requests_total{{route="{route}",status="{status}"}} {count}'
                for (route, status), count in sorted(self._requests.items())
            ]
            lines.append("# TYPE lowrank_tokens_total counter")
            lines += [f'lowrank_tokens_total{{kind="{kind}"}} {count}' for kind, count in sorted(self._tokens.items())]
            lines += ["# TYPE lowrank_requests_cancelled_total counter"]
            lines += [f"lowrank_requests_cancelled_total {self._cancelled}"]
            for name, value in gauges.items():
                lines += [f"# TYPE {name} gauge", f"{name} {value}"]
            for name, histogram in (
                ("lowrank_request_seconds", self._seconds),
                ("lowrank_first_token_seconds", self._first_token),
            ):
                lines += [f"# TYPE {name} histogram", *histogram.lines(name)]
        return "\n".join(lines) + "\n"


class CountRequests:
    """ASGI middleware: every request by its route's pattern and status, also those that were turned away."""

    def __init__(self, app: Any, *, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        status = 500

        async def listen(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, listen)
        finally:
            if scope["type"] == "http":
                self.metrics.count_request(getattr(scope.get("route"), "path", "other"), status)
