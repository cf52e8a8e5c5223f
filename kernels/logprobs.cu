// Log-probabilities of raw logits: for each described position the token that stands there, its rank, and the best `wanted` tokens.
//
// jobs int4 (logits row, permanent row, position, wanted): the token is read from the row, where a sampled one stands already.
// ids int32, values float32 [positions, WANTED + 1]; ranks int32 [positions]. Ties rank by the lower token first among the best.
//
// Bound by bytes: 4 a logit for each of wanted + 2 passes, from L2: one block reads its row of 0.5 MB about 20 times in 0.1 ms.
// Ladder
//   1. log_softmax of the whole vocabulary, sort, gather: a float32 row written and a sort
//   2. the sum once, then the best, the best below it, and so on (this one): nothing is written but the answer
#include "row_state.cuh"

#define THREADS 512

struct Entry {
  float value;
  int token;
};
__device__ __forceinline__ bool before(Entry a, Entry b) { return a.value > b.value || (a.value == b.value && a.token < b.token); }

__device__ __forceinline__ Entry block_first(Entry e, Entry* shared) {
#pragma unroll
  for (int d = 16; d; d >>= 1) {
    Entry other{__shfl_xor_sync(~0u, e.value, d), __shfl_xor_sync(~0u, e.token, d)};
    if (before(other, e)) e = other;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = e;
  __syncthreads();
  e = shared[0];
  for (int w = 1; w < THREADS / 32; w++)
    if (before(shared[w], e)) e = shared[w];
  return e;
}

extern "C" __global__ void __launch_bounds__(THREADS)
logprobs(const float* __restrict__ logits, int stride, int vocab, const int4* __restrict__ jobs, const int* __restrict__ tokens,
         int max_len, int* __restrict__ ids, float* __restrict__ values, int* __restrict__ ranks) {
  __shared__ Entry shared[THREADS / 32];
  __shared__ float sums[THREADS / 32];
  __shared__ int higher;
  let_next_start();
  wait_for_previous();
  int4 job = jobs[blockIdx.x];
  const float* x = logits + (size_t)job.x * stride;
  int token = tokens[(size_t)job.y * max_len + job.z];
  float mine = x[token];
  if (threadIdx.x == 0) higher = 0;
  auto first_after = [&](Entry last) {
    Entry best{-INF, 0x7fffffff};
    for (int v = threadIdx.x; v < vocab; v += THREADS) {
      Entry e{x[v], v};
      if (before(last, e) && before(e, best)) best = e;
    }
    return block_first(best, shared);
  };
  Entry best = first_after(Entry{INF, -1});
  float sum = 0;
  int above = 0;
  for (int v = threadIdx.x; v < vocab; v += THREADS) {
    sum += expf(x[v] - best.value);
    above += x[v] > mine;
  }
  sum = warp_sum(sum);
  above = __reduce_add_sync(~0u, above);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum, atomicAdd(&higher, above);
  __syncthreads();
  float total = 0;
  for (int w = 0; w < THREADS / 32; w++) total += sums[w];
  float log_total = best.value + logf(total);
  size_t out = (size_t)blockIdx.x * (WANTED + 1);
  if (threadIdx.x == 0) ids[out] = token, values[out] = mine - log_total, ranks[blockIdx.x] = higher + 1;
  for (int i = 1; i <= job.w; i++) {
    if (threadIdx.x == 0) ids[out + i] = best.token, values[out + i] = best.value - log_total;
    if (i < job.w) best = first_after(best);
  }
}
