// The threshold of top_k or top_p in a row that a block, or a cluster of blocks, goes over. -DWIDE threads and -DLISTED tokens a block.
//
// Lists that would overflow are not used: the search then goes on over the row itself, with a histogram of 10 bits of x a pass.
#pragma once
#include "choice.cuh"
#include "histogram.cuh"
#include "slice.cuh"

constexpr int WARPS = WIDE / 32;
constexpr float LEAST = -3.402823466e38f;  // finite: a token of -inf is a forbidden one

struct Shared {
  Histogram histogram;
  u64 list[CLUSTER > 1 ? LISTED : 1];  // entry_of, where `held` is for the slice or the lists of all: own_list
  u64 best[WARPS], last[WARPS];        // entry_of the best of each warp: of its slice, of all
  u32 most, least, raw;                // of the slice; ordered, but for raw
  u32 floor;                           // the least that a warp (a block alone: a pair of lanes) has as its most; ordered
  u32 thread_floor;                    // that a thread of a cluster has; ordered
  u32 num_listed, low_key, high_key;
  u64 sum, above, target;              // of list_above
};
__device__ __forceinline__ u64* all_lists() { return reinterpret_cast<u64*>(held); }
__device__ __forceinline__ u64* own_list(Shared& s) { return CLUSTER > 1 ? s.list : all_lists(); }

__device__ __forceinline__ u64 entry_of(float value, int token) { return (u64)__float_as_uint(value) << 32 | (u32)token; }
__device__ __forceinline__ Best best_of(u64 entry) { return {__uint_as_float((u32)(entry >> 32)), (int)(u32)entry}; }

// visit(x, token) for every token of the slice that is at least `bottom`; in a block that goes on alone, where `listed` >= 0, of so many
// that are listed.
template <int AHEAD = 4, bool HELD, typename Visit>
__device__ __forceinline__ void for_each(const Slice<HELD>& slice, const Shared& s, int listed, float bottom, Visit visit) {
  if (listed >= 0) {
    for (int i = threadIdx.x; i < listed; i += WIDE) {
      Best entry = best_of(all_lists()[i]);
      if (entry.value >= bottom) visit(entry.value, entry.token);
    }
    return;
  }
  for_each_four<false, AHEAD>(slice, [&](const float4& four, int v) {
    if (!(most_of(four) >= bottom)) return;
    if (four.x >= bottom) visit(four.x, v);
    if (four.y >= bottom) visit(four.y, v + 1);
    if (four.z >= bottom) visit(four.z, v + 2);
    if (four.w >= bottom) visit(four.w, v + 3);
  });
}

// Whatever comes of it, a list of tokens that may overflow: the place of one more, or `most` where there is none, and `length` is above it.
__device__ __forceinline__ u32 place_in(u32& length, u32 most) {
  u32 at = *(volatile u32*)&length < most ? atomicAdd(&length, 1) : most;
  if (at >= most && *(volatile u32*)&length == most) atomicMax(&length, most + 1);
  return min(at, most);
}
__device__ __forceinline__ void list_token(Shared& s, float x, int token) {
  u32 at = place_in(s.num_listed, LISTED);
  if (at < LISTED) own_list(s)[at] = entry_of(x, token);
}

// What the warps of the cluster have found best, for block 0.
__device__ __forceinline__ void leave(Shared& s, const Best& best) {
  Best mine = warp_best(best);
  if (threadIdx.x % 32 == 0) s.best[threadIdx.x / 32] = entry_of(mine.value, mine.token);
}
__device__ __forceinline__ void take(const Shared& s, Best& best) {
  static_assert(CLUSTER * WARPS <= WIDE, "a thread for each warp");
  if (threadIdx.x < CLUSTER * WARPS) best = better(best, best_of(of_block(s.best[threadIdx.x % WARPS], threadIdx.x / WARPS)));
}

// Block 0 takes all lists and goes on alone, the others are done. Returns the length.
__device__ __forceinline__ int gather(const Shared& s, Best& best) {
  if (CLUSTER == 1) return s.num_listed;
  u32 all = 0;
  if (rank_in_cluster() == 0) {
    u32 rank = threadIdx.x % CLUSTER, length = of_block(s.num_listed, rank), own = threadIdx.x % 32 < CLUSTER ? length : 0;
    u32 end = running_sum(own), first = __shfl_sync(~0u, end - own, rank);
    all = __shfl_sync(~0u, end, 31);
    u64* to = all_lists() + first;
    for (u32 i = threadIdx.x / CLUSTER; i < length; i += WIDE / CLUSTER) to[i] = of_block(s.list[i], rank);
    take(s, best);
  }
  meet_cluster();
  return all;
}

