"""GGUF files written from a description, so that each count, length, type and offset can lie by itself."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from random import Random
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGUFValueType as T

from tests.fuzz import values

_FORMATS = {
    T.UINT8: "B", T.INT8: "b", T.UINT16: "H", T.INT16: "h", T.UINT32: "I", T.INT32: "i", T.FLOAT32: "f", T.BOOL: "?", T.UINT64: "Q",
    T.INT64: "q", T.FLOAT64: "d",
}  # fmt: skip
_VOCAB, _HIDDEN, _HEADS, _KV_HEADS, _HEAD_DIM, _INNER = 24, 32, 2, 1, 4, 32


@dataclass(slots=True)
class Tensor:
    """One entry of the tensor table. `shape` is in the file's order."""

    name: str
    shape: list[int]
    kind: int
    data: bytes
    offset: int | None = None  # a lie


@dataclass(slots=True)
class Description:
    """A file: (type, value) by key, an array's value being (type of items, items); and what the header says."""

    fields: dict[str, tuple[T | int, Any]]
    tensors: list[Tensor]
    magic: bytes = b"GGUF"
    version: int = 3
    extra_fields: int = 0
    extra_tensors: int = 0
    extra_items: dict[str, int] = field(default_factory=dict)


def valid(random: Random) -> Description:
    """A tiny model, one layer, that converts."""
    arch = random.choice(("llama", "qwen2", "qwen3"))
    kind = random.choice(("gpt2", "llama"))
    sizes = {
        "block_count": 1, "context_length": 64, "embedding_length": _HIDDEN, "feed_forward_length": _INNER,
        "attention.head_count": _HEADS, "attention.head_count_kv": _KV_HEADS, "attention.key_length": _HEAD_DIM,
        "attention.value_length": _HEAD_DIM, "rope.dimension_count": _HEAD_DIM,
    }  # fmt: skip
    fields: dict[str, tuple[T | int, Any]] = {"general.architecture": (T.STRING, arch)}
    fields |= {f"{arch}.{key}": (T.UINT32, value) for key, value in sizes.items()}
    fields[f"{arch}.attention.layer_norm_rms_epsilon"] = (T.FLOAT32, 1e-5)
    fields[f"{arch}.rope.freq_base"] = (T.FLOAT32, 10000.0)
    if random.random() < 0.3:
        fields[f"{arch}.rope.scaling.type"] = (T.STRING, random.choice(("linear", "yarn")))
        fields[f"{arch}.rope.scaling.factor"] = (T.FLOAT32, 2.0)
        fields[f"{arch}.rope.scaling.original_context_length"] = (T.UINT32, 32)
    fields["general.sampling.temp"] = (T.FLOAT32, 0.5)
    fields["general.sampling.top_k"] = (T.INT32, 5)
    more: dict[str, tuple[T | int, Any]] = {
        "split.count": (T.UINT16, 1), f"{arch}.expert_count": (T.UINT32, 0), f"{arch}.rope.scale_linear": (T.FLOAT32, 2.0),
        "tokenizer.ggml.eot_token_id": (T.UINT32, 2), "tokenizer.ggml.padding_token_id": (T.UINT32, 0),
        "tokenizer.ggml.add_eos_token": (T.BOOL, True), "tokenizer.ggml.add_space_prefix": (T.BOOL, False),
    }  # fmt: skip
    fields |= {key: value for key, value in more.items() if random.random() < 0.3}
    tokens = ["<unk>", "<s>", "</s>", "Ġ", *(chr(97 + i) for i in range(18)), "ab", "abc"]
    fields |= {
        "tokenizer.ggml.model": (T.STRING, kind), "tokenizer.ggml.pre": (T.STRING, random.choice(("qwen2", "llama-bpe", "smollm"))),
        "tokenizer.ggml.tokens": (T.ARRAY, (T.STRING, tokens)), "tokenizer.ggml.token_type": (T.ARRAY, (T.INT32, [2, 3,
        3] + [1] * 21)),
        "tokenizer.ggml.scores": (T.ARRAY, (T.FLOAT32, [-float(i) for i in range(24)])),
        "tokenizer.ggml.merges": (T.ARRAY, (T.STRING, ["a b", "ab c"])), "tokenizer.ggml.unknown_token_id": (T.UINT32, 0),
        "tokenizer.ggml.bos_token_id": (T.UINT32, 1), "tokenizer.ggml.eos_token_id": (T.UINT32, 2),
        "tokenizer.ggml.add_bos_token": (T.BOOL, True), "tokenizer.chat_template": (T.STRING, "{{ messages[0].content }}"),
    }  # fmt: skip
    return Description(fields, _tensors(arch, random))


