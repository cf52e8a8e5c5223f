"""Replay one seed."""

from __future__ import annotations

import sys

from tests.simulation.plan import make_plan
from tests.simulation.run import run


def main() -> int:
    """Print a seed's history; exit code 1 where something was violated."""
    seed = int(sys.argv[1])
    print(make_plan(seed))
    report = run(seed)
    print("\n".join(report.log))
    print(dict(report.ends), dict(report.faults), f"{report.tokens} tokens")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
