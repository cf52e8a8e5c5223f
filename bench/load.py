"""The load generator from a checkout: `python -m bench.load …` is `octavo bench …`."""

from __future__ import annotations

import sys

from octavo.cli.main import app

if __name__ == "__main__":
    app(["bench", *sys.argv[1:]], prog_name="bench.load")