// What is left of a float >= 0 without its fraction. Conversions are slow, that to 64 bits above all; for most an addition does.
__device__ __forceinline__ u64 whole(float units) {
  constexpr float ONES = 8388608.0f;  // 2^23: a float of this size has no fraction
  if (units < ONES) return __float_as_uint(__fadd_rz(units, ONES)) - __float_as_uint(ONES);
  if (units < 4294967296.0f) return (u32)units;
  return (u64)units;
}

// A sum of floats without their fractions, each at most 2^40: of what is a multiple of 2^23, and of the rest. Where all of a row are added up
// conversions take longer than the row's way from memory.
class Wholes {
  u32 high = 0, low = 0, count = 0;
  u64 sum = 0;

 public:
  __device__ __forceinline__ void add(float units) {
    constexpr float ONES = 8388608.0f, STEPS = 70368744177664.0f;  // 2^23, and 2^46: a float of this size counts in steps of 2^23
    float steps = __fadd_rz(units, STEPS);
    high += __float_as_uint(steps) - __float_as_uint(STEPS);
    low += __float_as_uint(__fadd_rz(units - (steps - STEPS), ONES)) - __float_as_uint(ONES);
  }
  __device__ __forceinline__ void may_carry() {  // at least once every 256 numbers
    if (++count % 64 == 0) carry();
  }
  __device__ __forceinline__ void carry() { sum += ((u64)high << 23) + low, high = low = 0; }
  __device__ __forceinline__ u64 of_warp() {
    carry();
    u64 all = sum;
#pragma unroll
    for (int d = 16; d; d >>= 1) all += __shfl_xor_sync(~0u, all, d);
    return all;
  }
};

// A block alone with its row lists the tokens at or above `edge`; with `weighs` it adds up whole(measure(x)) of those at or above `bottom`
// in s.sum, and of the listed ones in s.above.
template <bool HELD, typename Measure>
__device__ __forceinline__ void list_above(const Slice<HELD>& slice, Shared& s, float edge, float bottom, bool weighs, Measure measure) {
  Histogram& h = s.histogram;
  Wholes all;
  u64 above = 0;
  if (threadIdx.x == 0) s.num_listed = 0, h.low[0] = h.high[0] = h.low[1] = h.high[1] = 0;
  __syncthreads();
  auto visit = [&](const float4& four, int v, bool weigh) {
    float x[4] = {four.x, four.y, four.z, four.w}, units[4];
    if (weigh) {
#pragma unroll
      for (int j = 0; j < 4; j++) units[j] = x[j] >= bottom ? measure(x[j]) : 0, all.add(units[j]);
      all.may_carry();
    }
    if (!(most_of(four) >= edge)) return;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (!(x[j] >= edge)) continue;
      list_token(s, x[j], v + j);
      if (weigh) above += whole(units[j]);
    }
  };
  if (weighs)
    for_each_four<true>(slice, [&](const float4& four, int v) { visit(four, v, true); });
  else
    for_each_four<true>(slice, [&](const float4& four, int v) { visit(four, v, false); });
  u64 sum = all.of_warp();
#pragma unroll
  for (int d = 16; d; d >>= 1) above += __shfl_xor_sync(~0u, above, d);
  if (threadIdx.x % 32 == 0 && weighs) add(h, 0, sum), add(h, 1, above);
  __syncthreads();
  if (threadIdx.x == 0) s.sum = sum_of(h, 0), s.above = sum_of(h, 1);
  __syncthreads();
}

