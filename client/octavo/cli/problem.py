"""How commands fail: one sentence on stderr and exit code 1."""

from __future__ import annotations


class CommandProblem(Exception):
    """What a command can't do, in one sentence for people."""
