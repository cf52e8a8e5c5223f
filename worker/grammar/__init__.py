"""Decoding under grammars: which rows have one, their matchers, and the masks that sampling waits for."""
