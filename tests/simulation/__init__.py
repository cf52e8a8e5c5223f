"""The cluster in one process: real scheduler hub and core, real router and worker sessions, with simulated time, network and faults.

python -m tests.simulation SEED     replays one run and prints what happened in it
"""
