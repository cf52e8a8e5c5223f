"""What the router counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from router.request import Request
from router.session import RouterSession

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class _SessionCounters(Collector):
    """What the session counts, read when scraped."""

    def __init__(self, session: RouterSession) -> None:
        self._session = session

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "octavo_router_request_stalls",
            "Running sequences that got no token and were submitted again",
            value=self._session.stalls,
        )


class Stats:
    """Counters of one router process."""

    def __init__(self, registry: CollectorRegistry, session: RouterSession) -> None:
        self._registry = registry
        self._requests = Counter(
            "octavo_router_requests", "Requests that ended, by reason of failure or ok", ["outcome"], registry=registry
        )
        self._prompt = Counter("octavo_router_prompt_tokens", "Prompt tokens of ended requests", registry=registry)
        self._output = Counter("octavo_router_output_tokens", "Output tokens of ended requests", registry=registry)
        self._migrations = Counter(
            "octavo_router_migrations",
            "Times that a sequence went on at another worker or scheduler",
            registry=registry,
        )
        self._ttft = Histogram(
            "octavo_router_ttft_seconds", "Acceptance to first token", buckets=_SECONDS, registry=registry
        )
        self._total = Histogram(
            "octavo_router_request_seconds", "Acceptance to end", buckets=_SECONDS, registry=registry
        )
        self._alone = Counter(
            "octavo_router_keys_alone",
            "Idempotency keys that Redis did not answer for, so that other routers do not know them",
            registry=registry,
        )
        registry.register(_SessionCounters(session))
        gauges = {
            "octavo_router_requests_running": ("Requests that are not done", lambda: session.num_requests),
            "octavo_router_schedulers_attached": ("Schedulers that welcomed us", lambda: session.num_attached),
            "octavo_router_tokens_dropped": ("Tokens that came twice", lambda: session.dropped_tokens),
        }
        for name, (text, read) in gauges.items():
            Gauge(name, text, registry=registry).set_function(read)

    def watch_parked(self, read: Callable[[], int]) -> None:
        """Where the number of parked requests can be read."""
        text = "Requests that are kept for clients that are gone"
        Gauge("octavo_router_requests_parked", text, registry=self._registry).set_function(read)

    def refused(self, reason: str) -> None:
        """A request was refused before it ran."""
        self._requests.labels(reason).inc()

    def alone(self) -> None:
        """An idempotency key is known to this router alone."""
        self._alone.inc()

    def ended(self, request: Request, now: float) -> None:
        """A request that ran is over."""
        if request.error is not None:
            outcome = request.error.reason.name
        else:
            outcome = "ok" if request.done and request.delivered else "cancelled"
        self._requests.labels(outcome).inc()
        self._prompt.inc(request.spec.num_prompt_tokens)
        self._output.inc(sum(len(sequence.output.token_ids) for sequence in request.sequences))
        self._migrations.inc(sum(sequence.attempt + sequence.migrations for sequence in request.sequences))
        self._total.observe(now - request.spec.arrival)
        first = [s.first_token_at for s in request.sequences if s.first_token_at is not None]
        if first:
            self._ttft.observe(min(first) - request.spec.arrival)
