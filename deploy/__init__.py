"""How Octavo is installed and started: environments, the local cluster, images."""
