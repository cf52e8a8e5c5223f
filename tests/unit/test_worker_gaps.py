"""The histogram of device pauses that a worker exports."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from worker.gaps import EDGES_S, GapHistogram


def test_gaps_fall_at_or_below_their_edge_and_are_cumulative() -> None:
    gaps = GapHistogram()
    for gap_ns in (0, 2_000, 2_001, 20_000, 150_000, 3_000_000_000):
        gaps.add(gap_ns)
    found = dict(gaps.cumulative())
    assert [found[str(edge)] for edge in EDGES_S] == [2, 3, 3, 4, 4, 4, 5, 5, 5, 5, 5]
    assert found["+Inf"] == 6
    assert gaps.sum_ns == 3_000_174_001


def test_prometheus_reads_it() -> None:
    gaps = GapHistogram()
    gaps.add(1_900)

    class Some(Collector):
        def collect(self) -> Iterator[HistogramMetricFamily]:
            yield HistogramMetricFamily("gap_seconds", "Gaps", gaps.cumulative(), gaps.sum_ns / 1e9)

    registry = CollectorRegistry()
    registry.register(Some())
    text = generate_latest(registry).decode()
    assert 'gap_seconds_bucket{le="2e-06"} 1.0' in text
    assert 'gap_seconds_bucket{le="+Inf"} 1.0' in text
    assert "gap_seconds_count 1.0" in text
    assert "gap_seconds_sum 1.9e-06" in text
