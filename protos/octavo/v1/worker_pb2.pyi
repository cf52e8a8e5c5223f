from octavo.v1 import scheduler_pb2 as _scheduler_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetInfoResponse(_message.Message):
    __slots__ = ("hello", "scheduler", "epoch", "steps", "tokens", "device_ns", "gap_ns")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NS_FIELD_NUMBER: _ClassVar[int]
    GAP_NS_FIELD_NUMBER: _ClassVar[int]
    hello: _scheduler_pb2.WorkerHello
    scheduler: str
    epoch: int
    steps: int
    tokens: int
    device_ns: int
    gap_ns: int
    def __init__(self, hello: _Optional[_Union[_scheduler_pb2.WorkerHello, _Mapping]] = ..., scheduler: _Optional[str] = ..., epoch: _Optional[int] = ..., steps: _Optional[int] = ..., tokens: _Optional[int] = ..., device_ns: _Optional[int] = ..., gap_ns: _Optional[int] = ...) -> None: ...
