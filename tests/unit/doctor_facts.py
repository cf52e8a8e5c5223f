"""A sound machine, GPU and model, for the tests of `octavo doctor` to change."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

from octavo.doctor import gpu, host
from octavo.doctor.findings import Finding, State

HOST = host.Host(
    python=(3, 11, 7),
    executable="/bin/python",
    system="Linux",
    machine="x86_64",
    libc="glibc",
    cpu_name="CPU",
    cpu_flags=frozenset({"avx2", "avx512f", "avx512_vnni", "amx_int8"}),
    cores=8,
    quota=None,
    memory_total=64 << 30,
    memory_available=32 << 30,
    open_files=(65_536, 65_536),
)
GPU = gpu.Gpu(index=0, name="H100", driver="580.65.06", memory_total=80 << 30, memory_free=79 << 30, capability=(9, 0))


def only(findings: Sequence[Finding]) -> Finding:
    (finding,) = findings
    assert finding.state is not State.PROBLEM or finding.remedy, "a problem says what to do"
    return finding


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 131_072,
    "dtype": "bfloat16", "tie_word_embeddings": True,
}  # fmt: skip


def write_tensors(path: Path, size: int) -> None:
    header = json.dumps({"__metadata__": {}, "t": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


def make_model(directory: Path) -> Path:
    """A whole model directory of two shards, 30 bytes of weights."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tensors(directory / "model-1.safetensors", 10)
    write_tensors(directory / "model-2.safetensors", 20)
    return directory
