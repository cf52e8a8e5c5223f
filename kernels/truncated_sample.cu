// One token for each sampling row with top_k, top_p or min_p. grid (rows); shapes as in sample.cu.
//
// top_k and top_p ask for a threshold: the largest x such that the count (the mass) of all tokens at or above it reaches k (p).
// Counts and masses are integers, masses in units of 2^-40 of the best token's, so their sums do not depend on any order.
//
// Bound by bytes: 4 a logit and pass.
// Ladder
//   1. sort, cumulative sum, draw: a sort of 128k entries a row, some twenty passes
//   2. a search over the 32 bits of x, 4 bits a pass, 15 pivots at once: eight passes for each of top_k and top_p
//   3. a histogram of BINS equal steps of x finds the bin that holds the threshold; the tokens of that bin, a few hundred even where
//      the distribution is flat, are listed in shared memory and searched there; so are all tokens above it where they are few, as
//      in any real distribution, and the draw is among those. Three passes: the best, the histogram, the list; four where they are many
//   4. tokens of the bins above are kept whatever the threshold of top_p is: they compete while the bin is listed, and its own tokens
//      once the threshold is known. Three passes for top_p, but for bins of too many (this one)
//
// Lists that would overflow are not used: the search then goes on over the row itself, with a histogram of 11 bits of x a pass.
#include "choice.cuh"

constexpr int BINS = 2048;
constexpr int EACH = BINS / WIDE;  // of a thread of the block's WIDE
constexpr int MEMBERS = 1024;      // tokens of the threshold's bin that can be listed
constexpr int CANDIDATES = 2048;   // tokens in and above it that can be listed
constexpr float LEAST = -3.402823466e38f;  // finite: a token of -inf is a forbidden one

struct Shared {
  u32 low[BINS], high[BINS];  // histogram: a sum is high * 2^32 + low
  u64 warp_sums[WIDE / 32];
  u64 above, target;
  u32 bin, least_key, most_key, num_members, num_candidates, raw;
  float values[WIDE / 32][2];
  Best best[WIDE / 32];
  float member[MEMBERS], candidate[CANDIDATES];
  int member_token[MEMBERS], token[CANDIDATES];
};

// visit(x of four tokens, the first one) over the row; tokens past the end come as -inf. BACK: from its end, where the last reading
// ended: some of that is still in the L2 cache.
template <bool BACK, int AHEAD = 4, typename Visit>  // AHEAD: loads under way before the first is used
__device__ __forceinline__ void for_each_four(const float* row, int vocab, Visit visit) {
  constexpr int STRIDE = WIDE * 4 * AHEAD;
  for (int done = 0; done < vocab; done += STRIDE) {
    int first = BACK ? (vocab - 1) / STRIDE * STRIDE - done : done;
    float4 four[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      int v = first + (i * WIDE + threadIdx.x) * 4;
      four[i] = v < vocab ? *reinterpret_cast<const float4*>(row + v) : make_float4(-INF, -INF, -INF, -INF);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      int v = first + (i * WIDE + threadIdx.x) * 4;
      if (v + 1 >= vocab) four[i].y = -INF;
      if (v + 2 >= vocab) four[i].z = -INF;
      if (v + 3 >= vocab) four[i].w = -INF;
      visit(four[i], v);
    }
  }
}

// visit(x, token) for every token of the row, or of the candidates where they are listed; there may come some of -inf beside them.
template <bool BACK = false, int AHEAD = 4, typename Visit>
__device__ __forceinline__ void for_each(const float* row, int vocab, const Shared& s, bool listed, Visit visit) {
  if (listed) {
    for (int first = 0; first < (int)s.num_candidates; first += WIDE) {
      int i = first + threadIdx.x;
      visit(i < (int)s.num_candidates ? s.candidate[i] : -INF, i < (int)s.num_candidates ? s.token[i] : 0);
    }
    return;
  }
  for_each_four<BACK, AHEAD>(row, vocab, [&](const float4& four, int v) {
    visit(four.x, v);
    visit(four.y, v + 1);
    visit(four.z, v + 2);
    visit(four.w, v + 3);
  });
}

__device__ __forceinline__ void clear(Shared& s) {
  __syncthreads();  // whoever still reads the last histogram
  for (int i = threadIdx.x; i < BINS; i += WIDE) s.low[i] = s.high[i] = 0;
  __syncthreads();
}
__device__ __forceinline__ void add(Shared& s, u32 bin, u64 weight) {
  u32 part = (u32)weight, before = atomicAdd(&s.low[bin], part);
  u32 carried = (u32)(weight >> 32) + (before + part < before);
  if (carried) atomicAdd(&s.high[bin], carried);
}

