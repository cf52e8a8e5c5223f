"""Checkpoints in the Hugging Face layout: config.json and Safetensors. Only weights.py imports torch."""
