"""`octavo workers` and `octavo inspect`: what the scheduler sees."""

from __future__ import annotations

import json
import struct
from contextlib import closing
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from octavo.cli import options
from octavo.cli.problem import CommandProblem
from octavo.cli.terminal import stdout_console
from octavo.client.admin import Snapshot, first_snapshot
from octavo.v1 import scheduler_pb2
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

_BAR_WIDTH = 16


def workers(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    scheduler: options.Scheduler = None,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
) -> None:
    """List the workers that are enlisted with the scheduler."""
    with options.open_admin(scheduler, token_file, tls, tls_ca) as admin:
        found = admin.list_workers()
    if as_json:
        print(json.dumps([_status_dict(status) for status in found], indent=2))
        return
    table = Table("worker", "model", "backend", "address", "state", "rows", "blocks", "incarnation")
    for status in found:
        table.add_row(
            status.name,
            status.model,
            " ".join(filter(None, (status.backend, status.quantization))),
            status.address,
            _state(status),
            f"{status.running}/{status.max_rows}",
            f"{status.blocks_used}+{status.blocks_cached}/{status.blocks_total}",
            f"{status.incarnation:016x}",
        )
    stdout_console().print(table if found else "no worker is enlisted")


def inspect(
    once: Annotated[bool, typer.Option("--once", help="Show the state once and end; so without a terminal.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    rows: Annotated[bool, typer.Option("--rows", help="Show the running rows and their blocks.")] = False,
    hz: Annotated[int, typer.Option(help="Pictures a second at most.", min=1, max=50)] = 2,
    scheduler: options.Scheduler = None,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
) -> None:
    """Watch the scheduler: queue, plans and block tables, live."""
    console = stdout_console()
    with options.open_admin(scheduler, token_file, tls, tls_ca) as admin:
        if once or not (console.is_terminal or as_json):
            snapshot = first_snapshot(admin, rows=rows)
            if snapshot is None:
                raise CommandProblem("the scheduler ended the stream without an answer")
            if as_json:
                print(json.dumps(to_dict(snapshot)))
            else:
                console.print(picture(snapshot))
            return
        with closing(admin.inspect(max_hz=hz, rows=rows)) as snapshots:
            if as_json:
                for snapshot in snapshots:
                    print(json.dumps(to_dict(snapshot)), flush=True)
                return
            with Live(console=console, auto_refresh=False, screen=True) as live:
                for snapshot in snapshots:
                    live.update(picture(snapshot), refresh=True)


def picture(snapshot: Snapshot) -> Group:
    """A snapshot for people: queue, workers with their last plan, and rows if there are any."""
    queue = snapshot.queue
    head = Text(
        f"up {snapshot.uptime_ms / 1000:,.0f} s   running {queue.running}   "
        f"waiting {queue.waiting} ({queue.waiting_tokens:,} tokens)"
    )
    counters = Text("   ".join(f"{name} {value:,}" for name, value in sorted(queue.counters.items())), style="dim")
    table = Table("worker", "model", "state", "rows", "blocks: █ used ▒ cached", "in flight", "last plan")
    inspections = sorted(snapshot.workers.values(), key=lambda item: item.status.name)
    for item in inspections:
        status = item.status
        table.add_row(
            status.name,
            status.model,
            _state(status),
            f"{status.running}/{status.max_rows}",
            occupancy(status),
            str(status.plans_in_flight),
            _plan(item),
        )
    parts: list[Any] = [head, counters, table]
    parts += [_row_table(item) for item in inspections if item.rows]
    return Group(*parts)


def occupancy(status: scheduler_pb2.WorkerStatus) -> str:
    """The block pool as a bar; what is used at all shows as one cell at least."""
    total = max(status.blocks_total, 1)
    used = min(_BAR_WIDTH, -(-status.blocks_used * _BAR_WIDTH // total))
    cached = min(_BAR_WIDTH - used, -(-status.blocks_cached * _BAR_WIDTH // total))
    bar = "█" * used + "▒" * cached + "·" * (_BAR_WIDTH - used - cached)
    return f"{bar} {status.blocks_used}+{status.blocks_cached}/{status.blocks_total}"


def _plan(item: scheduler_pb2.WorkerInspection) -> str:
    if not item.HasField("last_plan"):
        return "-"
    plan = item.last_plan
    return (
        f"#{plan.step_id}: {plan.num_tokens} tokens; {plan.decode_rows} decode, {plan.chunk_rows} chunk, "
        f"{plan.new_rows} new, {plan.freed_rows} freed; {plan.new_blocks} blocks"
    )


def _row_table(item: scheduler_pb2.WorkerInspection) -> Table:
    table = Table("row", "prompt", "tokens", "computed", "priority", "block table", title=f"rows of {item.status.name}")
    for row in item.rows:
        blocks = _block_ids(row)
        shown = " ".join(map(str, blocks[:16])) + (f" … ({len(blocks)})" if len(blocks) > 16 else "")
        table.add_row(
            *map(str, (row.row, row.num_prompt_tokens, row.num_tokens, row.num_computed, row.priority)), shown
        )
    return table


def to_dict(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot as JSON has it: names of the contracts, digests hexadecimal, block tables as lists."""
    return {
        "uptime_ms": snapshot.uptime_ms,
        "queue": _message_dict(snapshot.queue),
        "workers": [_inspection_dict(item) for item in snapshot.workers.values()],
    }


def _inspection_dict(item: scheduler_pb2.WorkerInspection) -> dict[str, Any]:
    return {
        "status": _status_dict(item.status),
        "last_plan": _message_dict(item.last_plan) if item.HasField("last_plan") else None,
        "rows": [_message_dict(row) | {"block_ids": _block_ids(row)} for row in item.rows],
    }


def _status_dict(status: scheduler_pb2.WorkerStatus) -> dict[str, Any]:
    return _message_dict(status) | {"model_digest": status.model_digest.hex()}


def _message_dict(message: Any) -> dict[str, Any]:
    values = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    # proto3 JSON writes 64-bit integers as strings. Counters fit a double; incarnations and epochs don't and stay strings.
    for name in ("waiting_tokens", "last_step", "step_id"):
        if name in values:
            values[name] = int(values[name])
    if "counters" in values:
        values["counters"] = {name: int(value) for name, value in values["counters"].items()}
    return values


def _block_ids(row: scheduler_pb2.RowInspection) -> list[int]:
    return [value for (value,) in struct.iter_unpack("<i", row.block_ids[: len(row.block_ids) // 4 * 4])]


def _state(status: scheduler_pb2.WorkerStatus) -> str:
    return "draining" if status.draining else "serving"