// The sum of all bins. With target_of(sum): s.bin is the first bin at which `above` + the sums up to it reach the target, s.above
// what lies before it, s.target the target. Every thread returns with all of them to be read.
template <typename TargetOf>
__device__ __forceinline__ void find_bin(Shared& s, u64 above, TargetOf target_of) {
  __syncthreads();
  auto sum_of = [&](int bin) { return (u64)s.high[bin] << 32 | s.low[bin]; };
  u64 own = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) own += sum_of(EACH * threadIdx.x + i);
  u64 sum = own;
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    u64 other = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += other;
  }
  if (lane == 31) s.warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  u64 total = 0, before = 0;
  for (int w = 0; w < WIDE / 32; w++) {
    if (w == threadIdx.x / 32) before = total;
    total += s.warp_sums[w];
  }
  u64 target = target_of(total), start = above + before + sum - own;
  if (start < target && start + own >= target) {
    int bin = EACH * threadIdx.x;
    for (u64 next; (next = start + sum_of(bin)) < target; bin++) start = next;
    s.bin = bin, s.above = start, s.target = target;
  }
  __syncthreads();
}

// Whatever comes of it, a list of tokens that may overflow: the place of one more, or `most` where there is none, and `length` is above it.
__device__ __forceinline__ u32 place_in(u32& length, u32 most) {
  u32 at = *(volatile u32*)&length < most ? atomicAdd(&length, 1) : most;
  if (at >= most && *(volatile u32*)&length == most) atomicMax(&length, most + 1);
  return min(at, most);
}

// What a search leaves: the key of the threshold, and whether the tokens of its bin are all listed as members.
struct Found {
  u32 key;
  bool few;
};

// The threshold: measure(x) is a token's weight, target_of(sum of all weights at or above `bottom`) at most that sum and at least 1. A
// token below `bottom` is not kept, nor is one of weight 0. `listed`: the candidates hold all that count; set where they do now. Where
// they did not before, keep(x of four tokens, the first one) gets those that lie above the threshold's bin, -inf for the others; all
// lanes of a warp call it together. (Without KEEP nobody is called, and candidates are listed.)
template <bool KEEP, typename Measure, typename TargetOf, typename Keep>
__device__ __forceinline__ Found threshold(const float* row, int vocab, Shared& s, float top, float bottom, bool& listed, Measure measure,
                                           TargetOf target_of, Keep keep) {
  // Halves: the difference of two floats may overflow.
  float half_top = 0.5f * top, range = half_top - 0.5f * bottom, scale = range > 0 ? fminf(BINS / range, -LEAST) : 0;
  auto bin_of = [&](float x) { return (u32)min((int)((half_top - 0.5f * x) * scale), BINS - 1); };
  clear(s);
  for_each<true>(row, vocab, s, listed, [&](float x, int) {
    if (x >= bottom) add(s, bin_of(x), measure(x));
  });
  find_bin(s, 0, target_of);
  u32 bin = s.bin;
  bool had = listed;
  if (threadIdx.x == 0) s.num_members = 0, s.least_key = ~0u, s.most_key = 0;
  if (threadIdx.x == 0 && !had) s.num_candidates = 0;
  __syncthreads();
  u32 least = ~0u, most = 0;
  auto list = [&](float x, int token) {  // whether it lies above the bin
    u32 mine = x >= bottom ? bin_of(x) : BINS;
    if (mine == bin) {
      least = min(least, ordered(x)), most = max(most, ordered(x));
      u32 at = place_in(s.num_members, MEMBERS);
      if (at < MEMBERS) s.member[at] = x, s.member_token[at] = token;
    }
    if (!KEEP && !had && mine <= bin) {
      u32 at = place_in(s.num_candidates, CANDIDATES);
      if (at < CANDIDATES) s.candidate[at] = x, s.token[at] = token;
    }
    return mine < bin;
  };
  if (KEEP && !had) {
    for_each_four<false, 2>(row, vocab, [&](const float4& four, int v) {
      float kept[4] = {four.x, four.y, four.z, four.w};
      bool any = false;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        bool above_bin = list(kept[j], v + j);
        if (!above_bin) kept[j] = -INF;
        any |= above_bin;
      }
      if (__any_sync(~0u, any)) keep(kept, v);
    });
  } else {
    for_each(row, vocab, s, had, list);
  }
  least = __reduce_min_sync(~0u, least), most = __reduce_max_sync(~0u, most);
  if (threadIdx.x % 32 == 0 && least <= most) atomicMin(&s.least_key, least), atomicMax(&s.most_key, most);
  __syncthreads();
  if (!KEEP) listed = s.num_candidates <= CANDIDATES;
  bool few = s.num_members <= MEMBERS;
  u32 num_members = s.num_members, low = s.least_key, high = s.most_key;
  while (low < high) {
    int shift = max(0, 32 - __clz(high - low) - 11);
    clear(s);
    auto count = [&](float x) {
      u32 key = ordered(x);
      if (key >= low && key <= high) add(s, high - key >> shift, measure(x));
    };
    if (few)
      for (int i = threadIdx.x; i < num_members; i += WIDE) count(s.member[i]);
    else
      for_each<false, 1>(row, vocab, s, listed, [&](float x, int) { count(x); });
    find_bin(s, s.above, [&](u64) { return s.target; });
    high -= s.bin << shift;
    low = max(low, high - min(high, (1u << shift) - 1));
  }
  return {high, few};
}

