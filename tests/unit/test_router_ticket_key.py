"""The key of resume tickets: one for all routers of a cluster."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from router.ticket import ticket_key
from service.settings import SettingsError


def test_routers_that_start_at_once_share_one_key(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ticket.key"
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda _: ticket_key(path, None), range(8)))
    assert len(set(keys)) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ticket_key(path, "a token does not count where there is a file") == keys[0]
    assert [p.name for p in path.parent.iterdir()] == ["ticket.key"]


def test_without_a_file_the_cluster_token_signs_else_this_process_alone() -> None:
    assert ticket_key(None, "t" * 20) == b"t" * 20
    assert ticket_key(None, None) != ticket_key(None, None)


def test_a_short_or_unreadable_key_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_text("abc")
    with pytest.raises(SettingsError, match="at least 32"):
        ticket_key(short, None)
    with pytest.raises(SettingsError, match="ticket-key-file"):
        ticket_key(tmp_path, None)
