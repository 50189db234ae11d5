"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
SHARED = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        to = self.registry
        self.requests = Counter("fsdfm_requests", "Requests.", ["endpoint", "status"], registry=to)
        self.prompt_tokens = Counter("fsdfm_prompt_tokens", "Tokens given.", registry=to)
        self.tokens = Counter("fsdfm_generated_tokens", "Tokens written.", registry=to)
        self.seconds = self._seconds("fsdfm_request_seconds", "From its body to its answer.")
        self.first = self._seconds("fsdfm_first_call_seconds", "From its body to its first call.")
        self.calls = self._seconds("fsdfm_call_seconds", "Of one call.")
        self.shared = Histogram(
            "fsdfm_call_texts", "That shared a call.", buckets=SHARED, registry=to
        )

    def _seconds(self, name: str, about: str) -> Histogram:
        return Histogram(name, about, buckets=SECONDS, registry=self.registry)

    def watch(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Show how many texts there are.

        Args:
            waiting: to begin.
            running: that are being written.
        """
        for name, help_, read in (
            ("fsdfm_texts_waiting", "Texts that have not begun.", waiting),
            ("fsdfm_texts_running", "Texts that are being written.", running),
        ):
            Gauge(name, help_, registry=self.registry).set_function(read)

    def called(self, seconds: float, texts: int) -> None:
        """Count a call."""
        self.calls.observe(seconds)
        self.shared.observe(texts)

    def page(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)
