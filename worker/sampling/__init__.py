"""From logits to tokens: masks, penalties, truncation, stateless noise, log-probabilities."""
