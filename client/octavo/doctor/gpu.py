"""NVIDIA GPUs: the driver, what it says of the devices, and the Python packages that kernels need."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from octavo.doctor.findings import Finding, Run, note, ok, problem, size_of
from octavo.doctor.packages import Installed, Requirement, check_packages

MIN_DRIVER = 580  # the first of CUDA 13
MIN_CAPABILITY = (8, 0)
_FIELDS = ("index", "name", "driver_version", "memory.total", "memory.free", "compute_cap")
_BUSY = 0.9  # of the memory should be free before a worker starts
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_CUDA_REMEDY = ".venv/bin/pip install -r deploy/requirements/cuda.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One device as the driver tells of it. Memory in bytes; 0 where the device shares the processor's and tells none."""

    index: int
    name: str
    driver: str
    memory_total: int
    memory_free: int
    capability: tuple[int, int]

    @property
    def architecture(self) -> str:
        """What NVRTC is told to compile for, as kernels.compiler.architecture_of decides it."""
        major, minor = self.capability
        return f"sm_{major}{minor}" + ("a" if major == 9 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    """All devices; or none, and whether a driver is there and why it tells nothing."""

    devices: tuple[Gpu, ...] = ()
    driver_loaded: bool = False
    trouble: str = ""


def read_gpus(run: Run, tool: str | None = None, driver_file: Path = _DRIVER_FILE) -> Gpus:
    """Ask nvidia-smi, which comes with every driver."""
    tool = tool or shutil.which("nvidia-smi")
    loaded = driver_file.exists()
    if tool is None:
        return Gpus(driver_loaded=loaded, trouble="nvidia-smi is not on the PATH" if loaded else "")
    ran = run([tool, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"], 20.0)
    if ran.code != 0:
        return Gpus(driver_loaded=loaded, trouble=f"nvidia-smi: {ran.last_words}")
    try:
        return Gpus(devices=tuple(_parse(line) for line in ran.out.splitlines() if line.strip()), driver_loaded=True)
    except ValueError:
        return Gpus(driver_loaded=loaded, trouble=f"nvidia-smi says what can't be read: {ran.last_words}")


def _parse(line: str) -> Gpu:
    index, name, driver, total, free, capability = (part.strip() for part in line.split(","))
    major, _, minor = capability.partition(".")
    return Gpu(
        index=int(index),
        name=name,
        driver=driver,
        memory_total=_mebibytes(total),
        memory_free=_mebibytes(free),
        capability=(int(major), int(minor)),
    )


def _mebibytes(text: str) -> int:
    return 0 if text == "[N/A]" else int(text) << 20


def check_gpus(gpus: Gpus, environ: Mapping[str, str]) -> list[Finding]:
    """Driver and devices. No GPU is no problem."""
    if not gpus.devices:
        if not gpus.driver_loaded and not gpus.trouble:
            return [ok("GPU", "No NVIDIA GPU or driver here: models run on the CPU.")]
        remedy = "Restart the machine after a driver's update, or install the driver again: apt-get install nvidia-driver-580"
        return [problem("GPU", f"The driver tells of no device: {gpus.trouble or 'nvidia-smi lists none'}.", remedy)]
    findings = [_check_driver(gpus.devices[0].driver)]
    findings += [_check_device(gpu) for gpu in gpus.devices]
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        chosen = [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
        found = f"CUDA_VISIBLE_DEVICES={visible}: workers use {'these only' if chosen else 'none'}."
        findings.append(note("GPUs chosen", found, "To use all: unset CUDA_VISIBLE_DEVICES"))
    return findings


def _check_driver(version: str) -> Finding:
    major = version.partition(".")[0]
    if major.isdigit() and int(major) < MIN_DRIVER:
        remedy = (
            f"Install a newer one: apt-get install nvidia-driver-{MIN_DRIVER}. Or use the CPU: make up BACKEND=torch"
        )
        return problem("driver", f"{version} is too old for CUDA 13.", remedy)
    return ok("driver", f"{version}, good for CUDA 13")


def _check_device(gpu: Gpu) -> Finding:
    check = f"GPU {gpu.index}"
    capability = f"{gpu.capability[0]}.{gpu.capability[1]}"
    memory = f"{size_of(gpu.memory_free)} of {size_of(gpu.memory_total)} free"
    found = f"{gpu.name}, compute capability {capability}, {memory if gpu.memory_total else 'in the main memory'}"
    if gpu.capability < MIN_CAPABILITY:
        return note(
            check, f"{found}: too old for the kernels, which need 8.0 (Ampere).", "Use the CPU: make up BACKEND=torch"
        )
    if gpu.memory_free < _BUSY * gpu.memory_total:
        return note(check, f"{found}: others use the rest.", "Who it is: nvidia-smi")
    return ok(check, found)


def check_cuda_packages(gpus: Gpus, wanted: list[Requirement], installed: Installed) -> list[Finding]:
    """What deploy/requirements/cuda.txt asks for. Without a GPU its absence is no problem, half of it is."""
    here = [item for item in wanted if installed(item.name) is not None]
    if not here and not gpus.devices:
        return [ok("CUDA packages", "Not installed; only workers with a GPU need them.")]
    findings = check_packages("CUDA packages", wanted, installed, _CUDA_REMEDY)
    torch = installed("torch")
    if gpus.devices and torch is not None and torch.endswith("+cpu"):
        remedy = f".venv/bin/pip install --force-reinstall torch=={torch.partition('+')[0]} from an index that has its CUDA build"
        findings.append(problem("torch", f"{torch} is the CPU build: the cuda backend needs the CUDA build.", remedy))
    return findings