// The threshold's key: whole(measure(x)) is a token's weight, target_of(sum of all weights at or above `bottom`) at most that sum and at least 1.
// A token below `bottom` is not kept, nor is one of weight 0. Below `floor` the threshold hardly lies; to look for it there is slow.
// `listed` >= 0: this block goes on alone, with so many tokens, all that count. It comes to that where there were more and few enough are
// left; then there is a key in block 0 only, and the others are done.
// Where there were more, with KEEP keep(x of four tokens, the first one) gets those above the threshold's bin, -inf for others; all lanes of
// a warp call it together, and tokens of the bin alone are listed. What it finds best stands in `best`.
template <bool KEEP, bool HELD, typename Measure, typename TargetOf, typename Keep>
__device__ __forceinline__ u32 threshold(const Slice<HELD>& slice, Shared& s, float top, float floor, float bottom, int& listed, Best& best,
                                         Measure measure, TargetOf target_of, Keep keep) {
  Histogram& h = s.histogram;
  const bool alone = listed >= 0;
  // Halves: the difference of two floats may overflow. The last bin holds what lies below the floor.
  float half_top = 0.5f * top, range = half_top - 0.5f * floor, scale = range > 0 ? fminf((BINS - 1) / range, -LEAST) : 0;
  auto bin_of = [&](float x) {  // rounded by an addition, as in whole
    return __float_as_uint(fminf((half_top - 0.5f * x) * scale, BINS - 1) + 8388608.0f) - __float_as_uint(8388608.0f);
  };
  u64 rest = 0;
  auto weigh = [&](u32 bin, float units) {
    if (bin < BINS - 1) add(h, bin, whole(units));
    else rest += whole(units);
  };
  clear(h);
  if (alone)
    for_each(slice, s, listed, bottom, [&](float x, int) { weigh(bin_of(x), measure(x)); });
  else
    for_each_four<true, HELD ? 2 : 4>(slice, [&](const float4& four, int) {
      if (!(most_of(four) >= bottom)) return;
      float x[4] = {four.x, four.y, four.z, four.w}, units[4];
      u32 bins[4];
#pragma unroll
      for (int j = 0; j < 4; j++) bins[j] = bin_of(x[j]), units[j] = x[j] >= bottom ? measure(x[j]) : 0;
#pragma unroll
      for (int j = 0; j < 4; j++) weigh(bins[j], units[j]);
    });
#pragma unroll
  for (int d = 16; d; d >>= 1) rest += __shfl_xor_sync(~0u, rest, d);
  if (threadIdx.x % 32 == 0 && rest) add(h, BINS - 1, rest);
  find_bin(h, alone, 0, target_of);
  u32 bin = h.bin;
  // Behind find_bin, where others have read what the last search left here.
  if (threadIdx.x == 0) s.low_key = ~0u, s.high_key = 0;
  if (threadIdx.x == 0 && !alone) s.num_listed = 0;
  __syncthreads();
  // A bin below the threshold's: bins do not fall where x does.
  float edge = 2 * (half_top - (bin + 1.5f) / scale);
  edge = bin_of(edge) > bin ? fmaxf(edge, bottom) : bottom;
  u32 low = ~0u, high = 0;
  auto list = [&](float x, int token) {  // whether it lies above the bin
    u32 mine = x >= edge ? bin_of(x) : BINS;
    if (mine == bin) low = min(low, ordered(x)), high = max(high, ordered(x));
    if (!alone && (KEEP ? mine == bin : mine <= bin)) list_token(s, x, token);
    return mine < bin;
  };
  if (KEEP && !alone) {
    for_each_four<false, HELD ? 1 : 2>(slice, [&](const float4& four, int v) {
      if (!__any_sync(~0u, most_of(four) >= edge)) return;
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
    for_each(slice, s, listed, edge, list);
  }
  low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
  if (threadIdx.x % 32 == 0 && low <= high) atomicMin(&s.low_key, low), atomicMax(&s.high_key, high);
  if (CLUSTER > 1 && !alone) leave(s, best);
  meet(alone);
  u32 rank = alone ? 0 : threadIdx.x % CLUSTER;
  low = __reduce_min_sync(~0u, of_block(s.low_key, rank)), high = __reduce_max_sync(~0u, of_block(s.high_key, rank));
  if (!alone && __reduce_max_sync(~0u, of_block(s.num_listed, rank)) <= LISTED) {
    listed = gather(s, best);
    if (rank_in_cluster() != 0) return 0;
  }
  while (low < high) {
    int shift = max(0, 32 - __clz(high - low) - BIN_BITS);
    clear(h);
    for_each<1>(slice, s, listed, from_ordered(low), [&](float x, int) {
      u32 key = ordered(x);
      if (key >= low && key <= high) add(h, high - key >> shift, whole(measure(x)));
    });
    find_bin(h, listed >= 0, h.above, [&](u64) { return h.target; });
    high -= h.bin << shift;
    low = max(low, high - min(high, (1u << shift) - 1));
    meet(listed >= 0);  // everyone has read the histogram
  }
  return high;
}
