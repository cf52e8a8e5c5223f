"""The checkout's own cluster: `python -m deploy.local up|down|ps|logs|worker`, called by make.

State lies in .run/ (deploy/state.py), processes run under supervisord (deploy/supervise.py). Settings come as flags from the Makefile.
"""

from __future__ import annotations

import argparse
import errno
import functools
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from deploy import docker, show, state
from deploy.commands import METRICS_LISTEN, Command, service_command, worker_env, worker_gpus
from deploy.listed import Door, models_of, wait_listed
from deploy.memory import promised_bytes
from deploy.model import DEFAULT_MODEL, resolve
from deploy.plan import describe, plan, worker_flags
from deploy.ports import free_address
from deploy.readiness import ClusterError, ProcessDied
from deploy.state import RUN
from deploy.supervise import Supervisor
from deploy.wanted import Wanted, check_environment, check_machine, differences, inherited, unused_variables
from deploy.wanted import read as read_wanted
from service.probe import probe

PORT_TRIES = 3


def up(wanted: Wanted, timeout: float) -> int:
    """Start a cluster and wait until it serves. Returns an exit code."""
    wanted_model = wanted.model or DEFAULT_MODEL
    check_machine(wanted_model, wanted.backend)
    supervisor = Supervisor(RUN)
    running = state.read()
    if supervisor.is_running():
        if running is not None:
            show.summary(running, already=True)
            told = differences(wanted, running, _num_workers(supervisor))
            if told:
                print(f"\n{told}")
            return 0
        print("An earlier start was interrupted: stopping what is left of it", flush=True)
        supervisor.shutdown()
    if running is not None and running.runtime == "docker" and any(probe(at) == "SERVING" for at in running.router):
        raise ClusterError("a cluster runs here with RUNTIME=docker; make down, then make up")
    check_environment()
    for line in unused_variables():
        print(line, flush=True)
    state.forget()
    model = resolve(wanted_model, backend=wanted.backend)
    for tries_left in reversed(range(PORT_TRIES)):
        commands = plan(model, wanted.workers or 1, RUN, wanted.quantization)
        try:
            supervisor.launch(commands)
            show.wait(commands, supervisor, timeout)
            doors = [Door.of(command) for command in commands if command.service == "router"]
            wait_listed(doors, models_of(commands), timeout, functools.partial(_first_death, supervisor, commands))
            break
        except ClusterError as error:
            supervisor.shutdown()
            # Between our look at a port and its owner's bind, any program's outgoing connection may have got it.
            if not tries_left or os.strerror(errno.EADDRINUSE) not in str(error):
                raise
            print("A port was taken meanwhile: trying others", flush=True)
        except BaseException:  # also Ctrl-C: nothing half-started is left running
            supervisor.shutdown()
            raise
    cluster = describe(commands, model, wanted.quantization)
    state.write(cluster)
    show.summary(cluster)
    return 0


def _first_death(supervisor: Supervisor, commands: Sequence[Command]) -> ProcessDied | None:
    return next(filter(None, (supervisor.death(command.name) for command in commands)), None)


def _num_workers(supervisor: Supervisor) -> int:
    """Worker processes that run, or start."""
    states = supervisor.states().values()
    return sum(each.name.startswith("worker-") and each.state in ("STARTING", "RUNNING") for each in states)


def add_worker(wanted: Wanted, timeout: float) -> int:
    """Add one worker to the running cluster and wait until it serves. Returns an exit code.

    What is not said is as `up` had it. The same model quantised otherwise is another one, and goes by another name.
    """
    supervisor = Supervisor(RUN)
    cluster = state.read()
    if cluster is None or not supervisor.is_running():
        raise ClusterError("no cluster runs here (make up starts one); with RUNTIME=docker use docker compose --scale")
    if wanted.model is not None:
        check_machine(wanted.model, wanted.backend)
    check_environment(("worker",))
    for line in unused_variables():
        print(line, flush=True)
    known = supervisor.states()
    number = 1 + max((int(name.split("-")[1]) for name in known if name.startswith("worker-")), default=0)
    name = f"worker-{number}"
    backend, quantization = wanted.backend, wanted.quantization
    argument, served_name = wanted.model or cluster.model_argument, None if wanted.model else cluster.model
    if not wanted.model:
        backend = backend or cluster.backend or None
        own = cluster.quantization or "none"
        quantization = quantization or own
        if quantization != own:
            served_name = f"{cluster.model}-{'unquantized' if quantization == 'none' else quantization}"
    model = resolve(argument, served_name, backend)
    flags = worker_flags(model, None, quantization)
    flags["metrics"] = free_address(METRICS_LISTEN, set(cluster.metrics.values()))
    flags |= {"redis": cluster.redis} if cluster.redis else {"scheduler": cluster.scheduler}
    promised = promised_bytes(RUN / "ready")
    if promised and model.backend != "mock":
        flags["promised-bytes"] = promised
    # supervisord's own environment is that of `make up`.
    env = inherited() | worker_env(number, worker_gpus(model.backend), model.backend)
    command = service_command("worker", name, RUN, flags, env)
    try:
        supervisor.add(command)
        show.wait([command], supervisor, timeout)
        doors = [Door.at(router) for router in cluster.router]
        wait_listed(doors, models_of([command]), timeout, lambda: _first_death(supervisor, [command]))
    except BaseException as error:  # also Ctrl-C: the cluster stays as it was
        supervisor.remove(name)
        if isinstance(error, ClusterError) and "out of memory" in str(error) and promised:
            hint = f"To share the memory: make down, then make up WORKERS={number}. Or leave room: OCTAVO_MEMORY_FRACTION=0.3 make up"
            raise ClusterError(f"{error}\n{hint}") from None
        raise
    ready = describe([command], model)
    state.write(replace(cluster, metrics={**cluster.metrics, **ready.metrics}))
    print(f"{name} serves {model.name}")
    return 0


