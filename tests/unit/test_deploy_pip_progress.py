"""What `make up` shows of pip, with a script in pip's place."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.pip_progress import install

SAYS = """\
Collecting torch==2.13.0
  Downloading https://example.org/torch-2.13.0-cp311.whl (190.2 MB)
Progress 1000000 of 190200000
Progress 190200000 of 190200000
Collecting numpy
  Using cached numpy-2.0-cp311.whl
Installing collected packages: numpy, torch
Successfully installed numpy-2.0 torch-2.13.0
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def pip(tmp_path: Path, code: int = 0) -> list[str]:
    script = tmp_path / "pip.py"
    script.write_text(f"import sys; sys.stdout.write({SAYS!r}); sys.exit({code})")
    return [sys.executable, str(script)]


def test_a_pipe_gets_a_line_for_what_takes_long(tmp_path: Path) -> None:
    out = io.StringIO()
    install(pip(tmp_path), ["-r", "x"], tmp_path / "log", out)
    assert (
        out.getvalue()
        == "  Downloading https://example.org/torch-2.13.0-cp311.whl (190.2 MB)\n  unpacking 2 packages\n"
    )


def test_a_terminal_sees_how_far_it_is_and_is_left_clean(tmp_path: Path) -> None:
    out = Terminal()
    install(pip(tmp_path), [], tmp_path / "log", out)
    assert "torch-2.13.0-cp311.whl 1.0 of 190.2 MB (0 %)" in out.getvalue()
    assert "torch-2.13.0-cp311.whl 190.2 of 190.2 MB (100 %)" in out.getvalue()
    assert "\n" not in out.getvalue() and out.getvalue().endswith("\r\033[K")


def test_a_failure_shows_what_pip_said(tmp_path: Path) -> None:
    out = io.StringIO()
    with pytest.raises(subprocess.CalledProcessError):
        install(pip(tmp_path, 3), [], tmp_path / "log", out)
    assert "Successfully installed numpy-2.0" in out.getvalue()
    assert "Progress" not in (tmp_path / "log").read_text()
