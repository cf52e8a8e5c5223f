// residual[r, :] += x[r, :] + bias      (rms_norm_add; x is the output of the projection before, bias may be null)
// out[t, :] = residual[r, :] / rms(residual[r, :]) * weight            r = rows ? rows[t] : t
//
// All [tokens, HIDDEN]; the sum of squares is float32; the residual is rounded before it is normalised, as a model that stores it
// between two operations would. `rows` gathers: only the last token of each sampling row needs the final norm.
//
// Bound by bytes: x and residual read, residual and out written, 8 bytes an element against 12 unfused.
// Ladder
//   1. add, then square and sum, then scale: three kernels, the residual crosses memory three times
//   2. one block a row, the row read twice
//   3. the row stays in registers between the sum and the scaling (this one): every byte moves once
#include "common.cuh"

#define THREADS 128
constexpr int VECTORS = HIDDEN / 8;
constexpr int PER_THREAD = (VECTORS + THREADS - 1) / THREADS;

__device__ __forceinline__ float block_sum(float x) {
  __shared__ float parts[THREADS / 32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < THREADS / 32; i++) sum += parts[i];
  return sum;
}

template <bool ADD>
__device__ __forceinline__ void norm(const uint4* x, uint4* residual, const uint4* bias, const uint4* weight, const int* rows,
                                     uint4* out, float epsilon) {
  uint4 scale[PER_THREAD];
  let_next_start();
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    int at = threadIdx.x + i * THREADS;
    if (at < VECTORS) scale[i] = weight[at];
  }
  wait_for_previous();
  if (rows && rows[blockIdx.x] < 0) return;  // padding of a graph
  size_t row = rows ? rows[blockIdx.x] : blockIdx.x;
  float value[PER_THREAD][8];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    int at = threadIdx.x + i * THREADS;
    if (at >= VECTORS) continue;
    uint4 sum = residual[row * VECTORS + at];
    unpack8(sum, value[i]);
    if (ADD) {
      float added[8];
      uint4 product = x[row * VECTORS + at];
      unpack8(product, added);
      if (bias) {
        float shift[8];
        unpack8(bias[at], shift);
#pragma unroll
        for (int j = 0; j < 8; j++) added[j] = to_float(to_elem(added[j] + shift[j]));
      }
#pragma unroll
      for (int j = 0; j < 8; j++) value[i][j] += added[j];
      sum = pack8(value[i]);
      unpack8(sum, value[i]);
      residual[row * VECTORS + at] = sum;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) squares = fmaf(value[i][j], value[i][j], squares);
  }
  float inverse = rsqrtf(block_sum(squares) / HIDDEN + epsilon);
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    int at = threadIdx.x + i * THREADS;
    if (at >= VECTORS) continue;
    float w[8];
    unpack8(scale[i], w);
#pragma unroll
    for (int j = 0; j < 8; j++) value[i][j] = to_float(to_elem(value[i][j] * inverse)) * w[j];
    out[(size_t)blockIdx.x * VECTORS + at] = pack8(value[i]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm(uint4* residual, const uint4* __restrict__ weight, uint4* __restrict__ out, float epsilon) {
  norm<false>(nullptr, residual, nullptr, weight, nullptr, out, epsilon);
}

// With `rows`, only the gathered rows are added: for the last layer, whose residual nobody reads afterwards. No row may stand twice.
extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm_add(const uint4* __restrict__ x, uint4* residual, const uint4* __restrict__ bias, const uint4* __restrict__ weight,
             const int* __restrict__ rows, uint4* __restrict__ out, float epsilon) {
  norm<true>(x, residual, bias, weight, rows, out, epsilon);
}
