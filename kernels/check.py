"""Whether NVRTC is here and compiles our kernels: `python -m kernels.check ARCHITECTURE [--all] [--shape JSON]`.

Prints one JSON object. Needs neither a driver nor a device, and takes and keeps cubins where workers do. A process of its own, since
nothing can end a compilation that hangs inside the caller's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kernels.cache import CubinCache, default_directory
from kernels.compiler import CompileError, Compiler, nvrtc_version
from kernels.shapes import KernelShape, ShapeError, kernel_specs

_SMALLEST = "rms_norm"  # includes CUDA's headers, and compiles in a second
_ROOMY = ("sm_80", "sm_90a", "sm_100")  # 160 KiB of shared memory for a block
_LLAMA_1B = KernelShape(2048, 8192, 32, 8, 64, 16, qk_norm=False, float16=False)


def check(architecture: str, shape: KernelShape, everything: bool) -> dict[str, Any]:
    """Compile one kernel, or all that a model of this shape needs. Raises CompileError."""
    specs = kernel_specs(shape, 8 if architecture in _ROOMY else 4, architecture)
    chosen = list(specs.values()) if everything else [specs[_SMALLEST]]
    compiler = Compiler(architecture, CubinCache(default_directory()))
    with ThreadPoolExecutor(2) as pool:
        modules = list(pool.map(lambda spec: compiler.compile(spec.source, spec.definitions), chosen))
    return {
        "nvrtc": nvrtc_version(),
        "architecture": architecture,
        "modules": len(modules),
        "cached": sum(module.cached for module in modules),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Returns an exit code: 1 where the kernels do not compile, and then the JSON says why."""
    parser = argparse.ArgumentParser(prog="python -m kernels.check", description=__doc__.partition("\n")[0])
    parser.add_argument("architecture", help="such as sm_90a")
    parser.add_argument("--all", action="store_true", help="all kernels, not only the smallest")
    parser.add_argument("--shape", help="fields of KernelShape as JSON; Llama-3.2-1B's if absent")
    given = parser.parse_args(argv)
    try:
        shape = KernelShape(**json.loads(given.shape)) if given.shape else _LLAMA_1B
        answer = check(given.architecture, shape, given.all)
    except (CompileError, ShapeError) as error:
        print(json.dumps({"error": str(error)}))
        return 1
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
