// One token for each sampling row.
//   choose            greedy rows, and rows with a temperature but no truncation: one pass over the vocabulary
//   choose_truncated  rows with top_k, top_p or min_p: thresholds by search, no sort
//   commit            the chosen token becomes the row's next known token
//
// logits, processed float32 [rows, stride] (processed where the row's flags say PROCESS); sample_rows int32 [rows], -1 for padding.
// A draw from softmax(x / T) is argmax(x / T + Gumbel noise) (Gumbel-max), so drawing costs no more than an argmax and needs no sum;
// the noise is a function of (seed, output index, token), so a token does not depend on row, batch or worker.
//
// Bound by bytes: 4 a logit, once, and by the noise's logarithms where there is a temperature.
// Ladder
//   1. softmax, sort, cumulative sum, draw: five passes and a sort of 128k entries a row
//   2. threshold instead of sort: top_k and top_p ask for "the smallest x such that the count (the mass) of all at or above it
//      reaches k (p)"; a search over the 32 bits of x finds it, 4 bits a pass, 15 pivots at once. Counts and masses are integers,
//      so their sums do not depend on any order
//   3. no truncation, no threshold: Gumbel-max in one pass, PARTS blocks a row, the last one to finish merges (this one)
#include "philox.cuh"
#include "row_state.cuh"

constexpr int NAN_STATUS = 1, EMPTY_STATUS = 2;

struct Best {
  float value;
  int token;
};
// The better of two: the higher value, the lower token where they tie. NaN never wins.
__device__ __forceinline__ Best better(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.token < a.token) ? b : a; }
__device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
  for (int d = 16; d; d >>= 1)
    best = better(best, Best{__shfl_xor_sync(~0u, best.value, d), __shfl_xor_sync(~0u, best.token, d)});
  return best;
}
constexpr Best NOTHING = {-3.402823466e38f, 0x7fffffff};

__device__ __forceinline__ uint4 noise_of(const RowFields& f, int group) {
  return philox((u32)group, (u32)(f.num_computed - f.num_prompt), 0, 0, f.seed_low, f.seed_high);
}

// The best of tokens [begin, end), begin a multiple of 4, by x / T + noise over x >= least; raw says what was seen (process_logits.cu).
template <int THREADS>
__device__ __forceinline__ Best best_of(const float* x, int begin, int end, const RowFields& f, float least, u32& raw) {
  Best best = NOTHING;
  float inverse = f.temperature > 0 ? 1.0f / f.temperature : 1.0f;
  for (int v = begin + threadIdx.x * 4; v < end; v += THREADS * 4) {
    float4 four = *reinterpret_cast<const float4*>(x + v);
    float values[4] = {four.x, four.y, four.z, four.w};
    bool any = false;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      bool inside = v + j < end;
      if (inside) raw |= values[j] != values[j] || values[j] == INF ? 1 : values[j] > -INF ? 2 : 0;
      if (!inside || !(values[j] >= least)) values[j] = -INF;
      any |= values[j] > -INF;
    }
    if (!any) continue;
    if (f.temperature > 0) {
      uint4 words = noise_of(f, v / 4);
      values[0] = fmaf(values[0], inverse, gumbel(words.x));
      values[1] = fmaf(values[1], inverse, gumbel(words.y));
      values[2] = fmaf(values[2], inverse, gumbel(words.z));
      values[3] = fmaf(values[3], inverse, gumbel(words.w));
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (values[j] > -INF) best = better(best, Best{values[j], v + j});
  }
  return best;
}

__device__ __forceinline__ void decide(Best best, u32 raw, int* chosen, int* status) {
  bool broken = raw & 1 || !(raw & 2), empty = best.token == NOTHING.token;
  *status = broken ? NAN_STATUS : empty ? EMPTY_STATUS : 0;
  *chosen = broken || empty ? 0 : best.token;
}

// grid (rows, PARTS). partial [rows, PARTS] of Best; raw_state and arrived [rows] are zero before and after.
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
  int part = ((vocab + PARTS - 1) / PARTS + 3) / 4 * 4, begin = blockIdx.y * part;
  u32 raw = 0;
  Best best = best_of<256>((changed ? processed : logits) + (size_t)s * stride, begin, min(vocab, begin + part), f, -INF, raw);
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
  if (atomicAdd(arrived + s, 1) != PARTS - 1) return;
  __threadfence();
  for (int i = 0; i < PARTS; i++) {
    const volatile Best& other = partial[s * PARTS + i];
    best = better(best, Best{other.value, other.token});
  }
  decide(best, atomicExch(raw_state + s, 0), chosen + s, status + s);
  arrived[s] = 0;
}

