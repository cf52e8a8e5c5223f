"""The wheel holds the client and the stubs, and needs nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_PROGRAM = """
import sys
import octavo.cli.main, octavo.cli.load_process, octavo.client
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_the_command_imports_neither_services_nor_heavy_libraries(tmp_path: Path) -> None:
    environ = os.environ | {"PYTHONPATH": os.pathsep.join((str(_ROOT / "protos"), str(_ROOT / "client")))}
    ran = subprocess.run(
        [sys.executable, "-c", _PROGRAM], cwd=tmp_path, env=environ, check=True, capture_output=True, text=True
    )
    imported = set(ran.stdout.split())
    assert "octavo" in imported
    foreign = {
        "service",
        "router",
        "scheduler",
        "worker",
        "kernels",
        "deploy",
        "torch",
        "numpy",
        "gguf",
        "transformers",
    }
    assert not imported & foreign
