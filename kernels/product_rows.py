"""Which products take which kernel on sm_90a, by their rows, as measured: ours (matvec.cu, gemm_wgmma.cu) or cuBLAS.

cuBLAS chooses its kernel by the number of rows, and not always well: Llama-3.1-8B's QKV takes 25.5 us for 224 rows and 21.4 for 256.
Where more rows than there are take less time it is asked for those; what they hold does not matter, since no row's result depends on
another. `python -m bench.gpu_products MODEL` measures it all and prints the table; here is what two runs agree on, on two H200 with
torch 2.11.0+cu130 (bench/results/products-llama-*-h200.json is the first).
"""

from __future__ import annotations

MATVEC_ROWS = 16
"""Products with at most so many rows take the matrix-vector kernel."""

PARTS_ROWS = 64
"""QKV, O, DOWN and the head with more rows than that and at most so many take gemm_wgmma.cu, where it was measured ahead of cuBLAS.
The sums of the first three are left in parts."""

GEMM_ROWS = 128
"""Products with more rows never take gemm_wgmma.cu."""

GEMM_SHAPES = {(2048, 3072, 2048, 8192): GEMM_ROWS, (4096, 6144, 4096, 14336): PARTS_ROWS}
"""(hidden, qkv, q, intermediate) whose steps were measured ahead with gemm_wgmma.cu on sm_90a, and up to how many rows GATE_UP takes
it: Llama-3.2-1B and Llama-3.1-8B, whose GATE_UP alone takes 2 to 8 % longer than by cuBLAS and silu_mul. Any other shape stays with
cuBLAS until it is measured."""

_CUBLAS_ROWS: dict[tuple[int, int], dict[int, int]] = {
    (3072, 2048): {240: 256, 320: 336, 448: 496},  # Llama-3.2-1B, QKV
    (2048, 2048): {208: 256, 448: 480},  # Llama-3.2-1B, O
    (2048, 8192): {176: 216, 192: 216, 208: 216, 224: 240, 320: 336},  # Llama-3.2-1B, DOWN
    (128256, 2048): {80: 88},  # Llama-3.2-1B, HEAD
    (6144, 4096): {176: 200, 224: 256, 240: 256, 320: 368},  # Llama-3.1-8B, QKV
    (4096, 4096): {96: 104, 112: 128, 160: 168, 176: 184, 224: 256},  # Llama-3.1-8B, O
    (28672, 4096): {448: 496},  # Llama-3.1-8B, GATE_UP
    (4096, 14336): {176: 184, 192: 200, 208: 216, 224: 232, 240: 248},  # Llama-3.1-8B, DOWN
    (128256, 4096): {80: 88},  # Llama-3.1-8B, HEAD
}
"""By (n, k) of a product: for a number of rows that workers pad steps to, a larger one that cuBLAS takes less time for."""


def cublas_rows(n: int, k: int, rows: int) -> int:
    """How many rows cuBLAS is best asked for, at least `rows`, in a product with a weight of n x k."""
    return _CUBLAS_ROWS.get((n, k), {}).get(rows, rows)
