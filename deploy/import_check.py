"""Imports everything that a service is made of: `python -m deploy.import_check router|scheduler|worker [--forbid-torch]`.

An installation is whole when all modules import, and the router's and scheduler's are right only where torch is not there.
`--forbid-torch` proves the same in an environment that has torch: any import of it fails.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from deploy.environment import ROOT, SERVICES

WITHOUT_TORCH = ("router", "scheduler")
WITH_GRAMMARS = ("router", "worker")  # the services that have llguidance, which service/guidance.py needs
CUDA_MODULES = "worker.backends.cuda_"  # loaded only where the backend is `cuda`; needs deploy/requirements/cuda.txt


class _NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] == "torch":
            raise ImportError("torch is only for worker/ and kernels/")
        return None


def modules(package: str) -> Iterator[str]:
    """Names of all modules of a package of the checkout, `__main__` left out: it would start the service."""
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__main__":
            continue
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def main(argv: list[str]) -> int:
    """Returns an exit code; a module that does not import raises."""
    if not argv or argv[0] not in SERVICES or argv[1:] not in ([], ["--forbid-torch"]):
        print(f"usage: python -m deploy.import_check {'|'.join(SERVICES)} [--forbid-torch]", file=sys.stderr)
        return 2
    service = argv[0]
    if argv[1:]:
        sys.meta_path.insert(0, _NoTorch())
    elif service in WITHOUT_TORCH and importlib.util.find_spec("torch") is not None:
        print(f"error: the {service}'s environment has torch, which it must not need", file=sys.stderr)
        return 1
    if not Path(ROOT / service / "__main__.py").exists():
        print(f"error: {service}/__main__.py is missing", file=sys.stderr)
        return 1
    names = [*modules("service"), *modules(service)]
    if importlib.util.find_spec("cuda") is None:
        names = [name for name in names if not name.startswith(CUDA_MODULES)]
    if service not in WITH_GRAMMARS:
        names.remove("service.guidance")
    for name in names:
        importlib.import_module(name)
    print(f"{service}: {len(names)} modules import, torch {'loaded' if 'torch' in sys.modules else 'not loaded'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
