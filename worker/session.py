"""A worker's side of Enlist, without I/O: messages and `now` in, messages and work out.

The shell (worker/enlist.py) owns the stream and the clock, the engine owns the device; the simulation of failures drives exactly this
object. One session lives as long as the process and goes through many streams; each stream that is welcomed is an *epoch*.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from octavo.v1 import common_pb2, scheduler_pb2, step_pb2

from service.errors import OctavoError, Reason
from worker.backend import BackendInfo
from worker.plan_codec import RowBooks, encode_output
from worker.step import Step, StepOutput

PROTOCOL = 1
HASH_VERSION = 1
GRAMMAR = "grammar"
"""The capability to decode under grammars."""
_ASSET_CHUNK_BYTES = 1 << 20
_WELCOME_S = 5.0


@dataclass(frozen=True, slots=True)
class Execute:
    """Run this step on the device."""

    epoch: int
    step: Step


@dataclass(frozen=True, slots=True)
class Leave:
    """Close the stream and dial again, at `address` if it is set; `for_good`: dial nobody any more."""

    reason: str
    address: str = ""
    for_good: bool = False


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this worker is and what it holds; fixed for the life of the process."""

    hello: scheduler_pb2.WorkerHello
    info: BackendInfo
    assets: dict[str, bytes] = field(repr=False)


Outgoing = scheduler_pb2.EnlistRequest
Action = Execute | Leave | Outgoing


