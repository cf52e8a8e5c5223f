"""Grammars that requests share: many come with the same schema, and each would keep its own copy until it is done."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from weakref import WeakValueDictionary

from octavo.v1 import common_pb2


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class SharedGrammar:
    """One for all requests that hold it; nobody changes the message. (Messages themselves can't be referenced weakly.)"""

    message: common_pb2.Grammar


class SharedGrammars:
    """Those that any request holds, by hash. Owned by the event loop; keeps none alive."""

    def __init__(self) -> None:
        self._held: WeakValueDictionary[bytes, SharedGrammar] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._held)

    def share(self, grammar: common_pb2.Grammar) -> SharedGrammar:
        """The one that is equal, or a copy: a part of a message would keep all of it in memory."""
        key = hashlib.sha256(grammar.SerializeToString(deterministic=True)).digest()
        held = self._held.get(key)
        if held is None:
            message = common_pb2.Grammar()
            message.CopyFrom(grammar)
            held = self._held[key] = SharedGrammar(message)
        return held
