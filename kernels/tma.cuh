// The tensor memory accelerator of sm_90: one thread asks for a tile of a tensor, whose bytes a barrier counts.
// tests/emulator/cuda/tma.cuh has the same functions in plain C++.
#pragma once
#include "wgmma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A CUtensorMap, an argument by value: `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
  u64 words[16];
};

// One arrival, and so many bytes that must come before the barrier's phase ends.
__device__ __forceinline__ void barrier_expect(u64* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// The tile at (column, row) of a matrix.
__device__ __forceinline__ void load_tile(void* to, const TensorMap& map, u64* barrier, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
               "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row)
               : "memory");
}
// The tile at (column, 0, 0, group) of a tensor of four dimensions.
__device__ __forceinline__ void load_tile_4d(void* to, const TensorMap& map, u64* barrier, int column, int group) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %4, %5}], [%2];" ::"r"(
                   shared_address(to)),
               "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(0), "r"(group)
               : "memory");
}

#endif
