"""The cuda backend: our kernels for all but the large matrix products, rows and tokens on the device, no waiting inside a step.

The launch thread enqueues on one stream: a copy of the plan's columns, the forward pass, sampling, a copy of the tokens to a
pinned slot. Step n + 1 may be enqueued before step n has run, because its input token is looked up on the device. A step whose rows
have one token each is two CUDA graphs, and so is a short one with chunks; a longer one is launched kernel by kernel. With
`shared_prefix` rows behind one prefix read it together.
"""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import torch
from cuda.core import Device

from kernels.cache import CubinCache, default_directory
from kernels.compiler import CompileError, Compiler, architecture_of, sources_digest
from kernels.launcher import KernelLibrary, LaunchError
from kernels.ops import KernelOps
from kernels.shapes import KernelShape, ShapeError, kernel_specs
from worker.backend import BackendError, BackendInfo, KVGroup, Masks, Progress
from worker.backends.cuda_columns import MixedShapes, StepColumns, StepLayout, lay_out
from worker.backends.cuda_device import CudaDevice
from worker.backends.cuda_graphs import GraphCache
from worker.backends.cuda_launch import StepLauncher
from worker.backends.cuda_memory import MemoryPlan
from worker.backends.cuda_model import CudaDecoder, Workspace, allocate_workspace
from worker.backends.cuda_prefix import PrefixPlanner
from worker.backends.cuda_prompt import PromptDescriber
from worker.backends.cuda_results import ResultRing, Slot
from worker.backends.cuda_rows import DeviceRows
from worker.backends.cuda_sampler import CudaSampler
from worker.backends.cuda_settings import DTYPES, CudaSettings
from worker.backends.shared_prefix import MOST_PARTS
from worker.checkpoint.config import ModelConfig, load_config
from worker.checkpoint.errors import CheckpointError
from worker.checkpoint.upload import Upload
from worker.checkpoint.weights import Weights, upload_weights
from worker.step import NewRow, SamplingParams, Step, StepOutput

_RESULT_SLOTS = 8  # steps that may be launched and not collected; the scheduler's run-ahead is at most 4
_LONG_STEP = 512  # tokens: longer ones are no graphs (cuda_columns.py)


