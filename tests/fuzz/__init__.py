"""Hostile inputs at every boundary: protobuf messages at the services, files at the loaders. Seeded, so that each input replays.

values.py     numbers, texts and columns that are likely to hurt
messages.py   mutates protobuf messages by their descriptors, and as bytes
documents.py  mutates JSON documents, and bytes of files
harness.py    runs a target: episodes, limits of time and memory, figures
coverage.py   which lines of the modules under test were reached
target_*.py   one boundary each

python -m tests.fuzz                      all targets, 10,000 inputs each
python -m tests.fuzz worker --inputs 200000 --seed 7
python -m tests.fuzz worker --seed 7 --index 1234        replay one input, with what came before it in its episode
"""
