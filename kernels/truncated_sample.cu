// One token for each sampling row with top_k, top_p or min_p. grid (rows * CLUSTER); shapes as in sample.cu.
//   choose_truncated       reads the row from device memory in every pass
//   choose_truncated_held  the blocks of a cluster hold it in their shared memory, a slice each (CLUSTER > 1)
//
// top_k and top_p ask for a threshold: the largest x such that the count (the mass) of all tokens at or above it reaches k (p).
// Counts and masses are integers, masses in units of 2^-40 of the best token's, so their sums do not depend on any order, nor a token on
// the number of blocks.
//
// Bound by bytes: 4 a logit and pass; held, 4 a logit and by the histogram's atomic operations.
// Ladder
//   1. sort, cumulative sum, draw: a sort of 128k entries a row, some twenty passes
//   2. a search over the 32 bits of x, 4 bits a pass, 15 pivots at once: eight passes for each of top_k and top_p
//   3. a histogram of BINS equal steps of x finds the bin that holds the threshold; the tokens of that bin, a few hundred even where
//      the distribution is flat, are listed in shared memory and searched there; so are all tokens above it where they are few, as
//      in any real distribution, and the draw is among those. Three passes: the best, the histogram, the list; four where they are many
//   4. tokens of the bins above are kept whatever the threshold of top_p is: they compete while the bin is listed, and its own tokens
//      once the threshold is known. Three passes for top_p, but for bins of too many
//   5. a cluster of blocks shares a row and holds it: one reading of device memory, whose end overlaps other clusters' passes, and a row
//      alone has eight multiprocessors. The blocks meet three times; then one of them goes on alone with all their lists (this one)
//
// Lists that would overflow are not used: the search then goes on over the row itself, with a histogram of 10 bits of x a pass.
#include "choice.cuh"
#include "histogram.cuh"

constexpr int WARPS = WIDE / 32;
constexpr int LISTED = CLUSTER > 1 ? 448 : 2048;  // tokens that a block can list
constexpr float LEAST = -3.402823466e38f;         // finite: a token of -inf is a forbidden one

struct Shared {
  Histogram histogram;
  u64 list[LISTED];               // entry_of: of the threshold's bin, and without KEEP of those above
  u64 best[WARPS], last[WARPS];   // entry_of the best of each warp: of the row's slice, of all
  u32 most, least, raw;           // of the slice; ordered, but for raw
  u32 num_listed, low_key, high_key;
};
extern __shared__ float4 held[];  // the slice, where it is held

__device__ __forceinline__ u64 entry_of(float value, int token) { return (u64)__float_as_uint(value) << 32 | (u32)token; }
__device__ __forceinline__ Best best_of(u64 entry) { return {__uint_as_float((u32)(entry >> 32)), (int)(u32)entry}; }

// Tokens first .. first + count - 1 of the row; first a multiple of 4. Each thread always visits the same ones.
template <bool HELD>
struct Slice {
  const float* x;
  int first, count;
};

// visit(x of four tokens, the first one) over the slice; tokens past the end come as -inf. BACK: from its end, where the last reading
// ended: some of that is still in the L2 cache. AHEAD: loads under way before the first is used.
template <bool BACK = false, int AHEAD = 4, bool HELD, typename Visit>
__device__ __forceinline__ void for_each_four(const Slice<HELD>& slice, Visit visit) {
  constexpr int STRIDE = WIDE * 4 * AHEAD;
  const int count = slice.count;
  for (int done = 0; done < count; done += STRIDE) {
    int first = BACK ? (count - 1) / STRIDE * STRIDE - done : done;
    float4 four[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      int v = first + (i * WIDE + threadIdx.x) * 4;
      const float4* at = HELD ? held + v / 4 : reinterpret_cast<const float4*>(slice.x + v);
      four[i] = v < count ? *at : make_float4(-INF, -INF, -INF, -INF);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      int v = first + (i * WIDE + threadIdx.x) * 4;
      if (v + 1 >= count) four[i].y = -INF;
      if (v + 2 >= count) four[i].z = -INF;
      if (v + 3 >= count) four[i].w = -INF;
      visit(four[i], slice.first + v);
    }
  }
}
template <bool HELD>
constexpr int FEW_AHEAD = HELD ? 1 : 2;

