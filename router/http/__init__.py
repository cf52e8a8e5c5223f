"""The HTTP door: OpenAI's API over router/inference.py. JSON becomes the messages of the contracts, and these become JSON."""