class WorkerSession:
    """State of one worker towards its scheduler. Not thread-safe: the I/O thread owns it."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._books = RowBooks(identity.info, grammars=GRAMMAR in identity.hello.capabilities)
        self.epoch = 0
        self.draining = False
        self._next_step = 1
        self._executing: dict[int, float] = {}  # step_id -> when its plan came
        self._last_step = 0
        self._heartbeat_s = self._lease_s = 0.0
        self._heard_at = self._spoke_at = 0.0
        self._ticked_at = 0.0

    def connected(self, now: float) -> Outgoing:
        """A stream is open: what to say first. The caller has reset the engine."""
        self._forget()
        self._heard_at = self._spoke_at = self._ticked_at = now
        return Outgoing(hello=self._identity.hello)

    def disconnected(self) -> None:
        """The stream is gone. Steps on the device will be collected and their results dropped."""
        self._forget()

    def on_message(self, message: scheduler_pb2.EnlistResponse, now: float) -> Iterator[Action]:
        """What a message of the scheduler asks for. Raises PROTOCOL_VIOLATION or PROTOCOL_MISMATCH: then leave the stream."""
        self._heard_at = now
        kind = message.WhichOneof("message")
        if kind == "welcome":
            yield from self._on_welcome(message.epoch, message.welcome)
            return
        if self.epoch == 0:
            raise OctavoError(Reason.PROTOCOL_VIOLATION, f"{kind} came before the welcome")
        if message.epoch != self.epoch:
            return  # of an earlier stream: fenced off
        if kind == "plan":
            yield self._on_plan(message.plan, now)
        elif kind == "send_assets":
            yield from self._assets()
        elif kind == "redial":
            yield Leave("the scheduler asked to redial", message.redial.address)
        elif kind == "go_away":
            yield Leave("the scheduler has let us go", for_good=True)
        elif kind != "heartbeat":
            raise OctavoError(Reason.PROTOCOL_VIOLATION, "a message of a kind that was not claimed in Hello")

    def on_output(self, epoch: int, output: StepOutput, now: float) -> Outgoing | None:
        """The device finished a step: the message to send, or None where its epoch is over."""
        if epoch != self.epoch or epoch == 0:
            return None
        self._executing.pop(output.step_id, None)
        self._last_step = output.step_id
        self._spoke_at = now
        return Outgoing(epoch=epoch, result=encode_output(epoch, output))

    def on_step_failed(self, epoch: int, step_id: int, text: str) -> Iterator[Action]:
        """A step failed and the device forgot its rows: say so, then start a new epoch."""
        if epoch != self.epoch or epoch == 0:
            return
        failed = step_pb2.StepResult(
            epoch=epoch, step_id=step_id, status=step_pb2.STEP_STATUS_FAILED, message=text[:1024]
        )
        yield Outgoing(epoch=epoch, result=failed)
        yield Leave(f"step {step_id} failed: {text}")

    def tick(self, now: float) -> Iterator[Action]:
        """Called a few times in each heartbeat interval: speak if nothing else did, and notice a silent scheduler."""
        late = now - self._ticked_at > self._lease_s / 2
        self._ticked_at = now
        if self.epoch == 0:
            if now - self._heard_at > _WELCOME_S:
                yield Leave(f"no welcome within {_WELCOME_S:.0f} s")
            return
        if now - self._spoke_at >= self._heartbeat_s * 0.9:
            self._spoke_at = now
            device_ms = int((now - min(self._executing.values())) * 1e3) if self._executing else 0
            beat = scheduler_pb2.WorkerHeartbeat(last_step=self._last_step, device_ms=device_ms)
            yield Outgoing(epoch=self.epoch, heartbeat=beat)
        # After our own loop stalled the inbound stream is read first; the next tick judges.
        if not late and now - self._heard_at > self._lease_s:
            yield Leave(f"the scheduler was silent for {now - self._heard_at:.1f} s")

    def drain(self) -> Outgoing | None:
        """Ask for no new requests. Repeated for each new epoch while draining."""
        self.draining = True
        return self._draining_message()

    @property
    def tick_s(self) -> float:
        """Seconds between ticks: a third of a heartbeat."""
        return (self._heartbeat_s or 0.1) / 3

    def _on_welcome(self, epoch: int, welcome: scheduler_pb2.WorkerWelcome) -> Iterator[Action]:
        if self.epoch != 0 or epoch == 0:
            raise OctavoError(Reason.PROTOCOL_VIOLATION, "a second welcome, or one without an epoch")
        if welcome.protocol != PROTOCOL:
            raise OctavoError(Reason.PROTOCOL_MISMATCH, f"protocol {welcome.protocol}; this worker speaks {PROTOCOL}")
        self.epoch = epoch
        self._heartbeat_s = max(welcome.heartbeat_ms, 1) / 1e3
        self._lease_s = max(welcome.lease_ms, 1) / 1e3
        draining = self._draining_message() if self.draining else None
        if draining is not None:
            yield draining

    def _on_plan(self, plan: step_pb2.StepPlan, now: float) -> Execute:
        if plan.epoch != self.epoch or plan.step_id != self._next_step:
            raise OctavoError(
                Reason.PROTOCOL_VIOLATION,
                f"plan {plan.epoch}.{plan.step_id} where {self.epoch}.{self._next_step} belongs",
            )
        step = self._books.decode(plan)
        self._next_step += 1
        self._executing[plan.step_id] = now
        return Execute(self.epoch, step)

    def _assets(self) -> Iterator[Outgoing]:
        for name, data in self._identity.assets.items():
            for start in range(0, max(len(data), 1), _ASSET_CHUNK_BYTES):
                piece = data[start : start + _ASSET_CHUNK_BYTES]
                chunk = common_pb2.AssetChunk(data=piece)
                if start == 0:
                    chunk.name, chunk.size = name, len(data)
                yield Outgoing(epoch=self.epoch, asset=chunk)
        digest = self._identity.hello.model_digest
        yield Outgoing(epoch=self.epoch, assets_end=scheduler_pb2.AssetsEnd(digest=digest))

    def _draining_message(self) -> Outgoing | None:
        if self.epoch == 0:
            return None
        return Outgoing(epoch=self.epoch, draining=scheduler_pb2.Draining())

    def _forget(self) -> None:
        self.epoch = 0
        self._next_step = 1
        self._last_step = 0
        self._executing.clear()
        self._books.reset()
