"""A worker's flags."""

from __future__ import annotations

from dataclasses import dataclass

from service.settings import CommonSettings, SettingsError, flag


@dataclass(frozen=True, kw_only=True)
class WorkerSettings(CommonSettings):
    """A worker: holds a model on a GPU or on the CPU, enlists with a scheduler and runs its steps."""

    scheduler: tuple[str, ...] = flag("scheduler to enlist with, HOST:PORT; may be repeated", ())
    model: str = flag("model directory, a name in the model cache, or mock", "smollm2")
    served_name: str | None = flag("name under which requests ask for the model", None)
    backend: str = flag("what runs the model", "auto", ("auto", "torch", "cuda", "mock"))
    dtype: str = flag("arithmetic", "auto", ("auto", "bfloat16", "float16", "float32"))
    quantization: str = flag(
        "torch backend: int8 rounds weights and activations to 8 bits, each 32 with a scale of their own. Faster, in half the memory, "
        "and a row's tokens still do not depend on its neighbours; but they are not the unquantised model's, so its digest is another",
        "none",
        ("none", "int8"),
    )
    max_model_len: int = flag("context in tokens, prompt and output together (0: the model's own)", 0)
    max_rows: int = flag("requests that run at once", 256)
    max_num_batched_tokens: int = flag("tokens of a step at most (0: 512 on CPU, 8192 on GPU and mock)", 0)
    memory_fraction: float = flag(
        "share of the device's free memory for weights and KV cache (0: 0.9 on a GPU; on a CPU the weights and half of the rest)",
        0.0,
    )
    promised_bytes: int = flag(
        "torch backend: bytes of the free memory that other workers may still take; --memory-fraction is of the rest", 0
    )
    num_blocks: int = flag("KV-cache blocks (0: as many as the memory fraction holds)", 0)
    block_size: int = flag("tokens of a KV-cache block", 16)
    capture_at_start: bool = flag(
        "cuda: capture the graphs of every batch size at the start, not at their first use", False
    )
    shared_prefix: bool = flag("cuda: many rows behind one prefix read its keys and values together", True)
    hang_seconds: float = flag(
        "seconds that a step may be on the device before the worker counts as hung, and unready", 30.0
    )
    hang_exit_seconds: float = flag("seconds after which a hung worker ends with exit code 1 (0: never)", 60.0)
    threads: int = flag("CPU threads of the torch backend (0: one for each core)", 0)
    mock_vocab_size: int = flag("mock: vocabulary", 32_000)
    mock_step_ms: float = flag("mock: device time of a step", 0.0)
    mock_token_us: float = flag("mock: device time of each scheduled token", 0.0)
    mock_eos_every: int = flag("mock: one token in so many ends the sequence (0: never)", 0)
    mock_die_at_step: int = flag("mock: the process dies at this step (0: never)", 0)
    mock_hang_at_step: int = flag("mock: this step's result never comes (0: never)", 0)
    mock_fail_at_step: int = flag("mock: this step fails (0: never)", 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_model_len", "max_num_batched_tokens", "num_blocks", "threads", "promised_bytes"):
            if getattr(self, name) < 0:
                raise SettingsError(f"--{name.replace('_', '-')} must not be negative")
        if self.max_rows < 1 or self.block_size < 1:
            raise SettingsError("--max-rows and --block-size must be at least 1")
        if self.hang_seconds <= 0 or self.hang_exit_seconds < 0:
            raise SettingsError("--hang-seconds must be above 0 and --hang-exit-seconds not negative")
        if not 0.0 <= self.memory_fraction <= 1.0:
            raise SettingsError("--memory-fraction must be at least 0 and at most 1")
        if self.mock_vocab_size < 300:
            raise SettingsError("--mock-vocab-size must be at least 300")
        if not self.scheduler and self.redis is None:
            raise SettingsError("--scheduler or --redis must say where to enlist")
