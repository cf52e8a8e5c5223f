"""Between the wire and the core: Submit to `Request`, `StepPlan` to its columns, StepResult to the core's values."""

from __future__ import annotations

import numpy as np
from octavo.v1 import scheduler_pb2, step_pb2

from scheduler.core import NewRow, Request, SamplingParams, StepPlan, StepResult, WorkerSpec
from scheduler.core.request import Int32Array
from service.columns import check_range, pack, unpack
from service.errors import FieldViolation, OctavoError, Reason
from service.grammar import size_problem
from service.logprobs import Logprobs, unpack_logprobs
from service.sampling import BadSampling, check_sampling

PROTOCOL = 1
GRAMMAR = "grammar"
"""The capability of workers that decode under grammars."""


def decode_submit(submit: scheduler_pb2.Submit, router_id: int, vocab_size: int, now: float) -> Request:
    """The core's request, with the Submit as its payload. Raises INVALID_ARGUMENT, UNSUPPORTED or PROTOCOL_VIOLATION."""
    if submit.task != scheduler_pb2.TASK_GENERATE:
        raise OctavoError(Reason.UNSUPPORTED, "this scheduler only generates")
    if submit.adapter:
        raise OctavoError(Reason.UNSUPPORTED, "no worker holds LoRA adapters")
    if submit.HasField("grammar") and (problem := size_problem(submit.grammar)) is not None:
        raise _bad_field(*problem)
    spec = submit.sampling
    prompt = _prompt(submit)
    outputs = unpack("output_token_ids", submit.output_token_ids, np.int32)
    _check_vocabulary("prompt", prompt, vocab_size)
    _check_vocabulary("output_token_ids", outputs, vocab_size)
    try:
        stops = check_sampling(spec, vocab_size).stop
    except BadSampling as error:
        raise _bad_field(error.field, error.problem) from None
    if submit.num_prompt_tokens != prompt.size:
        raise _bad_field("num_prompt_tokens", f"{submit.num_prompt_tokens} where the prompt has {prompt.size}")
    deadline = now + submit.remaining_ms / 1e3 if submit.HasField("remaining_ms") else None
    return Request(
        router_id=router_id,
        handle=submit.handle,
        model=submit.model,
        prompt_token_ids=prompt,
        sampling=SamplingParams(
            max_tokens=spec.max_tokens,
            # Under a grammar the worker chooses a stop token before that only where nothing else is allowed.
            min_tokens=0 if submit.HasField("grammar") else min(spec.min_tokens, spec.max_tokens),
            stop_token_ids=tuple(stops.tolist()),
            prompt_logprobs=spec.HasField("prompt_logprobs"),
        ),
        output_token_ids=outputs,
        digest=submit.digest,
        tenant=submit.tenant,
        cache_salt=submit.cache_salt,
        adapter=submit.adapter,
        under_grammar=submit.HasField("grammar"),
        extra_bytes=submit.grammar.ByteSize() if submit.HasField("grammar") else 0,
        priority=submit.priority,
        arrival=now - submit.waited_ms / 1e3,
        deadline=deadline,
        payload=submit,
        suspicion=submit.suspect_group,
        failures_alone=submit.failures_alone,
        accepted=submit.accepted,
    )


def decode_hello(hello: scheduler_pb2.WorkerHello, run_ahead: int) -> WorkerSpec:
    """What the core needs to know of a worker. Raises PROTOCOL_MISMATCH, UNSUPPORTED or the core's InvalidField."""
    if hello.protocol != PROTOCOL:
        raise OctavoError(Reason.PROTOCOL_MISMATCH, f"protocol {hello.protocol}; this scheduler speaks {PROTOCOL}")
    if len(hello.kv_groups) != 1 or hello.kv_groups[0].id != 0:
        raise OctavoError(Reason.UNSUPPORTED, "exactly one kv_group, with id 0, is supported")
    if not hello.model or len(hello.model_digest) != 32:
        raise OctavoError(Reason.INVALID_ARGUMENT, "Hello needs a model name and a model_digest of 32 bytes")
    if not 1 <= hello.vocab_size < 2**31:
        raise OctavoError(Reason.INVALID_ARGUMENT, "Hello needs a vocab_size below 2^31: token ids are int32")
    group = hello.kv_groups[0]
    return WorkerSpec(
        model=hello.model,
        model_digest=hello.model_digest,
        max_rows=hello.max_rows,
        max_num_batched_tokens=hello.max_num_batched_tokens,
        max_model_len=hello.max_model_len,
        block_size=group.block_size,
        num_blocks=group.num_blocks,
        window=group.window if group.HasField("window") else None,
        kv_dtype=hello.kv_dtype,
        hash_version=hello.hash_version,
        run_ahead=run_ahead,
        grammars=GRAMMAR in hello.capabilities,
    )


