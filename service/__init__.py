"""What every process shares: settings, lifecycle, health, reflection, metrics, discovery, errors. Imports no service.

Each service imports this first of all, since gRPC's core reads its environment when it is loaded.
"""

import os

# Its newer threads for sockets cost a tenth of all processor time here and, at light load, a millisecond of a first token's way.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
