// residual[r, :] += x[r, :] + bias      (rms_norm_add; x is the output of the projection before, bias may be null;
//                                        rms_norm_add_parts: x is still in parts, gemm_wgmma.cu)
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
#include "norm.cuh"

// add(old, at, column): the residual's vector `at` with what is added to it.
template <typename Add>
__device__ __forceinline__ void norm(Add add, bool adds, uint4* residual, const uint4* weight, const int* rows, uint4* out, float epsilon) {
  uint4 scale[PER_THREAD], sum[PER_THREAD];
  let_next_start();
  load_scale(scale, weight);
  wait_for_previous();
  if (rows && rows[blockIdx.x] < 0) return;  // padding of a graph
  size_t row = rows ? rows[blockIdx.x] : blockIdx.x;
  float squares[1] = {0};
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    int at = threadIdx.x + i * THREADS;
    if (at >= VECTORS) continue;
    sum[i] = add(residual[row * VECTORS + at], row * VECTORS + at, at);
    if (adds) residual[row * VECTORS + at] = sum[i];
    squares[0] = add_squares(squares[0], sum[i]);
  }
  block_sums(squares);
  float inverse = rsqrtf(squares[0] / HIDDEN + epsilon);
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    int at = threadIdx.x + i * THREADS;
    if (at < VECTORS) out[(size_t)blockIdx.x * VECTORS + at] = scale_vector(sum[i], inverse, scale[i]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm(uint4* residual, const uint4* __restrict__ weight, uint4* __restrict__ out, float epsilon) {
  norm([](uint4 old, size_t, int) { return old; }, false, residual, weight, nullptr, out, epsilon);
}

// With `rows`, only the gathered rows are added: for the last layer, whose residual nobody reads afterwards. No row may stand twice.
extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm_add(const uint4* x, uint4* residual, const uint4* __restrict__ bias, const uint4* __restrict__ weight,
             const int* __restrict__ rows, uint4* __restrict__ out, float epsilon) {
  norm([&](uint4 old, size_t at, int column) { return add_vector(old, x[at], bias, column); }, true, residual, weight, rows, out, epsilon);
}

// parts [splits, gridDim.x, HIDDEN]
extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm_add_parts(const float4* parts, int splits, uint4* residual, const uint4* __restrict__ bias, const uint4* __restrict__ weight,
                   uint4* __restrict__ out, float epsilon) {
  size_t stride = (size_t)gridDim.x * HIDDEN / 4;
  norm([&](uint4 old, size_t at, int column) { return add_vector(old, sum_of_parts(parts, at, splits, stride), bias, column); }, true,
       residual, weight, nullptr, out, epsilon);
}