def encode_plan(plan: StepPlan, epoch: int) -> step_pb2.StepPlan:
    """The plan as columns."""
    message = step_pb2.StepPlan(
        epoch=epoch,
        step_id=plan.step_id,
        rows=pack(plan.rows, np.int32),
        num_scheduled=pack(plan.num_scheduled, np.int32),
        num_samples=pack(plan.num_samples, np.uint8),
    )
    if plan.freed_rows.size:
        message.freed_rows = pack(plan.freed_rows, np.int32)
    if plan.append_rows.size:
        message.append_rows = pack(plan.append_rows, np.int32)
        message.append_block_ids = pack(plan.append_block_ids, np.int32)
    if plan.chunk_rows.size:
        message.chunk_rows = pack(plan.chunk_rows, np.int32)
        message.chunk_lens = pack(plan.chunk_lens, np.int32)
        message.chunk_token_ids = pack(plan.chunk_token_ids, np.int32)
    for new in plan.new_rows:
        message.new_rows.append(_encode_new_row(new))
    return message


def summarise_plan(plan: StepPlan) -> scheduler_pb2.PlanSummary:
    """What an inspector shows of a plan."""
    decodes = int((plan.num_scheduled == 1).sum())
    return scheduler_pb2.PlanSummary(
        step_id=plan.step_id,
        decode_rows=decodes,
        chunk_rows=plan.rows.size - decodes,
        num_tokens=int(plan.num_scheduled.sum()),
        new_rows=len(plan.new_rows),
        freed_rows=plan.freed_rows.size,
        new_blocks=plan.append_rows.size + sum(new.block_ids.size for new in plan.new_rows),
    )


def decode_result(result: step_pb2.StepResult, vocab_size: int) -> tuple[StepResult, Logprobs | None]:
    """The core's value, and the log-probabilities that came with it. Raises PROTOCOL_VIOLATION before anything is booked."""
    ok = result.status == step_pb2.STEP_STATUS_OK
    token_ids = unpack("token_ids", result.token_ids, np.int32)
    check_range("token_ids", token_ids, 0, vocab_size)
    status = unpack("row_status", result.row_status, np.uint8) if result.row_status else None
    num_tokens = unpack("num_tokens", result.num_tokens, np.uint8)
    logprobs = unpack_logprobs(result.logprobs, vocab_size=vocab_size) if result.HasField("logprobs") else None
    decoded = StepResult(step_id=result.step_id, num_tokens=num_tokens, token_ids=token_ids, row_status=status, ok=ok)
    return decoded, logprobs


def _encode_new_row(new: NewRow) -> step_pb2.NewRow:
    submit = new.request.payload
    assert isinstance(submit, scheduler_pb2.Submit)
    return step_pb2.NewRow(
        row=new.row,
        token_ids=pack(new.token_ids, np.int32),
        num_prompt_tokens=new.num_prompt_tokens,
        num_computed=new.num_computed,
        block_ids=pack(new.block_ids, np.int32),
        seed=submit.seed,
        sampling=submit.sampling,
        grammar=submit.grammar if submit.HasField("grammar") else None,
    )


def _prompt(submit: scheduler_pb2.Submit) -> Int32Array:
    parts = []
    for segment in submit.prompt:
        if segment.WhichOneof("kind") != "token_ids":
            raise OctavoError(Reason.UNSUPPORTED, "no worker takes inputs other than tokens")
        parts.append(unpack("prompt", segment.token_ids, np.int32))
    if not parts:
        raise _bad_field("prompt", "must not be empty")
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _check_vocabulary(name: str, ids: Int32Array, vocab_size: int) -> None:
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise _bad_field(name, f"a token outside the vocabulary of {vocab_size}")


def _bad_field(name: str, what: str) -> OctavoError:
    return OctavoError(Reason.INVALID_ARGUMENT, f"{name}: {what}", violations=[FieldViolation(name, what)])
