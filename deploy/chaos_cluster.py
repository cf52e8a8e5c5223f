"""The cluster of a chaos run: every process talks through relays of its own, so that any of them can be parted from the others."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from deploy.cluster import LocalCluster
from deploy.commands import Flag, redis_binary
from deploy.gate import Gate
from deploy.member import Member
from deploy.ports import free_address

T = TypeVar("T")


class ChaosCluster:
    """Schedulers, workers, routers and, where there is one, Redis. Owned by one event loop; what blocks runs in a thread.

    Workers and routers reach each scheduler through a relay, clients reach routers through one. Redis holds leases of routers and
    idempotency keys; schedulers are known by address, since a relay is not what they would announce.
    """

    def __init__(self, *, model: str, backend: str, flags: Mapping[str, Mapping[str, Flag]], timeout: float) -> None:
        self.front: list[str] = []  # where clients find routers
        self._cluster = LocalCluster(
            redis=redis_binary() is not None,
            schedulers=0,
            workers=0,
            routers=0,
            model=model,
            backend=backend,
            flags=flags,
            timeout=timeout,
        )
        self._gates: dict[str, list[Gate]] = {}  # by process: the relays through which it talks
        self._blocking: asyncio.Future[Any] | None = None

    async def start(self, *, schedulers: int, workers: int, routers: int) -> None:
        """Start all and wait until they serve."""
        await self._in_thread(self._cluster.start)
        taken: set[str] = set()
        addresses = [free_address(f"127.0.0.1:{random.randrange(20_000, 50_000)}", taken) for _ in range(schedulers)]
        members = [
            await self._in_thread(
                self._cluster.add,
                "scheduler",
                listen=address,
                peer=[other for other in addresses if other != address],
                spread_seconds=1.0,
                redis=None,
            )
            for address in addresses
        ]
        for service, count in (("worker", workers), ("router", routers)):
            for _ in range(count):
                await self._add(service, members)

    async def _add(self, service: str, schedulers: list[Member]) -> None:
        gates = [Gate(scheduler.address) for scheduler in schedulers]
        for gate, scheduler in zip(gates, schedulers, strict=True):
            await gate.start()
            self._gates.setdefault(scheduler.name, []).append(gate)
        member = await self._in_thread(self._cluster.add, service, scheduler=[gate.address for gate in gates])
        self._gates.setdefault(member.name, []).extend(gates)
        if service == "router":
            front = Gate(member.address)
            await front.start()
            self._gates[member.name].append(front)
            self.front.append(front.address)

    async def stop(self) -> None:
        """End every process and relay, whatever state they are in."""
        for gates in self._gates.values():
            for gate in gates:
                gate.release()
        if self._blocking is not None:  # an interrupted restart: the cluster is for one thread at a time
            await asyncio.wait([self._blocking])
        await self._in_thread(self._cluster.stop)
        for gate in {gate for gates in self._gates.values() for gate in gates}:
            await gate.close()

    def names(self, role: str) -> list[str]:
        """The processes of a role."""
        return [name for name, member in self._cluster.members.items() if member.command.service == role]

    def logs(self, role: str) -> list[str]:
        """What the processes of a role have written."""
        return [self._cluster.members[name].log_text() for name in self.names(role)]

    async def harm(self, kind: str, name: str, seconds: float) -> None:
        """One fault, from its beginning to its end. A stop and a partition last `seconds`, and so does the death of Redis."""
        member = self._cluster.members[name]
        if kind == "kill":
            await self._in_thread(member.kill)
            if member.command.service == "redis":
                await asyncio.sleep(seconds)
            await self._in_thread(self._cluster.restart, name)
        elif kind == "restart":
            await self._in_thread(member.stop)
            await self._in_thread(self._cluster.restart, name)
        elif kind == "stop":
            member.suspend()
            await asyncio.sleep(seconds)
            member.resume()
        else:
            for gate in self._gates[name]:
                gate.hold()
            await asyncio.sleep(seconds)
            for gate in self._gates[name]:
                gate.release()

    async def _in_thread(self, function: Callable[..., T], *arguments: Any, **flags: Any) -> T:
        """Run what blocks. It goes on to its end when we are cancelled, and is waited for before the cluster is stopped."""
        running = asyncio.ensure_future(asyncio.to_thread(function, *arguments, **flags))
        self._blocking = running
        return await asyncio.shield(running)