def _tensors(arch: str, random: Random) -> list[Tensor]:
    q, kv = _HEADS * _HEAD_DIM, _KV_HEADS * _HEAD_DIM
    shapes: dict[str, list[int]] = {
        "token_embd.weight": [_HIDDEN, _VOCAB], "output_norm.weight": [_HIDDEN], "blk.0.attn_norm.weight": [_HIDDEN],
        "blk.0.attn_q.weight": [_HIDDEN, q], "blk.0.attn_k.weight": [_HIDDEN, kv], "blk.0.attn_v.weight": [_HIDDEN, kv],
        "blk.0.attn_output.weight": [q, _HIDDEN], "blk.0.ffn_norm.weight": [_HIDDEN], "blk.0.ffn_gate.weight": [_HIDDEN, _INNER],
        "blk.0.ffn_up.weight": [_HIDDEN, _INNER], "blk.0.ffn_down.weight": [_INNER, _HIDDEN],
    }  # fmt: skip
    if arch == "qwen2":
        shapes |= {"blk.0.attn_q.bias": [q], "blk.0.attn_k.bias": [kv], "blk.0.attn_v.bias": [kv]}
    if arch == "qwen3":
        shapes |= {"blk.0.attn_q_norm.weight": [_HEAD_DIM], "blk.0.attn_k_norm.weight": [_HEAD_DIM]}
    if random.random() < 0.2:
        shapes["rope_freqs.weight"] = [_HEAD_DIM // 2]
    tensors = []
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.F32
        if shape[0] == _HIDDEN and len(shape) == 2:
            kind = random.choice((kind, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16))
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = bytes(int(np.prod(shape)) // block * size)
        if name == "rope_freqs.weight":
            data = np.ones(shape, np.float32).tobytes() if random.random() < 0.7 else random.randbytes(len(data))
        tensors.append(Tensor(name, shape, int(kind), data))
    return tensors


_RETYPED: tuple[tuple[T | int, Any], ...] = (
    (T.STRING, "x"), (T.FLOAT64, 1e300), (T.FLOAT64, 1e-300), (T.FLOAT32, 0.0), (T.BOOL, True), (T.INT64, -5),
    (T.UINT64, (1 << 64) - 1),
    (T.ARRAY, (T.INT32, [1, 2])), (T.ARRAY, (T.STRING, ["a"])),
)  # fmt: skip


def lie(random: Random, file: Description) -> None:
    """Change one thing."""
    kind = random.randrange(12)
    keys = list(file.fields)
    key = random.choice(keys)
    tensor = random.choice(file.tensors) if file.tensors else Tensor("x", [1], 0, b"")
    value_type, value = file.fields[key]
    if kind == 0:
        del file.fields[key]
    elif kind == 1:
        file.fields[key] = file.fields[random.choice(keys)]
    elif kind in (2, 3):
        file.fields[key] = (value_type, _other(random, value_type, value))
    elif kind == 4:
        file.fields[key] = random.choice((*_RETYPED, (values.integer(random, 0, 14), value)))
    elif kind == 5:
        tensor.shape = [values.integer(random, 0, (1 << 64) - 1) for _ in range(random.randrange(6))]
    elif kind == 6 and tensor.shape:
        tensor.shape[random.randrange(len(tensor.shape))] = values.integer(random, 0, (1 << 64) - 1)
    elif kind == 7:
        tensor.kind = values.integer(random, 0, 45)
    elif kind == 8:
        tensor.offset = values.integer(random, 0, (1 << 64) - 1)
    elif kind == 9:
        tensor.name = random.choice(
            (random.choice(file.tensors).name if file.tensors else "", values.text(random)[:200], "rope_freqs.weight")
        )
    elif kind == 10:
        file.extra_fields, file.extra_tensors = (
            random.choice((0, 0, -1, 1, 1 << 40, (1 << 64) - 40)) for _ in range(2)
        )
    else:
        file.extra_items[key] = random.choice((-1, 1, 1 << 33, (1 << 64) - 100))
        file.fields["general.alignment"] = (T.UINT32, random.choice((0, 1, 3, 32, 1 << 31)))


def _other(random: Random, value_type: Any, value: Any) -> Any:
    if value_type == T.STRING:
        return random.choice((values.text(random), "llama", "yarn", "gpt2", value * 2000))
    if value_type == T.BOOL:
        return not value
    if value_type in (T.FLOAT32, T.FLOAT64):
        return values.number(random)
    if value_type != T.ARRAY:
        return values.integer(random, 0, (1 << 32) - 1)
    item_type, items = value
    changed = list(items)
    kind = random.randrange(5)
    if kind == 0 or not changed:
        retyped: tuple[tuple[Any, list[Any]], ...] = (
            (T.STRING, [str(i) for i in range(len(changed))]), (T.INT32, list(range(len(changed)))), (T.BOOL, [True] * len(changed)),
            (T.FLOAT64, [1e300] * len(changed)), (T.ARRAY, changed), (77, changed),
        )  # fmt: skip
        return random.choice(retyped)
    at = random.randrange(len(changed))
    if kind == 1:
        del changed[at]
    elif kind == 2:
        changed.insert(at, changed[random.randrange(len(changed))])
    else:
        changed[at] = _other(random, item_type, changed[at])
    return (item_type, changed)


def write(file: Description, alignment: int = 32) -> bytes:
    """The bytes."""
    out = [file.magic, struct.pack("<I", file.version)]
    out.append(
        struct.pack("<QQ", _wrap(len(file.tensors) + file.extra_tensors), _wrap(len(file.fields) + file.extra_fields))
    )
    for key, (value_type, value) in file.fields.items():
        out += [_text(key), struct.pack("<I", int(value_type)), _value(value_type, value, file.extra_items.get(key, 0))]
    at = 0
    for tensor in file.tensors:
        offset = at if tensor.offset is None else tensor.offset
        out += [
            _text(tensor.name),
            struct.pack("<I", len(tensor.shape)),
            *(struct.pack("<Q", size) for size in tensor.shape),
        ]
        out.append(struct.pack("<IQ", tensor.kind & 0xFFFFFFFF, offset))
        at += -(-len(tensor.data) // alignment) * alignment
    head = b"".join(out)
    body = b"".join(tensor.data + bytes(-len(tensor.data) % alignment) for tensor in file.tensors)
    return head + bytes(-len(head) % alignment) + body


def _value(value_type: Any, value: Any, extra: int) -> bytes:
    if isinstance(value, tuple):
        item_type, items = value
        return struct.pack("<IQ", int(item_type), _wrap(len(items) + extra)) + b"".join(
            _value(item_type, item, 0) for item in items
        )
    if isinstance(value, str):
        return _text(value)
    code = _FORMATS.get(value_type, "I")
    try:
        return struct.pack(f"<{code}", value)
    except (struct.error, OverflowError):
        return struct.pack("<Q", int(value) & (1 << 64) - 1) if value == value and abs(value) < 1e30 else bytes(8)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _wrap(count: int) -> int:
    return count & (1 << 64) - 1
