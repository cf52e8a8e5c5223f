"""Clients that people use, each in an environment of its own, against a cluster of ours: `make test-clients`."""
