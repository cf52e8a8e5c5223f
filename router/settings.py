"""The router's flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from service.settings import CommonSettings, SettingsError, flag, secret, split_address


@dataclass(frozen=True, kw_only=True)
class RouterSettings(CommonSettings):
    """The router: takes client requests, turns text into tokens and tokens into text, and streams."""

    listen: str = flag("address to serve gRPC on, HOST:PORT (port 0: any free one) or unix:PATH", "127.0.0.1:50051")
    http_listen: str = flag(
        "address to serve OpenAI's API over HTTP on, HOST:PORT (port 0: any free one), or none", "127.0.0.1:50080"
    )
    http_keep_alive_seconds: float = flag("seconds of silence after which an HTTP stream gets a comment", 15.0)
    scheduler: tuple[str, ...] = flag("address of a scheduler, HOST:PORT or unix:PATH; repeatable", ())
    flush_ms: float = flag("longest wait of a token under load, milliseconds", 8.0)
    max_buffered_tokens: int = flag("tokens that may wait for a client that reads slowly", 4_096)
    max_parked: int = flag("requests with resume_grace_ms that may be kept after their clients are gone", 256)
    text_threads: int = flag("threads for templates and tokenizing", 2)
    max_requests: int = flag(
        "requests of a tenant that may be here (30 kB each) before new ones are refused; several share up to twice that",
        8_192,
    )
    api_keys: Path | None = flag(
        "file with a line KEY TENANT [ROLE] for each API key, of 16 characters at least (# comments); with it every call needs one;"
        " read again on SIGHUP",
        None,
    )
    api_key_list: str | None = secret(
        "the lines of a file for --api-keys, instead of one, or the same with commas between them"
    )
    ticket_key_file: Path | None = flag(
        "file with the key of resume tickets, shared by all routers; made if it is not there", None
    )
    patience: float = flag("seconds that accepted requests wait for a scheduler that is gone", 30.0)
    request_stall_seconds: float = flag(
        "seconds after which a running request that gets no token is submitted again (0: never)", 30.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.api_keys is not None and self.api_key_list is not None:
            raise SettingsError("--api-keys and OCTAVO_API_KEY_LIST can't be combined: put all keys into the file")
        if not 0 < self.flush_ms <= 1_000:
            raise SettingsError("--flush-ms must be above 0 and at most 1000")
        if self.max_buffered_tokens < 1 or self.text_threads < 1 or self.patience < 0:
            raise SettingsError("--max-buffered-tokens and --text-threads must be at least 1, --patience not negative")
        if self.max_parked < 0:
            raise SettingsError("--max-parked must not be negative")
        if self.max_requests < 1:
            raise SettingsError("--max-requests must be at least 1")
        if self.request_stall_seconds < 0:
            raise SettingsError("--request-stall-seconds must not be negative")
        if self.http_keep_alive_seconds <= 0:
            raise SettingsError("--http-keep-alive-seconds must be above 0")
        if self.http_listen != "none":
            split_address(self.http_listen)
        if not self.scheduler and self.redis is None:
            raise SettingsError("--scheduler or --redis must say where schedulers are")
        for address in self.scheduler:
            if not address.startswith("unix:"):
                split_address(address)
