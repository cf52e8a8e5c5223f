"""All targets, by name."""

from __future__ import annotations

from tests.fuzz import (
    target_assets,
    target_checkpoint,
    target_client,
    target_gguf,
    target_grammars,
    target_http,
    target_requests,
    target_router,
    target_scheduler,
    target_worker,
)
from tests.fuzz.harness import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        target_scheduler.TARGET,
        target_worker.TARGET,
        target_worker.TORCH_TARGET,
        target_router.TARGET,
        target_requests.TARGET,
        target_http.TARGET,
        target_client.TARGET,
        target_assets.TARGET,
        target_grammars.TARGET,
        target_gguf.TARGET,
        target_checkpoint.TARGET,
    )
}
