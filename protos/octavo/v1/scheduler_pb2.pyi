from octavo.v1 import common_pb2 as _common_pb2
from octavo.v1 import step_pb2 as _step_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Task(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_UNSPECIFIED: _ClassVar[Task]
    TASK_GENERATE: _ClassVar[Task]
    TASK_EMBED: _ClassVar[Task]
    TASK_SCORE: _ClassVar[Task]

class CancelReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CANCEL_REASON_UNSPECIFIED: _ClassVar[CancelReason]
    CANCEL_REASON_CLIENT: _ClassVar[CancelReason]
    CANCEL_REASON_STOP_STRING: _ClassVar[CancelReason]
    CANCEL_REASON_DEADLINE: _ClassVar[CancelReason]
    CANCEL_REASON_SLOW_CONSUMER: _ClassVar[CancelReason]
TASK_UNSPECIFIED: Task
TASK_GENERATE: Task
TASK_EMBED: Task
TASK_SCORE: Task
CANCEL_REASON_UNSPECIFIED: CancelReason
CANCEL_REASON_CLIENT: CancelReason
CANCEL_REASON_STOP_STRING: CancelReason
CANCEL_REASON_DEADLINE: CancelReason
CANCEL_REASON_SLOW_CONSUMER: CancelReason

class AttachRequest(_message.Message):
    __slots__ = ("epoch", "hello", "submit", "cancel", "detach", "heartbeat")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    DETACH_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    hello: RouterHello
    submit: Submit
    cancel: Cancel
    detach: Detach
    heartbeat: RouterHeartbeat
    def __init__(self, epoch: _Optional[int] = ..., hello: _Optional[_Union[RouterHello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., detach: _Optional[_Union[Detach, _Mapping]] = ..., heartbeat: _Optional[_Union[RouterHeartbeat, _Mapping]] = ...) -> None: ...

class RouterHello(_message.Message):
    __slots__ = ("incarnation", "protocol", "capabilities", "name")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    protocol: int
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    name: str
    def __init__(self, incarnation: _Optional[int] = ..., protocol: _Optional[int] = ..., capabilities: _Optional[_Iterable[str]] = ..., name: _Optional[str] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("handle", "request_id", "task", "model", "digest", "adapter", "tenant", "cache_salt", "priority", "group_id", "index", "seed", "attempt", "remaining_ms", "waited_ms", "sampling", "grammar", "prompt", "output_token_ids", "num_prompt_tokens", "suspect_group", "failures_alone", "accepted")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    WAITED_MS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SUSPECT_GROUP_FIELD_NUMBER: _ClassVar[int]
    FAILURES_ALONE_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request_id: str
    task: Task
    model: str
    digest: bytes
    adapter: str
    tenant: str
    cache_salt: bytes
    priority: int
    group_id: int
    index: int
    seed: int
    attempt: int
    remaining_ms: int
    waited_ms: int
    sampling: _common_pb2.SamplingSpec
    grammar: _common_pb2.Grammar
    prompt: _containers.RepeatedCompositeFieldContainer[Segment]
    output_token_ids: bytes
    num_prompt_tokens: int
    suspect_group: int
    failures_alone: int
    accepted: bool
    def __init__(self, handle: _Optional[int] = ..., request_id: _Optional[str] = ..., task: _Optional[_Union[Task, str]] = ..., model: _Optional[str] = ..., digest: _Optional[bytes] = ..., adapter: _Optional[str] = ..., tenant: _Optional[str] = ..., cache_salt: _Optional[bytes] = ..., priority: _Optional[int] = ..., group_id: _Optional[int] = ..., index: _Optional[int] = ..., seed: _Optional[int] = ..., attempt: _Optional[int] = ..., remaining_ms: _Optional[int] = ..., waited_ms: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.SamplingSpec, _Mapping]] = ..., grammar: _Optional[_Union[_common_pb2.Grammar, _Mapping]] = ..., prompt: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., output_token_ids: _Optional[bytes] = ..., num_prompt_tokens: _Optional[int] = ..., suspect_group: _Optional[int] = ..., failures_alone: _Optional[int] = ..., accepted: _Optional[bool] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("token_ids", "placeholder")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PLACEHOLDER_FIELD_NUMBER: _ClassVar[int]
    token_ids: bytes
    placeholder: int
    def __init__(self, token_ids: _Optional[bytes] = ..., placeholder: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("handle", "reason", "num_output_tokens")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    reason: CancelReason
    num_output_tokens: int
    def __init__(self, handle: _Optional[int] = ..., reason: _Optional[_Union[CancelReason, str]] = ..., num_output_tokens: _Optional[int] = ...) -> None: ...

class Detach(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RouterHeartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("epoch", "welcome", "admitted", "tokens", "failed", "load", "go_away", "cancelled", "models", "migrated", "preempted")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    GO_AWAY_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    MIGRATED_FIELD_NUMBER: _ClassVar[int]
    PREEMPTED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    welcome: RouterWelcome
    admitted: Admitted
    tokens: TokenBatch
    failed: Failed
    load: Load
    go_away: GoAway
    cancelled: Cancelled
    models: ModelList
    migrated: Migrated
    preempted: Preempted
    def __init__(self, epoch: _Optional[int] = ..., welcome: _Optional[_Union[RouterWelcome, _Mapping]] = ..., admitted: _Optional[_Union[Admitted, _Mapping]] = ..., tokens: _Optional[_Union[TokenBatch, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., go_away: _Optional[_Union[GoAway, _Mapping]] = ..., cancelled: _Optional[_Union[Cancelled, _Mapping]] = ..., models: _Optional[_Union[ModelList, _Mapping]] = ..., migrated: _Optional[_Union[Migrated, _Mapping]] = ..., preempted: _Optional[_Union[Preempted, _Mapping]] = ...) -> None: ...

class RouterWelcome(_message.Message):
    __slots__ = ("incarnation", "protocol", "heartbeat_ms", "lease_ms", "models")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_MS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    protocol: int
    heartbeat_ms: int
    lease_ms: int
    models: _containers.RepeatedCompositeFieldContainer[ServedModel]
    def __init__(self, incarnation: _Optional[int] = ..., protocol: _Optional[int] = ..., heartbeat_ms: _Optional[int] = ..., lease_ms: _Optional[int] = ..., models: _Optional[_Iterable[_Union[ServedModel, _Mapping]]] = ...) -> None: ...

class ModelList(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ServedModel]
    def __init__(self, models: _Optional[_Iterable[_Union[ServedModel, _Mapping]]] = ...) -> None: ...

class ServedModel(_message.Message):
    __slots__ = ("name", "digest", "max_model_len", "vocab_size", "workers", "quantization")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: bytes
    max_model_len: int
    vocab_size: int
    workers: int
    quantization: str
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[bytes] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., workers: _Optional[int] = ..., quantization: _Optional[str] = ...) -> None: ...

class Admitted(_message.Message):
    __slots__ = ("handle", "cached_tokens", "digest", "queue_ms")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    cached_tokens: int
    digest: bytes
    queue_ms: int
    def __init__(self, handle: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., digest: _Optional[bytes] = ..., queue_ms: _Optional[int] = ...) -> None: ...

class Migrated(_message.Message):
    __slots__ = ("handle", "suspect_group", "failures_alone")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    SUSPECT_GROUP_FIELD_NUMBER: _ClassVar[int]
    FAILURES_ALONE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    suspect_group: int
    failures_alone: int
    def __init__(self, handle: _Optional[int] = ..., suspect_group: _Optional[int] = ..., failures_alone: _Optional[int] = ...) -> None: ...

class Preempted(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    def __init__(self, handle: _Optional[int] = ...) -> None: ...

class TokenBatch(_message.Message):
    __slots__ = ("handles", "first_output_index", "num_tokens", "finish_reason", "token_ids", "logprobs")
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    FIRST_OUTPUT_INDEX_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    handles: bytes
    first_output_index: bytes
    num_tokens: bytes
    finish_reason: bytes
    token_ids: bytes
    logprobs: _common_pb2.LogprobColumns
    def __init__(self, handles: _Optional[bytes] = ..., first_output_index: _Optional[bytes] = ..., num_tokens: _Optional[bytes] = ..., finish_reason: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[_Union[_common_pb2.LogprobColumns, _Mapping]] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("handle", "reason", "message", "retry_after_ms")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    reason: _common_pb2.ErrorReason
    message: str
    retry_after_ms: int
    def __init__(self, handle: _Optional[int] = ..., reason: _Optional[_Union[_common_pb2.ErrorReason, str]] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class Cancelled(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    def __init__(self, handle: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("waiting", "running", "workers", "kv_used")
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    KV_USED_FIELD_NUMBER: _ClassVar[int]
    waiting: int
    running: int
    workers: int
    kv_used: float
    def __init__(self, waiting: _Optional[int] = ..., running: _Optional[int] = ..., workers: _Optional[int] = ..., kv_used: _Optional[float] = ...) -> None: ...

class GoAway(_message.Message):
    __slots__ = ("remaining_ms",)
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    remaining_ms: int
    def __init__(self, remaining_ms: _Optional[int] = ...) -> None: ...

class EnlistRequest(_message.Message):
    __slots__ = ("epoch", "hello", "result", "heartbeat", "draining", "asset", "assets_end")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    ASSET_FIELD_NUMBER: _ClassVar[int]
    ASSETS_END_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    hello: WorkerHello
    result: _step_pb2.StepResult
    heartbeat: WorkerHeartbeat
    draining: Draining
    asset: _common_pb2.AssetChunk
    assets_end: AssetsEnd
    def __init__(self, epoch: _Optional[int] = ..., hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., result: _Optional[_Union[_step_pb2.StepResult, _Mapping]] = ..., heartbeat: _Optional[_Union[WorkerHeartbeat, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ..., asset: _Optional[_Union[_common_pb2.AssetChunk, _Mapping]] = ..., assets_end: _Optional[_Union[AssetsEnd, _Mapping]] = ...) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("incarnation", "protocol", "model", "model_digest", "tokenizer_digest", "numerics_digest", "hash_version", "vocab_size", "max_model_len", "kv_groups", "max_rows", "max_num_batched_tokens", "capabilities", "group", "name", "backend", "kv_dtype", "address", "quantization")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HASH_VERSION_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    KV_GROUPS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    protocol: int
    model: str
    model_digest: bytes
    tokenizer_digest: bytes
    numerics_digest: bytes
    hash_version: int
    vocab_size: int
    max_model_len: int
    kv_groups: _containers.RepeatedCompositeFieldContainer[KvGroup]
    max_rows: int
    max_num_batched_tokens: int
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    group: ParallelGroup
    name: str
    backend: str
    kv_dtype: str
    address: str
    quantization: str
    def __init__(self, incarnation: _Optional[int] = ..., protocol: _Optional[int] = ..., model: _Optional[str] = ..., model_digest: _Optional[bytes] = ..., tokenizer_digest: _Optional[bytes] = ..., numerics_digest: _Optional[bytes] = ..., hash_version: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., kv_groups: _Optional[_Iterable[_Union[KvGroup, _Mapping]]] = ..., max_rows: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., capabilities: _Optional[_Iterable[str]] = ..., group: _Optional[_Union[ParallelGroup, _Mapping]] = ..., name: _Optional[str] = ..., backend: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., address: _Optional[str] = ..., quantization: _Optional[str] = ...) -> None: ...

class KvGroup(_message.Message):
    __slots__ = ("id", "block_size", "num_blocks", "bytes_per_block", "window")
    ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_BLOCK_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    id: int
    block_size: int
    num_blocks: int
    bytes_per_block: int
    window: int
    def __init__(self, id: _Optional[int] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., bytes_per_block: _Optional[int] = ..., window: _Optional[int] = ...) -> None: ...

class ParallelGroup(_message.Message):
    __slots__ = ("tensor_parallel", "pipeline_parallel", "ranks")
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    tensor_parallel: int
    pipeline_parallel: int
    ranks: int
    def __init__(self, tensor_parallel: _Optional[int] = ..., pipeline_parallel: _Optional[int] = ..., ranks: _Optional[int] = ...) -> None: ...

class WorkerHeartbeat(_message.Message):
    __slots__ = ("last_step", "device_ms")
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MS_FIELD_NUMBER: _ClassVar[int]
    last_step: int
    device_ms: int
    def __init__(self, last_step: _Optional[int] = ..., device_ms: _Optional[int] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AssetsEnd(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class EnlistResponse(_message.Message):
    __slots__ = ("epoch", "welcome", "plan", "redial", "go_away", "send_assets", "heartbeat")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    REDIAL_FIELD_NUMBER: _ClassVar[int]
    GO_AWAY_FIELD_NUMBER: _ClassVar[int]
    SEND_ASSETS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    welcome: WorkerWelcome
    plan: _step_pb2.StepPlan
    redial: Redial
    go_away: GoAway
    send_assets: SendAssets
    heartbeat: SchedulerHeartbeat
    def __init__(self, epoch: _Optional[int] = ..., welcome: _Optional[_Union[WorkerWelcome, _Mapping]] = ..., plan: _Optional[_Union[_step_pb2.StepPlan, _Mapping]] = ..., redial: _Optional[_Union[Redial, _Mapping]] = ..., go_away: _Optional[_Union[GoAway, _Mapping]] = ..., send_assets: _Optional[_Union[SendAssets, _Mapping]] = ..., heartbeat: _Optional[_Union[SchedulerHeartbeat, _Mapping]] = ...) -> None: ...

class WorkerWelcome(_message.Message):
    __slots__ = ("incarnation", "protocol", "run_ahead", "heartbeat_ms", "lease_ms")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    RUN_AHEAD_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_MS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    protocol: int
    run_ahead: int
    heartbeat_ms: int
    lease_ms: int
    def __init__(self, incarnation: _Optional[int] = ..., protocol: _Optional[int] = ..., run_ahead: _Optional[int] = ..., heartbeat_ms: _Optional[int] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class Redial(_message.Message):
    __slots__ = ("address",)
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: str
    def __init__(self, address: _Optional[str] = ...) -> None: ...

class SendAssets(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class SchedulerHeartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FetchAssetsRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class FetchAssetsResponse(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: _common_pb2.AssetChunk
    def __init__(self, chunk: _Optional[_Union[_common_pb2.AssetChunk, _Mapping]] = ...) -> None: ...

class ListWorkersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListWorkersResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("incarnation", "name", "model", "model_digest", "backend", "address", "epoch", "draining", "running", "max_rows", "blocks_total", "blocks_used", "blocks_cached", "last_step", "plans_in_flight", "quantization")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    PLANS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    name: str
    model: str
    model_digest: bytes
    backend: str
    address: str
    epoch: int
    draining: bool
    running: int
    max_rows: int
    blocks_total: int
    blocks_used: int
    blocks_cached: int
    last_step: int
    plans_in_flight: int
    quantization: str
    def __init__(self, incarnation: _Optional[int] = ..., name: _Optional[str] = ..., model: _Optional[str] = ..., model_digest: _Optional[bytes] = ..., backend: _Optional[str] = ..., address: _Optional[str] = ..., epoch: _Optional[int] = ..., draining: _Optional[bool] = ..., running: _Optional[int] = ..., max_rows: _Optional[int] = ..., blocks_total: _Optional[int] = ..., blocks_used: _Optional[int] = ..., blocks_cached: _Optional[int] = ..., last_step: _Optional[int] = ..., plans_in_flight: _Optional[int] = ..., quantization: _Optional[str] = ...) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("incarnation",)
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    def __init__(self, incarnation: _Optional[int] = ...) -> None: ...

class DrainWorkerResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AdmitDigestRequest(_message.Message):
    __slots__ = ("model", "digest")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    model: str
    digest: bytes
    def __init__(self, model: _Optional[str] = ..., digest: _Optional[bytes] = ...) -> None: ...

class AdmitDigestResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("max_hz", "worker", "rows", "once")
    MAX_HZ_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ONCE_FIELD_NUMBER: _ClassVar[int]
    max_hz: int
    worker: int
    rows: bool
    once: bool
    def __init__(self, max_hz: _Optional[int] = ..., worker: _Optional[int] = ..., rows: _Optional[bool] = ..., once: _Optional[bool] = ...) -> None: ...

class InspectResponse(_message.Message):
    __slots__ = ("full", "uptime_ms", "queue", "workers", "gone")
    FULL_FIELD_NUMBER: _ClassVar[int]
    UPTIME_MS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    full: bool
    uptime_ms: int
    queue: QueueStatus
    workers: _containers.RepeatedCompositeFieldContainer[WorkerInspection]
    gone: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, full: _Optional[bool] = ..., uptime_ms: _Optional[int] = ..., queue: _Optional[_Union[QueueStatus, _Mapping]] = ..., workers: _Optional[_Iterable[_Union[WorkerInspection, _Mapping]]] = ..., gone: _Optional[_Iterable[int]] = ...) -> None: ...

class QueueStatus(_message.Message):
    __slots__ = ("waiting", "waiting_tokens", "running", "counters")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    waiting: int
    waiting_tokens: int
    running: int
    counters: _containers.ScalarMap[str, int]
    def __init__(self, waiting: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., running: _Optional[int] = ..., counters: _Optional[_Mapping[str, int]] = ...) -> None: ...

class WorkerInspection(_message.Message):
    __slots__ = ("status", "last_plan", "rows")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    LAST_PLAN_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    status: WorkerStatus
    last_plan: PlanSummary
    rows: _containers.RepeatedCompositeFieldContainer[RowInspection]
    def __init__(self, status: _Optional[_Union[WorkerStatus, _Mapping]] = ..., last_plan: _Optional[_Union[PlanSummary, _Mapping]] = ..., rows: _Optional[_Iterable[_Union[RowInspection, _Mapping]]] = ...) -> None: ...

class PlanSummary(_message.Message):
    __slots__ = ("step_id", "decode_rows", "chunk_rows", "num_tokens", "new_rows", "freed_rows", "new_blocks")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_ROWS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEW_ROWS_FIELD_NUMBER: _ClassVar[int]
    FREED_ROWS_FIELD_NUMBER: _ClassVar[int]
    NEW_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    decode_rows: int
    chunk_rows: int
    num_tokens: int
    new_rows: int
    freed_rows: int
    new_blocks: int
    def __init__(self, step_id: _Optional[int] = ..., decode_rows: _Optional[int] = ..., chunk_rows: _Optional[int] = ..., num_tokens: _Optional[int] = ..., new_rows: _Optional[int] = ..., freed_rows: _Optional[int] = ..., new_blocks: _Optional[int] = ...) -> None: ...

class RowInspection(_message.Message):
    __slots__ = ("row", "num_prompt_tokens", "num_tokens", "num_computed", "block_ids", "priority")
    ROW_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    row: int
    num_prompt_tokens: int
    num_tokens: int
    num_computed: int
    block_ids: bytes
    priority: int
    def __init__(self, row: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., num_tokens: _Optional[int] = ..., num_computed: _Optional[int] = ..., block_ids: _Optional[bytes] = ..., priority: _Optional[int] = ...) -> None: ...
