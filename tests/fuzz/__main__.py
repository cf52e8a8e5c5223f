"""Run targets by hand: longer, with other seeds, or one input again."""

from __future__ import annotations

import argparse
import sys

from tests.fuzz.harness import Finding, replay, run
from tests.fuzz.targets import TARGETS


def main() -> int:
    """Exit code 1 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"all if absent: {', '.join(TARGETS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, help="as many as in CI if absent")
    parser.add_argument("--index", type=int, help="replay this input of one target")
    parser.add_argument("--missed", action="store_true", help="list lines that did not run")
    given = parser.parse_args()
    if unknown := set(given.targets) - set(TARGETS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    chosen = given.targets or list(TARGETS)
    if given.index is not None:
        replay(TARGETS[chosen[0]], given.seed, given.index)
        return 0
    code = 0
    for name in chosen:
        try:
            report = run(TARGETS[name], given.seed, given.inputs)
        except Finding as finding:
            code = 1
            print(f"{name}: {finding}", flush=True)
            continue
        print(report, flush=True)
        if given.missed:
            print("\n".join(report.missed))
    return code


if __name__ == "__main__":
    sys.exit(main())
