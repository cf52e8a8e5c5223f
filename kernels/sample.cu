// One token for each sampling row.
//   choose   greedy rows, and rows with a temperature but no truncation (those: truncated_sample.cu)
//   commit   the chosen token becomes the row's next known token
//
// logits, processed float32 [rows, stride] (processed where the row's flags say PROCESS); sample_rows int32 [rows], -1 for padding.
// A draw from softmax(x / T) is argmax(x / T + Gumbel noise) (Gumbel-max), so drawing costs no more than an argmax and needs no sum;
// the noise is a function of (seed, output index, token), so a token does not depend on row, batch or worker.
//
// Bound by bytes: 4 a logit, once, and by the noise's logarithms where there is a temperature.
// Ladder
//   1. softmax, cumulative sum, draw: three passes
//   2. Gumbel-max: one pass, one block a row; one row alone keeps one multiprocessor busy and 131 idle
//   3. PARTS blocks a row, the last one to finish merges (this one)
#include "choice.cuh"

// The best of tokens [begin, end), begin a multiple of 4; raw says what was seen (process_logits.cu).
template <bool DRAWS>
__device__ __forceinline__ Best best_of(const float* x, int begin, int end, const RowFields& f, u32& raw) {
  Best best = {-INF, NOTHING.token};
  float inverse = DRAWS ? 1.0f / f.temperature : 1.0f, bound = NOTHING.value;
  auto load = [&](int v) { return v < end ? *reinterpret_cast<const float4*>(x + v) : make_float4(-INF, -INF, -INF, -INF); };
  int lane = threadIdx.x % 32 * 4, first = begin + threadIdx.x / 32 * 128;
  float4 next = load(first + lane);
  // All lanes of a warp go round equally often: they tell one another what they have reached.
  for (; first < end; first += 256 * 4) {
    int v = first + lane;
    float values[4] = {next.x, next.y, next.z, next.w};
    next = load(v + 256 * 4);
    // NaN unless all four are finite.
    float check = fmaf(values[0], 0.0f, fmaf(values[1], 0.0f, fmaf(values[2], 0.0f, values[3] * 0.0f)));
    if (check == 0 && v + 3 < end) {
      raw |= 2;
    } else {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        bool inside = v + j < end;
        if (inside) raw |= values[j] != values[j] || values[j] == INF ? 1 : values[j] > -INF ? 2 : 0;
        if (!inside || !(values[j] > -INF)) values[j] = -INF;
      }
    }
    if constexpr (DRAWS) {
      compete(best, bound, values, v, f, inverse);
    } else {
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (values[j] > best.value) best = Best{values[j], v + j};  // tokens come in their order
    }
  }
  return best;
}

// grid (rows, parts), at most PARTS. partial [rows, PARTS] of Best; raw_state and arrived [rows] are zero before and after.
extern "C" __global__ void __launch_bounds__(256)
choose(const float* __restrict__ logits, const float* __restrict__ processed, int stride, int vocab,
       const int* __restrict__ sample_rows, const int* __restrict__ fields, Best* partial, u32* raw_state, int* arrived,
       int* __restrict__ chosen, int* __restrict__ status) {
  __shared__ Best warps[8];
  let_next_start();
  wait_for_previous();
  int s = blockIdx.x, row = sample_rows[s];
  if (row < 0) return;
  const RowFields& f = fields_of(fields, row);
  if (f.flags & TRUNCATE) return;
  bool changed = f.flags & PROCESS;
  int parts = gridDim.y, part = ((vocab + parts - 1) / parts + 3) / 4 * 4, begin = blockIdx.y * part, end = min(vocab, begin + part);
  u32 raw = 0;
  const float* x = (changed ? processed : logits) + (size_t)s * stride;
  Best best = f.temperature > 0 ? best_of<true>(x, begin, end, f, raw) : best_of<false>(x, begin, end, f, raw);
  best = warp_best(best);
  raw = __reduce_or_sync(~0u, raw);
  if (threadIdx.x % 32 == 0) {
    warps[threadIdx.x / 32] = best;
    if (!changed && raw) atomicOr(raw_state + s, raw);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < 8; w++) best = better(best, warps[w]);
  partial[s * PARTS + blockIdx.y] = best;
  __threadfence();
  if (atomicAdd(arrived + s, 1) != parts - 1) return;
  __threadfence();
  for (int i = 0; i < parts; i++) {
    const volatile Best& other = partial[s * PARTS + i];
    best = better(best, Best{other.value, other.token});
  }
  decide(best, atomicExch(raw_state + s, 0), chosen + s, status + s);
  arrived[s] = 0;
}

// result[s] and result[max_rows + s]: token and status; the same at the address that host[0] and host[1] hold, low half first, of the
// host's pinned memory.
extern "C" __global__ void __launch_bounds__(128)
commit(const int* __restrict__ chosen, const int* __restrict__ status, const int* __restrict__ sample_rows, int rows,
       const int* __restrict__ fields, int* __restrict__ tokens, int max_len, u32* __restrict__ counts, int vocab,
       int* __restrict__ result, int max_rows, const u32* __restrict__ host) {
  let_next_start();
  wait_for_previous();
  int s = blockIdx.x * 128 + threadIdx.x;
  if (s >= rows || sample_rows[s] < 0) return;
  int row = sample_rows[s], token = chosen[s];
  const RowFields& f = fields_of(fields, row);
  if (f.num_computed < max_len) tokens[(size_t)row * max_len + f.num_computed] = token;
  if (f.flags & PENALTIES) counts[(size_t)row * vocab + token] += 1;
  result[s] = token;
  result[max_rows + s] = status[s];
  if (!host) return;
  int* there = reinterpret_cast<int*>((u64)host[1] << 32 | host[0]);
  there[s] = token;
  there[max_rows + s] = status[s];
}