// Ascending with x, without gaps between negative and positive.
__device__ __forceinline__ u32 ordered(float x) {
  u32 bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(u32 key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

constexpr int WIDE = 1024;  // threads of a truncating block
constexpr int PIVOTS = 15;

// Sums of PIVOTS integers over the block; every thread gets all of them.
__device__ __forceinline__ void block_sums(u64 (&sums)[PIVOTS], u64 (*shared)[PIVOTS]) {
#pragma unroll
  for (int i = 0; i < PIVOTS; i++)
#pragma unroll
    for (int d = 16; d; d >>= 1) sums[i] += __shfl_xor_sync(~0u, sums[i], d);
  __syncthreads();
  if (threadIdx.x % 32 == 0)
    for (int i = 0; i < PIVOTS; i++) shared[threadIdx.x / 32][i] = sums[i];
  __syncthreads();
  for (int i = 0; i < PIVOTS; i++) {
    u64 sum = 0;
    for (int w = 0; w < WIDE / 32; w++) sum += shared[w][i];
    sums[i] = sum;
  }
}

// The largest x such that measure(all tokens >= x) >= target. `floor_key` must satisfy that.
template <typename Measure>
__device__ __forceinline__ u32 search(const float* x, int vocab, u32 floor_key, u64 target, u64 (*shared)[PIVOTS], Measure measure) {
  u32 low = 0;  // the answer's known leading digits
  for (int shift = 28; shift >= 0; shift -= 4) {
    u64 sums[PIVOTS] = {};
    for (int v = threadIdx.x; v < vocab; v += WIDE) {
      u32 key = ordered(x[v]);
      if (key < low || key < floor_key) continue;
      u64 weight = measure(x[v]);
      u32 digit = (key - low) >> shift;  // keys above the current range count for every pivot
#pragma unroll
      for (int i = 0; i < PIVOTS; i++) sums[i] += digit > i ? weight : 0;
    }
    block_sums(sums, shared);
    u32 digit = 0;
#pragma unroll
    for (int i = 0; i < PIVOTS; i++) digit += sums[i] >= target;
    low += digit << shift;
  }
  return max(low, floor_key);
}

extern "C" __global__ void __launch_bounds__(WIDE)
choose_truncated(const float* __restrict__ logits, const float* __restrict__ processed, int stride, int vocab,
                 const int* __restrict__ sample_rows, const int* __restrict__ fields, u32* raw_state, int* __restrict__ chosen,
                 int* __restrict__ status) {
  __shared__ u64 shared[WIDE / 32][PIVOTS];
  __shared__ Best warps[WIDE / 32];
  __shared__ u32 raw_seen;
  let_next_start();
  wait_for_previous();
  int s = blockIdx.x, row = sample_rows[s];
  if (row < 0) return;
  const RowFields& f = fields_of(fields, row);
  if (!(f.flags & TRUNCATE)) return;
  bool changed = f.flags & PROCESS;
  const float* x = (changed ? processed : logits) + (size_t)s * stride;
  if (threadIdx.x == 0) raw_seen = changed ? raw_state[s] : 0;
  float best = -INF;
  u32 raw = 0;
  for (int v = threadIdx.x; v < vocab; v += WIDE) {
    float value = x[v];
    raw |= value != value || value == INF ? 1 : value > -INF ? 2 : 0;
    best = fmaxf(best, value);
  }
  best = warp_best(Best{best, 0}).value;
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32].value = best;
  raw = __reduce_or_sync(~0u, raw);
  if (!changed && threadIdx.x % 32 == 0) atomicOr(&raw_seen, raw);
  __syncthreads();
  for (int w = 0; w < WIDE / 32; w++) best = fmaxf(best, warps[w].value);
  if (raw_seen & 1 || best == -INF) {
    if (threadIdx.x == 0) decide(NOTHING, raw_seen, chosen + s, status + s), raw_state[s] = 0;
    return;
  }
  // Nothing below the least finite number is ever kept: -inf is a forbidden token.
  u32 least = ordered(-3.402823466e38f);
  if (f.min_p > 0) least = max(least, ordered(best + logf(f.min_p) * f.temperature));
  if (f.top_k > 0 && f.top_k < vocab) {
    u32 first = ordered(-3.402823466e38f);
    least = max(least, search(x, vocab, first, (u64)f.top_k, shared, [](float) { return 1ull; }));
  }
  if (f.top_p < 1) {
    float inverse = LOG2_E / f.temperature;
    auto mass = [&](float value) { return (u64)(exp2f((value - best) * inverse) * 1099511627776.0f); };  // in units of 2^-40
    u64 sums[PIVOTS] = {};
    for (int v = threadIdx.x; v < vocab; v += WIDE)
      if (ordered(x[v]) >= least) sums[0] += mass(x[v]);
    block_sums(sums, shared);
    u64 target = max(1ull, (u64)((double)sums[0] * (double)f.top_p));
    least = search(x, vocab, least, target, shared, mass);
  }
  u32 ignored = 0;
  Best winner = warp_best(best_of<WIDE>(x, 0, vocab, f, from_ordered(least), ignored));
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = winner;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < WIDE / 32; w++) winner = better(winner, warps[w]);
  decide(winner, raw_seen, chosen + s, status + s);
  raw_state[s] = 0;
}

// result[s] and result[max_rows + s]: token and status, for the copy to the host.
extern "C" __global__ void __launch_bounds__(128)
commit(const int* __restrict__ chosen, const int* __restrict__ status, const int* __restrict__ sample_rows, int rows,
       const int* __restrict__ fields, int* __restrict__ tokens, int max_len, u32* __restrict__ counts, int vocab,
       int* __restrict__ result, int max_rows) {
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
}
