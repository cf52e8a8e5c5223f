"""What `octavo doctor` checks: pure functions from facts to findings, and beside them the readers of those facts.

The wheel holds all of it and needs nothing but the standard library and grpc; what only a checkout can tell is in deploy/doctor.py.
"""
