// RMS norm of rows by a whole block, the same bits wherever it runs: in rms_norm.cu, one row a block, and in front of a product
// (matvec_fused.cu), where every block normalises all rows for itself.
//
// A thread holds the vectors threadIdx.x + i * THREADS of a row; squares are summed along a thread, over its warp, over the warps. So
// the bits depend on THREADS, which is the same number everywhere for one HIDDEN.
#pragma once
#include "common.cuh"

constexpr int VECTORS = HIDDEN / 8;
constexpr int PER_THREAD = (VECTORS + THREADS - 1) / THREADS;

// Sums over the block, of ROWS numbers at once.
template <int ROWS>
__device__ __forceinline__ void block_sums(float (&x)[ROWS]) {
  __shared__ float parts[ROWS][THREADS / 32];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    x[r] = warp_sum(x[r]);
    if (threadIdx.x % 32 == 0) parts[r][threadIdx.x / 32] = x[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    x[r] = 0;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) x[r] += parts[r][i];
  }
}

// The vector of the norm's weight that belongs to each of a thread's vectors. May be loaded before the wait.
__device__ __forceinline__ void load_scale(uint4 (&scale)[PER_THREAD], const uint4* weight) {
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    int at = threadIdx.x + i * THREADS;
    if (at < VECTORS) scale[i] = weight[at];
  }
}

// residual + x + bias, rounded, for one vector x.
__device__ __forceinline__ uint4 add_vector(uint4 residual, uint4 x, const uint4* bias, int column) {
  float value[8], added[8];
  unpack8(residual, value);
  unpack8(x, added);
  if (bias) {
    float shift[8];
    unpack8(bias[column], shift);
#pragma unroll
    for (int j = 0; j < 8; j++) added[j] = to_float(to_elem(added[j] + shift[j]));
  }
#pragma unroll
  for (int j = 0; j < 8; j++) value[j] += added[j];
  return pack8(value);
}

__device__ __forceinline__ float add_squares(float squares, uint4 vector) {
  float value[8];
  unpack8(vector, value);
#pragma unroll
  for (int j = 0; j < 8; j++) squares = fmaf(value[j], value[j], squares);
  return squares;
}

__device__ __forceinline__ uint4 scale_vector(uint4 vector, float inverse, uint4 scale) {
  float value[8], w[8];
  unpack8(vector, value);
  unpack8(scale, w);
#pragma unroll
  for (int j = 0; j < 8; j++) value[j] = to_float(to_elem(value[j] * inverse)) * w[j];
  return pack8(value);
}
