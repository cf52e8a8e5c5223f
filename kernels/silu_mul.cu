// out[t, i] = silu(x[t, i] + bias[i]) * (x[t, WIDE + i] + bias[WIDE + i])         x [tokens, 2 * WIDE], out [tokens, WIDE]
//
// Bound by bytes: two elements read, one written. The matrix-vector kernel has this as its epilogue; here it follows cuBLAS.
// Ladder
//   1. slice, sigmoid, multiply, multiply: four kernels, 14 bytes an output element
//   2. one kernel, 16-byte vectors, both halves loaded before either is used (this one): 6 bytes
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
silu_mul(const uint4* __restrict__ x, const uint4* __restrict__ bias, uint4* __restrict__ out, int tokens) {
  constexpr int VECTORS = WIDE / 8;
  let_next_start();
  wait_for_previous();
  long long at = (long long)blockIdx.x * 256 + threadIdx.x;
  if (at >= (long long)tokens * VECTORS) return;
  long long token = at / VECTORS;
  int column = int(at % VECTORS);
  uint4 gate_vector = x[token * 2 * VECTORS + column], up_vector = x[token * 2 * VECTORS + VECTORS + column];
  float gate[8], up[8];
  unpack8(gate_vector, gate);
  unpack8(up_vector, up);
  if (bias) {
    float gate_bias[8], up_bias[8];
    unpack8(bias[column], gate_bias);
    unpack8(bias[VECTORS + column], up_bias);
#pragma unroll
    for (int j = 0; j < 8; j++) gate[j] = to_float(to_elem(gate[j] + gate_bias[j])), up[j] = to_float(to_elem(up[j] + up_bias[j]));
  }
#pragma unroll
  for (int j = 0; j < 8; j++) gate[j] = to_float(to_elem(gate[j] / (1.0f + __expf(-gate[j])))) * up[j];
  out[at] = pack8(gate);
}
