"""What a model's text means beside words: reasoning, and calls of tools."""
