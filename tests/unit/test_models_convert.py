"""GGUF conversion on tiny files: a checkpoint goes to GGUF as llama.cpp writes it and must come back the same."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from octavo.models.errors import CacheError, ConvertError, GGUFError, ModelError
from octavo.models.gguf_convert import convert
from octavo.models.gguf_file import GGUFFile
from octavo.models.progress import Progress
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 64, 32, 4, 2, 8, 64
TOKENS = ["<s>", "</s>", "<|eot_id|>", *(chr(ord("A") + i) for i in range(58)), "Ġ", "ab", "abc"]
TYPES = [3, 3, 3] + [1] * 61

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip

Edit = Callable[[gguf.GGUFWriter], None]


def tiny_model(arch: str, tied: bool) -> Any:
    classes: dict[str, type[PreTrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    config = classes[arch](
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, max_position_embeddings=128, rms_norm_eps=1e-5,
        rope_theta=50000.0, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():  # biases and norms start at 0 and 1, which would hide a mix-up
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def to_gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def permute(weights: np.ndarray, n_head: int) -> np.ndarray:
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    split = weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def write_gguf(path: Path, arch: str, state: dict[str, np.ndarray], edit: Edit | None = None, **changes: Any) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    sizes = {
        "block_count": 2, "context_length": 128, "embedding_length": HIDDEN, "feed_forward_length": INNER,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM, "rope.dimension_count": HEAD_DIM,
    }  # fmt: skip
    for key, value in (sizes | changes).items():
        if value is not None:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{arch}.rope.freq_base", 50000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(list(TOKENS))
    writer.add_token_types(TYPES)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, values in state.items():
        target = to_gguf_name(name)
        if arch == "llama" and "attn_q." in target:
            values = permute(values, HEADS)
        if arch == "llama" and "attn_k." in target:
            values = permute(values, KV_HEADS)
        writer.add_tensor(target, np.ascontiguousarray(values))
    if edit is not None:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def state_of(model: Any, tied: bool) -> dict[str, np.ndarray]:
    return {
        name: tensor.float().numpy()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }


@pytest.fixture(scope="module")
def llama_state() -> dict[str, np.ndarray]:
    return state_of(tiny_model("llama", True), True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_round_trip_gives_the_same_logits(tmp_path: Path, arch: str, tied: bool) -> None:
    model = tiny_model(arch, tied)
    path = write_gguf(tmp_path / "x.gguf", arch, state_of(model, tied))
    reports: list[Progress] = []
    directory = convert(path, tmp_path / "out", reports.append)
    back = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert type(back) is type(model)
    assert back.config.tie_word_embeddings is tied
    n_tensors = len(load_file(directory / "model.safetensors"))
    assert reports == [Progress("convert", i + 1, n_tensors, "tensors") for i in range(n_tensors)]
    ids = torch.arange(40).reshape(1, 40)  # positions past the first, where RoPE matters
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, back.eval()(ids).logits)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
def test_quantised_permuted_weights_in_pieces(
    tmp_path: Path, llama_state: dict[str, np.ndarray], kind: gguf.GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A piece smaller than a tensor, so that pieces must end at whole heads.
    monkeypatch.setattr("octavo.models.gguf_weights._PIECE_ELEMENTS", HIDDEN * (HEAD_DIM + 3))
    name = "model.layers.0.self_attn.q_proj.weight"

    def quantise(writer: gguf.GGUFWriter) -> None:
        raw = gguf.quantize(permute(llama_state[name], HEADS), kind)
        writer.add_tensor(to_gguf_name(name), raw, raw_dtype=kind)

    state = {key: value for key, value in llama_state.items() if key != name}
    out = convert(write_gguf(tmp_path / "x.gguf", "llama", state, quantise), tmp_path / "out")
    expected = gguf.dequantize(gguf.quantize(llama_state[name], kind), kind)
    got = load_file(out / "model.safetensors")[name]
    assert torch.equal(got, torch.from_numpy(expected).to(torch.bfloat16))


def test_stop_tokens_bos_and_sampling_defaults(tmp_path: Path, llama_state: dict[str, np.ndarray]) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_float32("general.sampling.temp", 0.6)
        writer.add_int32("general.sampling.top_k", 20)
        writer.add_chat_template("{{ bos_token }}{{ messages[0]['content'] }}")

    out = convert(
        write_gguf(tmp_path / "x.gguf", "llama", llama_state, edit), tmp_path / "out", generation={"top_p": 0.9}
    )
    assert json.loads((out / "generation_config.json").read_text()) == {
        "bos_token_id": 0, "eos_token_id": [1, 2], "temperature": 0.6, "top_k": 20, "do_sample": True, "top_p": 0.9,
    }  # fmt: skip
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert (tokenizer["bos_token"], tokenizer["eos_token"], tokenizer["add_bos_token"]) == ("<s>", "</s>", False)
    assert "chat_template" in tokenizer


def _llama3_freqs(factor: float) -> tuple[Any, np.ndarray]:
    """transformers' own llama3 frequencies, and the divisors that lead from the plain ones to them."""
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=64, rope_theta=500000.0, max_position_embeddings=131072,
        rope_scaling={"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192},
    )  # fmt: skip
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 500000.0 ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    return scaled, (plain / scaled).numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recognised(tmp_path: Path, factor: float) -> None:
    _, divisors = _llama3_freqs(factor)
    head = 64
    state = llama_like_state(head)

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0]["llama.rope.freq_base"].value = 500000.0
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))

    sizes = dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), head)
    path = write_gguf(tmp_path / "x.gguf", "llama", state, edit, **sizes)
    config = json.loads((convert(path, tmp_path / "out") / "config.json").read_text())
    assert config["rope_scaling"] == {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


def llama_like_state(head_dim: int) -> dict[str, np.ndarray]:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=head_dim, tie_word_embeddings=True,
    )  # fmt: skip
    return state_of(AutoModelForCausalLM.from_config(config), True)