class CudaBackend:
    """Implements worker.backend.Backend on one NVIDIA GPU of compute capability 8.0 or more."""

    def __init__(self, model_dir: Path, settings: CudaSettings) -> None:
        self._model_dir = model_dir
        self._settings = settings

    def load(self, progress: Progress) -> BackendInfo:
        settings = self._settings
        try:
            config = load_config(self._model_dir)
            self._device = CudaDevice(settings.device)
            with self._device.launching():
                info = self._load(config, progress)
                self._device.stream.synchronize()
                return info
        except (CompileError, LaunchError, ShapeError, CheckpointError) as error:
            raise BackendError(str(error)) from error
        except torch.OutOfMemoryError as error:
            raise BackendError(f"GPU {settings.device}: out of memory while loading: {error}") from error

    def _load(self, config: ModelConfig, progress: Progress) -> BackendInfo:
        settings = self._settings
        dtype = DTYPES.get(config.dtype if settings.dtype == "auto" else settings.dtype, torch.bfloat16)
        limit = _longest_context(config)
        if settings.max_model_len is not None and settings.max_model_len > limit:
            raise BackendError(
                f"max_model_len: {settings.max_model_len} is more than the {limit} that the model was made for"
            )
        longest = settings.max_model_len or limit
        shape = _kernel_shape(config, dtype, settings.block_size)
        device = self._device.torch
        properties = torch.cuda.get_device_properties(device)
        free, _ = torch.cuda.mem_get_info(device)
        depth = 8 if Device(settings.device).properties.max_shared_memory_per_block_optin >= 160 * 1024 else 4
        architecture = architecture_of(properties.major, properties.minor)
        compiler = Compiler(architecture, CubinCache(settings.cubin_cache or default_directory()))
        with Upload(device) as upload:
            # The disk reads while the kernels compile or load.
            weights = upload_weights(self._model_dir, config, dtype, upload)
            loaded = torch.cuda.memory_allocated(device)
            library = KernelLibrary(
                compiler, kernel_specs(shape, depth, architecture), settings.device, overlap=properties.major >= 9
            )
            ops = KernelOps(library, shape, self._device.core_stream, properties.multi_processor_count, depth)
            self._allocate(config, shape, weights, ops, longest, dtype)
            upload.wait(progress)
        plan = MemoryPlan(
            free=free,
            fraction=settings.memory_fraction,
            weights=loaded,
            workspace=torch.cuda.memory_allocated(device) - loaded,
            bytes_per_block=2 * config.num_layers * config.kv_size * dtype.itemsize * settings.block_size,
            block_size=settings.block_size,
        )
        num_blocks = plan.num_blocks(settings.num_blocks, settings.max_model_len or settings.block_size)
        self._attach_cache(config, num_blocks, dtype)
        windows = set(config.windows)
        window = windows.pop() if len(windows) == 1 else None
        splits = f"split={shape.few_split}/{shape.split}"
        return BackendInfo(
            name="cuda",
            numerics=f"cuda {architecture} {dtype} kernels={sources_digest()} {splits} torch={torch.__version__}",
            kv_dtype=str(dtype).removeprefix("torch."),
            vocab_size=config.vocab_size,
            max_model_len=min(longest, num_blocks * settings.block_size),
            max_rows=settings.max_rows,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            kv_groups=(KVGroup(0, settings.block_size, num_blocks, plan.bytes_per_block, window),),
        )

    def _allocate(
        self,
        config: ModelConfig,
        shape: KernelShape,
        weights: Weights,
        ops: KernelOps,
        longest: int,
        dtype: torch.dtype,
    ) -> None:
        settings, device = self._settings, self._device.torch
        self._ops = ops
        group = config.num_heads // config.num_kv_heads
        shares = settings.shared_prefix and ops.shares_prefixes and 0 in {window or 0 for window in config.windows}
        # One place more for each row: where the prompt's described positions wait for their next token.
        self._tokens_limit = max(settings.max_num_batched_tokens, settings.max_rows)
        space = allocate_workspace(
            config, shape, self._tokens_limit + settings.max_rows, settings.max_rows, longest, dtype, device,
            MOST_PARTS if shares else 0,
        )  # fmt: skip
        if settings.poison:
            _poison(space)
        self._decoder = CudaDecoder(config, shape, weights, ops, space, longest)
        self._rows = DeviceRows(ops, settings.max_rows, longest, settings.block_size, config.vocab_size, device)
        self._sampler = CudaSampler(ops, self._rows, settings.max_rows, config.vocab_size, device)
        self._prompts = PromptDescriber(self._rows, self._decoder, self._sampler, self._tokens_limit)
        prefixes = None
        if shares:
            prefixes = PrefixPlanner(
                self._rows, settings.max_rows, group, config.num_kv_heads, ops.prefill_tile_rows, space.prefix_slots, device
            )  # fmt: skip
        mixed = MixedShapes(settings.max_rows, self._tokens_limit, group, ops.prefill_tile_rows)
        columns = StepColumns(settings.max_rows, mixed.max_tiles, self._rows.block_table, device)
        self._launcher = StepLauncher(
            ops, self._decoder, self._rows, self._sampler, prefixes, columns, mixed, group, settings.max_rows,
            GraphCache(self._device.stream) if settings.graphs else None,
        )  # fmt: skip
        self._ring = ResultRing(_RESULT_SLOTS, settings.max_rows, columns.size)
        self._slot: Slot | None = None
        self._layout: StepLayout | None = None

    def _attach_cache(self, config: ModelConfig, num_blocks: int, dtype: torch.dtype) -> None:
        size = (config.num_layers, 2, num_blocks, config.num_kv_heads, self._settings.block_size, config.head_dim)
        cache = torch.empty(size, dtype=dtype, device=self._device.torch)
        if self._settings.poison:
            cache.fill_(float("nan"))
        self._decoder.attach_cache(cache)

    def warm_up(self) -> None:
        """Real steps in row 0 and block 0: a chunk, then a decode; graphs of all shapes where the settings ask for it.

        And the products of long steps, which are no graphs and which nobody should be the first to wait for.
        """
        none, row = np.zeros(0, np.int32), np.zeros(1, np.int32)
        tokens = np.zeros(min(2, self._settings.block_size - 1), np.int32)
        new = NewRow(0, tokens, len(tokens), 0, row, 0, SamplingParams(temperature=0.0))
        count = np.array([len(tokens)], np.int32)
        for step in (
            Step(0, none, (new,), none, none, none, none, none, row, count, row + 1),
            Step(1, none, (), none, none, none, none, none, row, row + 1, row + 1),
        ):
            self.begin(step)
            self.forward(step)
            self.sample(step)
            self.collect()
        with self._device.launching():
            self._decoder.load_products(_LONG_STEP, self._tokens_limit)
            if self._settings.capture_at_start:
                self._launcher.capture_all(self._ring)
        torch.cuda.synchronize(self._device.torch)
        self.reset()

    def reset(self) -> None:
        if self._slot is not None:
            self._ring.give_back(self._slot)
            self._slot = None
        self._layout = None
        self._rows.reset()
        self._prompts.reset()
        self._launcher.rows_changed()

    def begin(self, step: Step) -> None:
        with self._device.launching():
            if self._slot is None:
                self._slot = self._ring.take()
            self._slot.step_id = step.step_id
            self._slot.began.record(self._device.stream)
            changed = [*step.freed_rows.tolist(), *(new.row for new in step.new_rows)]
            if changed:
                self._prompts.forget(changed)
                self._launcher.rows_changed()
            self._rows.apply(step)

    def forward(self, step: Step) -> None:
        if not len(step.rows):
            return
        if self._slot is None:
            raise BackendError(f"step {step.step_id}: forward without begin")
        layout = self._lay_out(step)
        with self._device.launching():
            self._launcher.forward(step, layout, self._slot)
        self._rows.computed[step.rows] += step.num_scheduled

    def sample(self, step: Step, masks: Masks | None = None) -> None:
        slot = self._slot
        if slot is None:
            raise BackendError(f"step {step.step_id}: sample without begin")
        layout = self._lay_out(step)
        rows = layout.sample_rows
        slot.num_samples = len(rows)
        with self._device.launching():
            if self._rows.describing and len(step.rows):
                slot.described += self._prompts.describe(step)
            if masks is not None:
                self._rows.set_masks(rows[masks.places], masks.wait())  # the device runs the model meanwhile
            if len(rows):
                self._launcher.sample(rows)
                slot.described += self._prompts.describe_samples(rows, layout.sampling)
                self._rows.known[rows] += 1
            slot.ended.record(self._device.stream)
        self._slot = None
        self._ring.publish(slot)

    def collect(self) -> StepOutput:
        with self._device.collecting():
            return self._ring.collect()

    def close(self) -> None:
        if not hasattr(self, "_launcher"):
            return
        self._device.leave()
        for name in ("_launcher", "_decoder", "_rows", "_sampler", "_prompts", "_ring", "_ops"):
            delattr(self, name)
        gc.collect()
        torch.cuda.empty_cache()

    def _lay_out(self, step: Step) -> StepLayout:
        layout = self._layout
        if layout is None or not layout.holds_for(step):
            layout = self._layout = lay_out(step, self._launcher.columns.width)
            if len(step.rows) > self._settings.max_rows or layout.total > self._tokens_limit:
                self._layout = None
                raise BackendError(
                    f"step {step.step_id}: {len(step.rows)} rows and {layout.total} tokens are more than this worker takes"
                )
        return layout


def _kernel_shape(config: ModelConfig, dtype: torch.dtype, block_size: int) -> KernelShape:
    return KernelShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=block_size,
        qk_norm=config.qk_norm,
        float16=dtype == torch.float16,
    )


def _longest_context(config: ModelConfig) -> int:
    """Dynamic RoPE scaling is served within the trained context only (worker/model/rope.py)."""
    if config.rope.kind == "dynamic":
        return min(config.max_position_embeddings, config.rope.original_max_position)
    return config.max_position_embeddings


def _poison(space: Workspace) -> None:
    for name in ("hidden", "spare", "normed", "qkv", "attended", "projected", "gate_up", "activated"):
        getattr(space, name).fill_(float("nan"))
    space.parts.fill_(float("nan"))
    space.scratch.partials.fill_(float("nan"))
