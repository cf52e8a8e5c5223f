// out[t, :] = table[token_ids[t], :]                                   table [vocab, HIDDEN], token_ids int32 [tokens]
//
// Bound by bytes: each row is read once and written once.
// Ladder
//   1. one thread an element: 2-byte loads, a quarter of the bandwidth
//   2. one block a token, 16-byte vectors (this one); a step has too few tokens for more to matter
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(128)
embedding(const uint4* __restrict__ table, const int* __restrict__ token_ids, uint4* __restrict__ out) {
  constexpr int VECTORS = HIDDEN / 8;
  let_next_start();
  wait_for_previous();
  // Padding rows of a graph carry -1: they compute on token 0, and nobody reads what they make.
  size_t token = max(token_ids[blockIdx.x], 0);
  for (int i = threadIdx.x; i < VECTORS; i += 128) out[(size_t)blockIdx.x * VECTORS + i] = table[token * VECTORS + i];
}