extern "C" __global__ void __launch_bounds__(WIDE, 1024 / WIDE)
choose_truncated(const float* __restrict__ logits, const float* __restrict__ processed, int stride, int vocab,
                 const int* __restrict__ sample_rows, const int* __restrict__ fields, u32* raw_state, int* __restrict__ chosen,
                 int* __restrict__ status) {
  __shared__ Shared s;
  let_next_start();
  wait_for_previous();
  int at = blockIdx.x, row = sample_rows[at];
  if (row < 0) return;
  const RowFields& f = fields_of(fields, row);
  if (!(f.flags & TRUNCATE)) return;
  bool changed = f.flags & PROCESS, listed = false;
  const float* x = (changed ? processed : logits) + (size_t)at * stride;
  if (threadIdx.x == 0) s.raw = changed ? raw_state[at] : 0;
  float most = -INF, least = INF;
  u32 raw = 0;
  for_each_four<false>(x, vocab, [&](const float4& four, int) {
    float values[4] = {four.x, four.y, four.z, four.w};
    // NaN unless all four are finite.
    float check = fmaf(four.x, 0.0f, fmaf(four.y, 0.0f, fmaf(four.z, 0.0f, four.w * 0.0f)));
    if (check == 0) {
      raw |= 2;
      most = fmaxf(most, fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w)));
      least = fminf(least, fminf(fminf(four.x, four.y), fminf(four.z, four.w)));
      return;
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      raw |= values[j] != values[j] || values[j] == INF ? 1 : values[j] > -INF ? 2 : 0;
      most = fmaxf(most, values[j]);
      if (values[j] > -INF) least = fminf(least, values[j]);
    }
  });
#pragma unroll
  for (int d = 16; d; d >>= 1) {
    most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
    least = fminf(least, __shfl_xor_sync(~0u, least, d));
  }
  raw = __reduce_or_sync(~0u, raw);
  if (threadIdx.x % 32 == 0) s.values[threadIdx.x / 32][0] = most, s.values[threadIdx.x / 32][1] = least;
  __syncthreads();
  if (!changed && threadIdx.x % 32 == 0) atomicOr(&s.raw, raw);
  __syncthreads();
  for (int w = 0; w < WIDE / 32; w++) most = fmaxf(most, s.values[w][0]), least = fminf(least, s.values[w][1]);
  if (s.raw & 1 || most == -INF) {
    if (threadIdx.x == 0) decide(NOTHING, s.raw, chosen + at, status + at), raw_state[at] = 0;
    return;
  }
  if (f.min_p > 0) least = fmaxf(least, most + logf(f.min_p) * f.temperature);
  bool top_k = f.top_k > 0 && f.top_k < vocab, top_p = f.top_p < 1, drawn = false;
  float inverse = 1.0f / f.temperature, bound = NOTHING.value;
  Best best = NOTHING;
  auto keep = [&](const float(&values)[4], int token) { compete(best, bound, values, token, f, inverse); };
  auto draw = [&](float value, int token) {
    if (!(value >= least)) return;
    uint4 words = noise_of(f, token / 4);
    u32 word = token % 4 == 0 ? words.x : token % 4 == 1 ? words.y : token % 4 == 2 ? words.z : words.w;
    best = better(best, Best{fmaf(value, inverse, gumbel(word)), token});
  };
  if (top_k)
    least = from_ordered(threshold<false>(x, vocab, s, most, least, listed, [](float) { return 1ull; },
                                          [&](u64 sum) { return min(sum, (u64)f.top_k); }, keep).key);
  if (top_p) {
    float base2 = LOG2_E * inverse;
    auto mass = [&](float value) {
      float units = exp2_fast((value - most) * base2) * 1099511627776.0f;
      if (units < 4294967296.0f) return (u64)(u32)units;  // nearly all of them; the wide conversion takes four times as long
      return (u64)units;
    };
    float bottom = fmaxf(least, most - 41.0f / base2);  // below, the mass is 0
    Found found = threshold<true>(x, vocab, s, most, bottom, listed, mass,
                                  [&](u64 sum) { return max(1ull, (u64)((double)sum * (double)f.top_p)); }, keep);
    least = from_ordered(found.key), drawn = !listed && found.few;
  }
  if (drawn) {
    for (int i = threadIdx.x; i < (int)s.num_members; i += WIDE) draw(s.member[i], s.member_token[i]);
  } else if (listed) {
    for_each(x, vocab, s, true, draw);
  } else {
    // All lanes of a warp go round equally often, as in sample.cu.
    for_each_four<true>(x, vocab, [&](const float4& four, int v) {
      float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (!(values[j] >= least)) values[j] = -INF;
      if (__any_sync(~0u, fmaxf(fmaxf(values[0], values[1]), fmaxf(values[2], values[3])) > -INF)) compete(best, bound, values, v, f, inverse);
    });
  }
  best = warp_best(best);
  if (threadIdx.x % 32 == 0) s.best[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < WIDE / 32; w++) best = better(best, s.best[w]);
  decide(best, s.raw, chosen + at, status + at);
  raw_state[at] = 0;
}
