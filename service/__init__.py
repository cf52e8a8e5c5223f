"""What every process shares: settings, lifecycle, health, reflection, metrics, discovery, errors. Imports no service."""