def test_other_rope_freqs_are_refused(tmp_path: Path, llama_state: dict[str, np.ndarray]) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.array([1, 3, 2, 4], np.float32))

    with pytest.raises(ConvertError, match=r"rope_freqs\.weight"):
        convert(write_gguf(tmp_path / "x.gguf", "llama", llama_state, edit), tmp_path / "out")


def test_yarn_and_sliding_window(tmp_path: Path, llama_state: dict[str, np.ndarray]) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", "yarn")
        writer.add_float32("llama.rope.scaling.factor", 4.0)
        writer.add_uint32("llama.rope.scaling.original_context_length", 32)
        writer.add_uint32("llama.attention.sliding_window", 16)

    out = convert(write_gguf(tmp_path / "x.gguf", "llama", llama_state, edit), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert config["architectures"] == ["MistralForCausalLM"] and config["sliding_window"] == 16


REFUSED: dict[str, tuple[type[ModelError], str, Edit]] = {
    "experts": (ConvertError, "expert_count", lambda w: w.add_uint32("llama.expert_count", 8)),
    "scale": (ConvertError, "logit_scale", lambda w: w.add_float32("llama.logit_scale", 0.5)),
    "split": (ConvertError, "split", lambda w: w.add_uint16("split.count", 3)),
    "longrope": (ConvertError, "longrope", lambda w: (
        w.add_string("llama.rope.scaling.type", "longrope"), w.add_float32("llama.rope.scaling.factor", 2.0))),
    "extra tensor": (ConvertError, r"blk\.0\.attn_q\.bias", lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(32, np.float32))),
    "charsmap": (ConvertError, "precompiled_charsmap", lambda w: w.add_array("tokenizer.ggml.precompiled_charsmap", [1, 2])),
    "eot": (GGUFError, "eot_token_id is 999", lambda w: w.add_uint32("tokenizer.ggml.eot_token_id", 999)),
    "bad eps": (GGUFError, "is nan", lambda w: w.kv_data[0]["llama.rope.freq_base"].__setattr__("value", float("nan"))),
    "head count type": (GGUFError, "head_count", lambda w: w.kv_data[0].__setitem__(
        "llama.attention.head_count", gguf.gguf_writer.GGUFValue("four", gguf.GGUFValueType.STRING))),
    "merges": (GGUFError, "merges", lambda w: w.kv_data[0]["tokenizer.ggml.merges"].value.append("q zz")),
    "duplicate token": (GGUFError, "twice", lambda w: w.kv_data[0]["tokenizer.ggml.tokens"].value.__setitem__(5, "abc")),
    "split as text": (GGUFError, "split.count is of type str", lambda w: w.add_string("split.count", "x")),
    "split as list": (GGUFError, "split.count is of type list", lambda w: w.add_array("split.count", [1, 2])),
    "base beyond float32": (GGUFError, "freq_base is 1e[+]300", lambda w: w.kv_data[0].__setitem__(
        "llama.rope.freq_base", gguf.gguf_writer.GGUFValue(1e300, gguf.GGUFValueType.FLOAT64))),
    "base of one": (GGUFError, "freq_base is 1.0, which must be above 1", lambda w: w.kv_data[0][
        "llama.rope.freq_base"].__setattr__("value", 1.0)),
    "eps of zero": (GGUFError, "epsilon is 0.0", lambda w: w.kv_data[0][
        "llama.attention.layer_norm_rms_epsilon"].__setattr__("value", 0.0)),
    "scores as text": (GGUFError, "scores or token_type", lambda w: (
        w.kv_data[0]["tokenizer.ggml.model"].__setattr__("value", "llama"), w.add_array("tokenizer.ggml.scores", ["x"] * VOCAB))),
    "long token": (GGUFError, "more than 4096 characters", lambda w: w.kv_data[0][
        "tokenizer.ggml.tokens"].value.__setitem__(5, "x" * 100_000)),
    "NaN divisors": (GGUFError, "NaN divisors", lambda w: w.add_tensor("rope_freqs.weight", np.full(4, np.nan, np.float32))),
    "no pre": (GGUFError, r"no tokenizer\.ggml\.pre", lambda w: w.kv_data[0].pop("tokenizer.ggml.pre")),
    "other pre": (ConvertError, "viking", lambda w: w.kv_data[0]["tokenizer.ggml.pre"].__setattr__("value", "viking")),
    "other model": (ConvertError, "bert", lambda w: w.kv_data[0]["tokenizer.ggml.model"].__setattr__("value", "bert")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_key_named_and_nothing_left(
    tmp_path: Path, llama_state: dict[str, np.ndarray], case: str
) -> None:
    error, message, edit = REFUSED[case]
    path = write_gguf(tmp_path / "x.gguf", "llama", llama_state, edit)
    with pytest.raises(error, match=message) as caught:
        convert(path, tmp_path / "out")
    assert str(path) in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("block_count", 4_000_000_000, r"no tensor blk\.2\."),
        ("block_count", None, "block_count"),
        ("embedding_length", 64, "has shape"),
        ("attention.head_count_kv", 3, "no multiple"),
        ("attention.head_count", 0, "is 0"),
        ("rope.dimension_count", 4, "dimension_count"),
    ],
)
def test_sizes_that_lie(
    tmp_path: Path, llama_state: dict[str, np.ndarray], key: str, value: int | None, message: str
) -> None:
    path = write_gguf(tmp_path / "x.gguf", "llama", llama_state, **{key: value})
    with pytest.raises(ConvertError, match=message):
        convert(path, tmp_path / "out")


