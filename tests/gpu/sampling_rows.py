"""Rows and a sampler on a device, for the tests of sampling."""

from __future__ import annotations

import numpy as np
import torch

from kernels.ops import KernelOps
from tests.gpu.gpu_harness import make_ops, make_shape
from worker.backends.cuda_rows import DeviceRows
from worker.backends.cuda_sampler import CudaSampler
from worker.step import NewRow, SamplingParams, Step

NONE = np.zeros(0, np.int32)
LENGTH = 256

PARAMS = {
    "greedy": SamplingParams(temperature=0),
    "plain": SamplingParams(temperature=1.0),
    "cold": SamplingParams(temperature=0.3),
    "top_k": SamplingParams(temperature=0.8, top_k=7),
    "top_k 1": SamplingParams(temperature=0.8, top_k=1),
    "top_p": SamplingParams(temperature=1.2, top_p=0.8),
    "top_p small": SamplingParams(temperature=1.0, top_p=0.01),
    "min_p": SamplingParams(temperature=1.0, min_p=0.1),
    "all": SamplingParams(temperature=0.9, top_k=50, top_p=0.9, min_p=0.01),
    "penalties": SamplingParams(temperature=0.7, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3),
    "greedy penalties": SamplingParams(temperature=0, repetition_penalty=1.7, frequency_penalty=1.0),
    "bias": SamplingParams(temperature=0, logit_bias={3: 50.0, 999: 49.0, 5: -100.0}),
    "one bias": SamplingParams(temperature=0, logit_bias={999: 50.0}),
    "allowed": SamplingParams(temperature=1.0, allowed_token_ids=(1, 40, 41, 700, 999)),
    "min_tokens": SamplingParams(temperature=0, min_tokens=100, stop_token_ids=tuple(range(0, 1000, 2))),
    "bad words": SamplingParams(
        temperature=0, bad_words=((17,), (9, 8, 7), (4, 5)), logit_bias={7: 60.0, 17: 61.0, 5: 59.0}
    ),
    "empty": SamplingParams(temperature=0, allowed_token_ids=(4,), bad_words=((4,),)),
}


def new_step(new: list[NewRow]) -> Step:
    return Step(0, NONE, tuple(new), NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE)


Sampling = tuple[KernelOps, DeviceRows, CudaSampler]


def make_rows(vocab: int, max_rows: int, ops: KernelOps | None = None, device: str = "cuda") -> Sampling:
    """Rows and a sampler of the given operations, or of a GPU's."""
    ops = make_ops(make_shape()) if ops is None else ops
    rows = DeviceRows(ops, max_rows, LENGTH, 16, vocab, torch.device(device))
    return ops, rows, CudaSampler(ops, rows, max_rows, vocab, torch.device(device))