def down() -> int:
    """Stop the cluster, if there is one. Returns an exit code."""
    cluster = state.read()
    if cluster is not None and cluster.runtime == "docker":
        docker.down()
        state.forget()
        return 0
    supervisor = Supervisor(RUN)
    if supervisor.is_running():
        print(
            "Stopping: routers first, then workers, scheduler and Redis; running requests get 30 s to end", flush=True
        )
        supervisor.shutdown()
        print("Stopped. Logs are kept in .run/logs until the next start.")
    else:
        print("No cluster runs here.")
    state.forget()
    return 0


def logs(name: str | None, follow: bool) -> int:
    """Show the logs of all processes, or of one, until Ctrl-C where they are followed. Returns an exit code."""
    cluster = state.read()
    if cluster is not None and cluster.runtime == "docker":
        return docker.logs(name, follow)
    known = sorted((RUN / "logs").glob("*.log"))
    paths = [path for path in known if name in (None, path.stem)]
    if not known:
        raise ClusterError("no logs in .run/logs; make up starts a cluster")
    if not paths:
        raise ClusterError(f"NAME={name}: no log of that name; there are {', '.join(path.stem for path in known)}")
    if follow and not Supervisor(RUN).is_running():
        print("No cluster runs here; these are the ends of the logs of the last one.", flush=True)
        follow = False
    tail = ["tail", "-n", "100", *(["-F"] if follow else []), *(str(path) for path in paths)]
    try:
        return subprocess.run(tail, check=False).returncode
    except KeyboardInterrupt:
        return 0


def ps() -> int:
    """Show the processes; that there are none is an answer too. Returns an exit code."""
    cluster = state.read()
    if cluster is not None and cluster.runtime == "docker":
        return docker.ps()
    supervisor = Supervisor(RUN)
    if not supervisor.is_running():
        print("No cluster runs here; make up starts one.")
        return 0
    show.processes(supervisor.states(), RUN / "ready")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns an exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("up", "worker"):
        command = commands.add_parser(name)
        # Texts as make has them, empty where nothing was said: deploy/wanted.py checks them and speaks of make's variables.
        command.add_argument("--model", default="", help="name, directory or mock")
        command.add_argument("--backend", default="", help="torch, cuda or mock; the worker chooses if absent")
        command.add_argument(
            "--quantization", default="", help="none or int8; as the worker's default or the cluster's if absent"
        )
        command.add_argument("--timeout", type=float, default=1800.0, help="seconds until all must be ready [1800]")
        if name == "up":
            command.add_argument("--workers", default="", help="how many [1]")
            command.add_argument("--runtime", default="", help="processes or docker [processes]")
    commands.add_parser("down")
    commands.add_parser("ps")
    command = commands.add_parser("logs")
    command.add_argument("--name", help="process, as ps shows it")
    command.add_argument("--no-follow", action="store_true")
    given = parser.parse_args(argv)
    try:
        return _run(given)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _run(given: argparse.Namespace) -> int:
    if given.command == "logs":
        return logs(given.name or None, not given.no_follow)
    if given.command == "ps":
        return ps()
    if given.command == "down":
        with state.locked():
            return down()
    variables = {key: getattr(given, key, "") for key in ("model", "workers", "backend", "quantization", "runtime")}
    wanted = read_wanted(**variables)
    with state.locked():
        if given.command == "worker":
            return add_worker(wanted, given.timeout)
        if wanted.runtime == "docker":
            running = state.read()
            if Supervisor(RUN).is_running() and running is not None:
                raise ClusterError("a cluster of processes runs here; make down, then make up RUNTIME=docker")
            return docker.up(wanted.model or DEFAULT_MODEL, wanted.workers or 1)
        return up(wanted, given.timeout)


class _Pipe(io.FileIO):
    """Standard output whose reader may leave (`make up | head`): what it does not want is no error, the cluster goes on."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


if __name__ == "__main__":
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Pipe(1, "w", closefd=False)), sys.stdout.encoding, line_buffering=True
    )
    sys.exit(main())