def test_tensors_wrong_in_themselves(tmp_path: Path, llama_state: dict[str, np.ndarray]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    for values, message in (
        (np.full((INNER, HIDDEN), np.nan, np.float32), "NaN"),
        (np.zeros((INNER, HIDDEN + 1), np.float32), "has shape"),
        (np.zeros((INNER, HIDDEN), np.int32), "type I32"),
    ):
        path = write_gguf(tmp_path / "x.gguf", "llama", llama_state | {name: values})
        with pytest.raises(ConvertError, match=message) as caught:
            convert(path, tmp_path / "out")
        assert "blk.1.ffn_up.weight" in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_architecture_and_magic_are_named(tmp_path: Path) -> None:
    other = gguf.GGUFWriter(tmp_path / "bert.gguf", "bert")
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.close()
    with pytest.raises(ConvertError, match="'bert'"):
        convert(tmp_path / "bert.gguf", tmp_path / "out")
    for content in (b"", b"GG", b"PK\x03\x04" + bytes(100), b"GGUF" + struct.pack("<IQQ", 9, 0, 0)):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(GGUFError):
            convert(tmp_path / "x", tmp_path / "out")
    with pytest.raises(GGUFError, match="cannot be read"):
        convert(tmp_path / "absent", tmp_path / "out")


def test_array_length_that_lies_is_found_at_once(tmp_path: Path) -> None:
    key = b"tokenizer.ggml.scores"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    (tmp_path / "x").write_bytes(head + struct.pack("<IIQ", 9, 6, 1 << 60) + bytes(64))
    with pytest.raises(GGUFError, match=r"scores announces 1152921504606846976 items"):
        GGUFFile(tmp_path / "x")


def test_truncated_anywhere_is_a_gguf_error(tmp_path: Path, llama_state: dict[str, np.ndarray]) -> None:
    whole = write_gguf(tmp_path / "x.gguf", "llama", llama_state).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 6000, 61), *range(6000, len(whole) - 40, 2003), len(whole) - 40]:
        cut.write_bytes(whole[:length])
        with pytest.raises(GGUFError, match=r"truncated|magic|not a GGUF"):
            GGUFFile(cut)


def test_flipped_bytes_convert_or_end_in_a_typed_error(tmp_path: Path, llama_state: dict[str, np.ndarray]) -> None:
    whole = write_gguf(tmp_path / "x.gguf", "llama", llama_state).read_bytes()
    metadata_bytes = len(whole) - sum(t.data.size for t in GGUFFile(tmp_path / "x.gguf").tensors.values())
    generator, refused = np.random.default_rng(3), 0
    for round_number in range(250):
        broken = bytearray(whole)
        for position in generator.integers(0, metadata_bytes, 2):
            broken[position] = generator.integers(0, 256)
        (tmp_path / "y.gguf").write_bytes(broken)
        out = tmp_path / f"out{round_number}"
        try:
            convert(tmp_path / "y.gguf", out)
        except ModelError:
            refused += 1
            assert not out.exists()
    assert refused > 50
    assert not list(tmp_path.glob(".*"))


def test_reader_agrees_with_the_library(tmp_path: Path, llama_state: dict[str, np.ndarray]) -> None:
    path = write_gguf(tmp_path / "x.gguf", "llama", llama_state)
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    assert ours.fields == {key: f.contents() for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].data.tobytes() == tensor.data.tobytes()
        assert ours.tensors[tensor.name].shape == tuple(tensor.shape[::-1].tolist())


def test_existing_directory_is_refused(tmp_path: Path, llama_state: dict[str, np.ndarray]) -> None:
    path = write_gguf(tmp_path / "x.gguf", "llama", llama_state)
    (tmp_path / "empty").mkdir()
    assert convert(path, tmp_path / "empty") == tmp_path / "empty"
    with pytest.raises(CacheError, match="not empty"):
        convert(path, tmp_path / "empty")
