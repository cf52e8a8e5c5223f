"""`octavo bench`: what is sent, what is counted, and that nothing hangs when a process or a router fails."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from octavo.cli import load_report
from octavo.cli.bench import watch_release
from octavo.cli.load_run import LoadResult
from octavo.cli.load_spec import LoadSpec
from octavo.cli.main import app
from octavo.client.admin import AdminClient
from octavo.client.connection import Connection
from octavo.v1 import inference_pb2 as pb
from octavo.v1 import scheduler_pb2
from typer.testing import CliRunner, Result

from service.errors import OctavoError, Reason
from tests.unit.client_fake_router import FakeRouter, Play


def run(router: FakeRouter, *arguments: str) -> Result:
    fixed = ["--address", router.address, "--scheduler", router.address]
    return CliRunner().invoke(app, ["bench", *fixed, *arguments], env={"COLUMNS": "200"})


def _spec(**changes: Any) -> LoadSpec:
    values: dict[str, Any] = {"addresses": ("a:1",), "model": "m", "vocab_size": 500, "requests": 10, "concurrency": 4}
    return LoadSpec(**values | changes)


def _request(spec: LoadSpec, index: int) -> pb.GenerateRequest:
    return pb.GenerateRequest.FromString(spec.request(index))


def test_a_spec_survives_its_journey() -> None:
    spec = _spec(rate=2.5, prompt="text")
    assert LoadSpec.from_json(spec.to_json()) == spec
    assert "\n" not in spec.to_json()


@pytest.mark.parametrize("processes", [1, 3, 4, 9])
def test_shares_add_up_and_send_the_same_prompts(processes: int) -> None:
    spec = _spec(warmup=2)
    shares = spec.split(processes)
    assert len(shares) == min(processes, 4)
    assert sum(share.requests for share in shares) == 10
    assert sum(share.concurrency for share in shares) == 4
    assert sum(share.warmup for share in shares) == 2
    indices = [share.first_request + index for share in shares for index in range(share.requests)]
    assert indices == list(range(10))
    rates = [share.rate or 0.0 for share in _spec(rate=8.0).split(processes)]
    assert sum(rates) == pytest.approx(8.0)


def test_requests_have_their_lengths_and_their_shared_prefix() -> None:
    spec = _spec(input_len=20, prefix_len=12, output_len=7)
    prompts = [list(_request(spec, index).token_ids.ids) for index in (-1, 0, 1, 2)]
    assert all(len(prompt) == 20 and max(prompt) < 500 for prompt in prompts)
    assert prompts[1][:12] == prompts[2][:12] == prompts[3][:12]
    assert prompts[0][:12] != prompts[1][:12]
    assert prompts[1][12:] != prompts[2][12:]
    request = _request(spec, 3)
    assert (request.sampling.max_tokens, request.sampling.ignore_eos, request.model) == (7, True, "m")
    assert _request(_spec(prompt="text"), 0).text == "text"


def test_arrivals_are_poisson() -> None:
    spec = _spec(requests=5000, rate=50.0)
    due = spec.arrivals()
    assert due == sorted(due)
    assert due[-1] == pytest.approx(100.0, rel=0.1)
    with pytest.raises(ValueError, match="closed loop"):
        _spec().arrivals()


def test_quantiles_are_exact() -> None:
    values = [float(value) for value in range(101)]
    random.Random(1).shuffle(values)
    figures = load_report.describe(values)
    assert figures == {"count": 101, "mean": 50.0, "p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert load_report.quantile([1.0, 2.0], 0.5) == 1.5
    assert load_report.describe([]) is None


def _sample(
    due: float, first: float | None, last: float | None, end: float, tokens: int, gaps: list[int], **changes: Any
) -> Any:
    values = {"due": due, "sent": due, "first": first, "last": last, "end": end, "tokens": tokens, "gaps_us": gaps}
    return values | {"outcome": "finished", "reason": ""} | changes


def test_figures_of_known_samples() -> None:
    failed = _sample(10.0, None, None, 12.0, 0, [], outcome="failed", reason="QUEUE_FULL: full")
    samples = [
        _sample(10.0, 10.1, 10.5, 10.6, 5, [200_000, 200_000]),
        _sample(11.0, 11.3, 11.3, 11.4, 1, [], sent=11.2),
        failed,
    ]
    summary = load_report.summarise(LoadResult(processes=1, samples=samples, cpu_seconds=1.0))
    assert (summary["finished"], summary["failed"], summary["errors"]) == (2, 1, {"QUEUE_FULL": 1})
    assert summary["first_error"] == "QUEUE_FULL: full"
    assert summary["duration_s"] == pytest.approx(2.0)
    assert summary["output_tokens_per_s"] == pytest.approx(3.0)
    assert summary["ttft_ms"]["p50"] == pytest.approx(200.0)  # the late one counts from when it was due
    assert summary["itl_ms"]["mean"] == pytest.approx(200.0)
    assert summary["tpot_ms"]["mean"] == pytest.approx(100.0)
    assert summary["e2e_ms"]["max"] == pytest.approx(600.0)
    assert summary["lag_ms"]["max"] == pytest.approx(200.0)
    assert summary["token_messages"] == 4
    assert summary["generator_cpu_share"] == pytest.approx(0.5)


def test_a_closed_loop_in_two_processes(tmp_path: Path) -> None:
    with FakeRouter() as router:
        target = tmp_path / "results" / "run.json"
        arguments = ("-c", "4", "--requests", "10", "--output-len", "5", "-p", "2", "--warmup", "2")
        result = run(router, *arguments, "--json", str(target), "--samples")
        assert result.exit_code == 0, result.output
        assert "10 finished" in result.stdout and "TTFT" in result.stdout
        assert len(router.requests) == 12
        written = json.loads(target.read_text())
    assert written["results"]["output_tokens"] == 50
    assert written["results"]["generator_processes"] == 2
    assert written["load"]["output_len"] == 5
    assert len(written["samples"]) == 10
    assert {"machine", "versions", "command", "at"} <= written.keys()
    assert "addresses" not in written["load"] and "token" not in written["load"]


def test_an_open_loop_sends_everything() -> None:
    with FakeRouter() as router:
        result = run(router, "--rate", "200", "--requests", "20", "--warmup", "0")
        assert result.exit_code == 0, result.output
        assert "20 finished" in result.stdout
        assert len(router.requests) == 20


def test_errors_are_counted_by_reason() -> None:
    with FakeRouter([Play(), Play(), Play(refuse=OctavoError(Reason.QUEUE_FULL, "full"))]) as router:
        result = run(router, "--requests", "3", "--warmup", "1")
        assert result.exit_code == 0
        assert "1 finished, 0 abandoned, 2 failed" in result.stdout
        assert "2 × QUEUE_FULL" in result.stdout
    with FakeRouter([Play(), Play(refuse=OctavoError(Reason.QUEUE_FULL, "full"))]) as router:
        result = run(router, "--requests", "2")
        assert result.exit_code == 1
        assert "every request failed: QUEUE_FULL: full" in result.stderr


def test_a_stream_that_ends_too_early_is_an_error() -> None:
    with FakeRouter([Play(break_at=2)]) as router:
        result = run(router, "--requests", "2", "--warmup", "0")
        assert result.exit_code == 1
        assert "2 × LOST" in result.stdout


def test_a_failed_warm_up_ends_the_run() -> None:
    with FakeRouter([Play(refuse=OctavoError(Reason.PROMPT_TOO_LONG, "65 tokens"))]) as router:
        result = run(router, "-c", "2", "-p", "2", "--warmup", "2")
        assert result.exit_code == 1
        assert "warm-up failed: PROMPT_TOO_LONG: 65 tokens" in result.stderr


def test_abandoned_streams_are_cancelled_and_leaks_looked_for() -> None:
    with FakeRouter([Play(hang_at=4)]) as router:
        result = run(router, "--abandon", "6", "-c", "3", "--warmup", "0")
        assert result.exit_code == 0, result.output
        assert "6 abandoned" in result.stdout
        assert "0 blocks owned" in result.stdout
        assert [router.cancelled.acquire(timeout=2) for _ in range(6)] == [True] * 6


def test_a_leak_is_reported() -> None:
    workers = [scheduler_pb2.WorkerStatus(blocks_used=3, running=1)]
    with FakeRouter(workers=workers) as router, AdminClient(Connection((router.address,))) as admin:
        found = watch_release(admin, since=0.0, limit=0.1)
        assert (found["blocks_used"], found["running"]) == (3, 1)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--prefix-len", "65"), 2, "--prefix-len is above --input-len"),
        (("-m", "other"), 1, "served now: fake"),
        (("--concurrency", "0"), 2, "--concurrency"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], code: int, text: str) -> None:
    with FakeRouter() as router:
        result = run(router, *arguments)
    assert result.exit_code == code
    assert text in result.stderr


def test_the_key_for_another_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str | None] = []

    async def first(url: str, token: str | None, ca: str | None) -> str:
        given.append(token)
        raise LookupError("that will do")

    monkeypatch.setattr("octavo.cli.bench.first_model", first)
    (tmp_path / "key").write_text("from-the-file\n")
    ours, theirs = {"OCTAVO_API_KEY": "ours"}, {"OPENAI_API_KEY": "theirs"}
    for env, more in (
        (ours | theirs, ["--token-file", str(tmp_path / "key")]),
        (ours | theirs, []),
        (ours, []),
        ({}, []),
    ):
        arguments = ["bench", "--openai", "http://127.0.0.1:1/v1", *more]
        nothing = dict.fromkeys(("OCTAVO_API_KEY", "OPENAI_API_KEY"))
        assert CliRunner().invoke(app, arguments, env=nothing | env).exit_code == 1
    assert given == ["from-the-file", "theirs", None, None]  # our key is nobody else's business
    shown = " ".join(
        CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "300"}).stdout.replace("│", " ").split()
    )
    assert "with --openai the key $OPENAI_API_KEY alone." in shown