// visit(x, token) for every token of the slice; for a block that goes on alone, for every one that is listed anywhere in the cluster.
template <bool BACK = false, int AHEAD = 4, bool HELD, typename Visit>
__device__ __forceinline__ void for_each(const Slice<HELD>& slice, const Shared& s, bool alone, Visit visit) {
  if (alone) {
    u32 rank = threadIdx.x % CLUSTER;
    for (u32 i = threadIdx.x / CLUSTER, length = of_block(s.num_listed, rank); i < length; i += WIDE / CLUSTER) {
      Best entry = best_of(of_block(s.list[i], rank));
      visit(entry.value, entry.token);
    }
    return;
  }
  for_each_four<BACK, AHEAD>(slice, [&](const float4& four, int v) {
    visit(four.x, v);
    visit(four.y, v + 1);
    visit(four.z, v + 2);
    visit(four.w, v + 3);
  });
}

// Copies the slice into shared memory and visits it on the way, what has arrived while the rest comes.
template <typename Visit>
__device__ __forceinline__ void hold(const Slice<true>& slice, Visit visit) {
  constexpr int GROUPS = 4, STEP = WIDE * 4;
  int each = (slice.count + STEP * GROUPS - 1) / (STEP * GROUPS) * STEP;
  for (int g = 0; g < GROUPS; g++) {
    for (int v = g * each + threadIdx.x * 4; v < min(slice.count, (g + 1) * each); v += STEP) copy16_streaming(held + v / 4, slice.x + v);
    end_group();
  }
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    if (g == 0) copies_done<3>();
    if (g == 1) copies_done<2>();
    if (g == 2) copies_done<1>();
    if (g == 3) copies_done<0>();
    for (int v = g * each + threadIdx.x * 4; v < min(slice.count, (g + 1) * each); v += STEP) {
      float4 four = held[v / 4];
      if (v + 1 >= slice.count) four.y = -INF;
      if (v + 2 >= slice.count) four.z = -INF;
      if (v + 3 >= slice.count) four.w = -INF;
      visit(four, slice.first + v);
    }
  }
}

// Whatever comes of it, a list of tokens that may overflow: the place of one more, or `most` where there is none, and `length` is above it.
__device__ __forceinline__ u32 place_in(u32& length, u32 most) {
  u32 at = *(volatile u32*)&length < most ? atomicAdd(&length, 1) : most;
  if (at >= most && *(volatile u32*)&length == most) atomicMax(&length, most + 1);
  return min(at, most);
}

