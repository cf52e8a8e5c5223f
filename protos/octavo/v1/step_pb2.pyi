from octavo.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StepStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_STATUS_UNSPECIFIED: _ClassVar[StepStatus]
    STEP_STATUS_OK: _ClassVar[StepStatus]
    STEP_STATUS_FAILED: _ClassVar[StepStatus]

class RowStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROW_STATUS_UNSPECIFIED: _ClassVar[RowStatus]
    ROW_STATUS_NAN: _ClassVar[RowStatus]
    ROW_STATUS_MASK_EMPTY: _ClassVar[RowStatus]
    ROW_STATUS_MASK_LATE: _ClassVar[RowStatus]
STEP_STATUS_UNSPECIFIED: StepStatus
STEP_STATUS_OK: StepStatus
STEP_STATUS_FAILED: StepStatus
ROW_STATUS_UNSPECIFIED: RowStatus
ROW_STATUS_NAN: RowStatus
ROW_STATUS_MASK_EMPTY: RowStatus
ROW_STATUS_MASK_LATE: RowStatus

class StepPlan(_message.Message):
    __slots__ = ("epoch", "step_id", "new_rows", "freed_rows", "rows", "num_scheduled", "num_samples", "append_rows", "append_block_ids", "append_kv_groups", "chunk_rows", "chunk_lens", "chunk_token_ids", "num_draft_tokens", "draft_token_ids", "adapter_slots")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    NEW_ROWS_FIELD_NUMBER: _ClassVar[int]
    FREED_ROWS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_SCHEDULED_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    APPEND_ROWS_FIELD_NUMBER: _ClassVar[int]
    APPEND_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    APPEND_KV_GROUPS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_ROWS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_LENS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_SLOTS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step_id: int
    new_rows: _containers.RepeatedCompositeFieldContainer[NewRow]
    freed_rows: bytes
    rows: bytes
    num_scheduled: bytes
    num_samples: bytes
    append_rows: bytes
    append_block_ids: bytes
    append_kv_groups: bytes
    chunk_rows: bytes
    chunk_lens: bytes
    chunk_token_ids: bytes
    num_draft_tokens: bytes
    draft_token_ids: bytes
    adapter_slots: bytes
    def __init__(self, epoch: _Optional[int] = ..., step_id: _Optional[int] = ..., new_rows: _Optional[_Iterable[_Union[NewRow, _Mapping]]] = ..., freed_rows: _Optional[bytes] = ..., rows: _Optional[bytes] = ..., num_scheduled: _Optional[bytes] = ..., num_samples: _Optional[bytes] = ..., append_rows: _Optional[bytes] = ..., append_block_ids: _Optional[bytes] = ..., append_kv_groups: _Optional[bytes] = ..., chunk_rows: _Optional[bytes] = ..., chunk_lens: _Optional[bytes] = ..., chunk_token_ids: _Optional[bytes] = ..., num_draft_tokens: _Optional[bytes] = ..., draft_token_ids: _Optional[bytes] = ..., adapter_slots: _Optional[bytes] = ...) -> None: ...

class NewRow(_message.Message):
    __slots__ = ("row", "token_ids", "num_prompt_tokens", "num_computed", "block_ids", "seed", "sampling", "grammar", "more_block_tables")
    ROW_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    MORE_BLOCK_TABLES_FIELD_NUMBER: _ClassVar[int]
    row: int
    token_ids: bytes
    num_prompt_tokens: int
    num_computed: int
    block_ids: bytes
    seed: int
    sampling: _common_pb2.SamplingSpec
    grammar: _common_pb2.Grammar
    more_block_tables: _containers.RepeatedCompositeFieldContainer[BlockTable]
    def __init__(self, row: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., num_prompt_tokens: _Optional[int] = ..., num_computed: _Optional[int] = ..., block_ids: _Optional[bytes] = ..., seed: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.SamplingSpec, _Mapping]] = ..., grammar: _Optional[_Union[_common_pb2.Grammar, _Mapping]] = ..., more_block_tables: _Optional[_Iterable[_Union[BlockTable, _Mapping]]] = ...) -> None: ...

class BlockTable(_message.Message):
    __slots__ = ("kv_group", "block_ids")
    KV_GROUP_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    kv_group: int
    block_ids: bytes
    def __init__(self, kv_group: _Optional[int] = ..., block_ids: _Optional[bytes] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("epoch", "step_id", "status", "message", "num_tokens", "row_status", "num_accepted", "token_ids", "logprobs", "pooled", "device_ns", "gap_ns")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROW_STATUS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    POOLED_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NS_FIELD_NUMBER: _ClassVar[int]
    GAP_NS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step_id: int
    status: StepStatus
    message: str
    num_tokens: bytes
    row_status: bytes
    num_accepted: bytes
    token_ids: bytes
    logprobs: _common_pb2.LogprobColumns
    pooled: bytes
    device_ns: int
    gap_ns: int
    def __init__(self, epoch: _Optional[int] = ..., step_id: _Optional[int] = ..., status: _Optional[_Union[StepStatus, str]] = ..., message: _Optional[str] = ..., num_tokens: _Optional[bytes] = ..., row_status: _Optional[bytes] = ..., num_accepted: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[_Union[_common_pb2.LogprobColumns, _Mapping]] = ..., pooled: _Optional[bytes] = ..., device_ns: _Optional[int] = ..., gap_ns: _Optional[int] = ...) -> None: ...
