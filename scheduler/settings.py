"""The scheduler's flags."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.core.settings import MAX_RUN_AHEAD
from service.settings import CommonSettings, SettingsError, flag, split_address


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings(CommonSettings):
    """The scheduler: owns the request queue and the block table, and forms continuous batches."""

    listen: str = flag("address to serve gRPC on, HOST:PORT (port 0: any free one) or unix:PATH", "127.0.0.1:50061")
    max_waiting: int = flag(
        "requests of a tenant that may wait (30 kB each in a router, 3 here) before new ones are refused; several share twice that",
        4_096,
    )
    max_waiting_tokens: int = flag("tokens of waiting requests, in the same way", 16_000_000)
    run_ahead: int = flag("plans in flight for each worker, at least", 2)
    max_run_ahead: int = flag("and at most, where steps are so short that the device would wait for the next plan", 4)
    max_shared_tokens: int = flag(
        "tokens of a step in which several requests compute, at most: a long prompt holds up the others' tokens for one such step",
        2_048,
    )
    watermark: float = flag("share of a worker's blocks kept free when a request is admitted", 0.01)
    no_worker_timeout: float = flag(
        "seconds that requests wait for a worker after the last one of their model left", 60.0
    )

    peer: tuple[str, ...] = flag("address of another scheduler, found by themselves with --redis; repeatable", ())
    spread_seconds: float = flag("seconds between looks at the others' workers, to even them out; 0: never", 5.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.run_ahead <= self.max_run_ahead <= MAX_RUN_AHEAD:
            raise SettingsError(f"--run-ahead and --max-run-ahead must be from 1 to {MAX_RUN_AHEAD}, in this order")
        if min(self.max_waiting, self.max_waiting_tokens, self.max_shared_tokens) < 1:
            raise SettingsError("--max-waiting, --max-waiting-tokens and --max-shared-tokens must be at least 1")
        if self.spread_seconds < 0:
            raise SettingsError("--spread-seconds must not be negative")
        for address in self.peer:
            if not address.startswith("unix:"):
                split_address(address)
        if not 0.0 <= self.watermark < 1.0 or self.no_worker_timeout < 0:
            raise SettingsError("--watermark must be in [0, 1) and --no-worker-timeout not negative")