// The threshold's key: measure(x) is a token's weight, target_of(sum of all weights at or above `bottom`) at most that sum and at least 1.
// A token below `bottom` is not kept, nor is one of weight 0. `alone`: the lists of the cluster hold all that count, and this block goes
// on alone; set where they do now, and then there is a key in block 0 only. Where they did not before, with KEEP keep(x of four tokens,
// the first one) gets those that lie above the threshold's bin, -inf for the others; all lanes of a warp call it together; only the
// bin is listed then. `best` is left for the block that goes on alone.
template <bool KEEP, bool HELD, typename Measure, typename TargetOf, typename Keep>
__device__ __forceinline__ u32 threshold(const Slice<HELD>& slice, Shared& s, float top, float bottom, bool& alone, Measure measure,
                                         TargetOf target_of, Keep keep, const Best& best) {
  Histogram& h = s.histogram;
  // Halves: the difference of two floats may overflow.
  float half_top = 0.5f * top, range = half_top - 0.5f * bottom, scale = range > 0 ? fminf(BINS / range, -LEAST) : 0;
  auto bin_of = [&](float x) { return (u32)min((int)((half_top - 0.5f * x) * scale), BINS - 1); };
  clear(h);
  for_each<true>(slice, s, alone, [&](float x, int) {
    if (x >= bottom) add(h, bin_of(x), measure(x));
  });
  find_bin(h, alone, 0, target_of);
  u32 bin = h.bin;
  const bool had = alone;
  // Behind find_bin, where others have read what the last search left here.
  if (threadIdx.x == 0) s.low_key = ~0u, s.high_key = 0;
  if (threadIdx.x == 0 && !had) s.num_listed = 0;
  __syncthreads();
  u32 low = ~0u, high = 0;
  auto list = [&](float x, int token) {  // whether it lies above the bin
    u32 mine = x >= bottom ? bin_of(x) : BINS;
    if (mine == bin) low = min(low, ordered(x)), high = max(high, ordered(x));
    if (!had && (KEEP ? mine == bin : mine <= bin)) {
      u32 at = place_in(s.num_listed, LISTED);
      if (at < LISTED) s.list[at] = entry_of(x, token);
    }
    return mine < bin;
  };
  if (KEEP && !had) {
    for_each_four<false, FEW_AHEAD<HELD>>(slice, [&](const float4& four, int v) {
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
    for_each(slice, s, had, list);
  }
  low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
  Best mine = warp_best(best);
  if (threadIdx.x % 32 == 0) {
    if (low <= high) atomicMin(&s.low_key, low), atomicMax(&s.high_key, high);
    if (!had) s.best[threadIdx.x / 32] = entry_of(mine.value, mine.token);
  }
  meet(had);
  u32 rank = had ? 0 : threadIdx.x % CLUSTER;
  low = __reduce_min_sync(~0u, of_block(s.low_key, rank)), high = __reduce_max_sync(~0u, of_block(s.high_key, rank));
  alone = had || __reduce_max_sync(~0u, of_block(s.num_listed, rank)) <= LISTED;
  if (alone && rank_in_cluster() != 0) return 0;
  while (low < high) {
    int shift = max(0, 32 - __clz(high - low) - BIN_BITS);
    clear(h);
    for_each<false, 1>(slice, s, alone, [&](float x, int) {
      u32 key = ordered(x);
      if (key >= low && key <= high) add(h, high - key >> shift, measure(x));
    });
    find_bin(h, alone, h.above, [&](u64) { return h.target; });
    high -= h.bin << shift;
    low = max(low, high - min(high, (1u << shift) - 1));
    meet(alone);  // everyone has read the histogram
  }
  return high;
}

// Leaves the row's token. Every block of the cluster comes back from here, and its shared memory may still be read then.
template <bool HELD>
__device__ __forceinline__ void choose_kept(const Slice<HELD>& slice, int vocab, const RowFields& f, Shared& s, u32* raw_state, int* chosen,
                                            int* status) {
  const bool changed = f.flags & PROCESS, first_block = rank_in_cluster() == 0;
  float most = -INF, least = INF;
  u32 raw = 0;
  auto look = [&](const float4& four, int) {
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
  };
  if (threadIdx.x == 0) s.most = 0, s.least = ~0u, s.raw = changed && first_block ? *raw_state : 0;
  __syncthreads();
  if constexpr (HELD)
    hold(slice, look);
  else
    for_each_four(slice, look);
  u32 highest = __reduce_max_sync(~0u, ordered(most)), lowest = __reduce_min_sync(~0u, ordered(least));
  raw = __reduce_or_sync(~0u, raw);
  if (threadIdx.x % 32 == 0) {
    atomicMax(&s.most, highest), atomicMin(&s.least, lowest);
    if (!changed) atomicOr(&s.raw, raw);
  }
  meet_cluster();
  u32 other = threadIdx.x % CLUSTER;
  most = from_ordered(__reduce_max_sync(~0u, of_block(s.most, other))), least = from_ordered(__reduce_min_sync(~0u, of_block(s.least, other)));
  raw = __reduce_or_sync(~0u, of_block(s.raw, other));
  if (raw & 1 || most == -INF) {
    if (first_block && threadIdx.x == 0) decide(NOTHING, raw, chosen, status), *raw_state = 0;
    return;
  }
  if (f.min_p > 0) least = fmaxf(least, most + logf(f.min_p) * f.temperature);
  bool alone = false;
  float inverse = 1.0f / f.temperature, bound = NOTHING.value;
  Best best = NOTHING;
  auto keep = [&](const float(&values)[4], int token) { compete(best, bound, values, token, f, inverse); };
  if (f.top_k > 0 && f.top_k < vocab) {
    u32 key = threshold<false>(slice, s, most, least, alone, [](float) { return 1ull; }, [&](u64 sum) { return min(sum, (u64)f.top_k); },
                               keep, best);
    if (alone && !first_block) return;
    least = from_ordered(key);
  }
  if (f.top_p < 1) {
    float base2 = LOG2_E * inverse;
    auto mass = [&](float value) {
      float units = exp2_fast((value - most) * base2) * 1099511627776.0f;
      if (units < 4294967296.0f) return (u64)(u32)units;  // nearly all of them; the wide conversion takes four times as long
      return (u64)units;
    };
    float bottom = fmaxf(least, most - 41.0f / base2);  // below, the mass is 0
    u32 key = threshold<true>(slice, s, most, bottom, alone, mass,
                              [&](u64 sum) { return max(1ull, (u64)((double)sum * (double)f.top_p)); }, keep, best);
    if (alone && !first_block) return;
    least = from_ordered(key);
  }
  if (alone) {
    for_each(slice, s, true, [&](float value, int token) {
      if (!(value >= least)) return;
      uint4 words = noise_of(f, token / 4);
      u32 word = token % 4 == 0 ? words.x : token % 4 == 1 ? words.y : token % 4 == 2 ? words.z : words.w;
      best = better(best, Best{fmaf(value, inverse, gumbel(word)), token});
    });
  } else {
    // All lanes of a warp go round equally often, as in sample.cu.
    for_each_four<true, HELD ? 1 : 4>(slice, [&](const float4& four, int v) {
      float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (!(values[j] >= least)) values[j] = -INF;
      if (__any_sync(~0u, fmaxf(fmaxf(values[0], values[1]), fmaxf(values[2], values[3])) > -INF)) keep(values, v);
    });
    best = warp_best(best);
    if (threadIdx.x % 32 == 0) s.best[threadIdx.x / 32] = entry_of(best.value, best.token);
    meet_cluster();
    if (!first_block) return;
  }
  static_assert(CLUSTER * WARPS <= WIDE, "a thread for each warp's best");
  if (threadIdx.x < CLUSTER * WARPS) best = better(best, best_of(of_block(s.best[threadIdx.x % WARPS], threadIdx.x / WARPS)));
  best = warp_best(best);
  if (threadIdx.x % 32 == 0) s.last[threadIdx.x / 32] = entry_of(best.value, best.token);
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < WARPS; w++) best = better(best, best_of(s.last[w]));
  decide(best, raw, chosen, status);
  *raw_state = 0;
}

template <bool HELD>
__device__ __forceinline__ void choose_row(const float* __restrict__ logits, const float* __restrict__ processed, int stride, int vocab,
                                           const int* __restrict__ sample_rows, const int* __restrict__ fields, u32* raw_state,
                                           int* __restrict__ chosen, int* __restrict__ status) {
  __shared__ Shared s;
  let_next_start();
  wait_for_previous();
  int at = blockIdx.x / CLUSTER, row = sample_rows[at];
  if (row < 0) return;
  const RowFields& f = fields_of(fields, row);
  if (!(f.flags & TRUNCATE)) return;
  int each = (vocab + 4 * CLUSTER - 1) / (4 * CLUSTER) * 4, first = min(vocab, (int)rank_in_cluster() * each);
  const float* x = (f.flags & PROCESS ? processed : logits) + (size_t)at * stride;
  choose_kept(Slice<HELD>{x + first, first, min(each, vocab - first)}, vocab, f, s, raw_state + at, chosen + at, status + at);
  if (CLUSTER > 1) meet_cluster();  // a block's shared memory stays until nobody reads it
}

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(WIDE, BLOCKS)
choose_truncated(const float* __restrict__ logits, const float* __restrict__ processed, int stride, int vocab,
                 const int* __restrict__ sample_rows, const int* __restrict__ fields, u32* raw_state, int* __restrict__ chosen,
                 int* __restrict__ status) {
  choose_row<false>(logits, processed, stride, vocab, sample_rows, fields, raw_state, chosen, status);
}
#if CLUSTER > 1
extern "C" __global__ void IN_CLUSTERS __launch_bounds__(WIDE, BLOCKS)
choose_truncated_held(const float* __restrict__ logits, const float* __restrict__ processed, int stride, int vocab,
                      const int* __restrict__ sample_rows, const int* __restrict__ fields, u32* raw_state, int* __restrict__ chosen,
                      int* __restrict__ status) {
  choose_row<true>(logits, processed, stride, vocab, sample_rows, fields, raw_state, chosen, status);
}
#endif
