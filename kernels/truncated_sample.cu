// One token for each sampling row with top_k, top_p or min_p. grid (rows * CLUSTER); shapes as in sample.cu.
//   choose_truncated       reads the row from device memory in every pass
//   choose_truncated_held  the blocks of a cluster hold it in their shared memory, a slice each (CLUSTER > 1)
//
// top_k and top_p ask for a threshold: the largest x such that the count (the mass) of all tokens at or above it reaches k (p).
// Counts and masses are integers, masses in units of 2^-40 of the best token's, so their sums do not depend on any order, nor a token on
// the number of blocks.
//
// Bound by bytes: 4 a logit and pass; where the row is held 4 a logit, and by instructions.
// Ladder
//   1. sort, cumulative sum, draw: a sort of 128k entries a row, some twenty passes
//   2. a search over the 32 bits of x, 4 bits a pass, 15 pivots at once: eight passes for each of top_k and top_p
//   3. a histogram of BINS equal steps of x finds the bin that holds the threshold; the tokens of that bin, a few hundred even where
//      the distribution is flat, are listed in shared memory and searched there; so are all tokens above it where they are few, as
//      in any real distribution, and the draw is among those. Three passes: the best, the histogram, the list; four where they are many
//   4. tokens of the bins above are kept whatever the threshold of top_p is: they compete while the bin is listed, and its own tokens
//      once the threshold is known. Three passes for top_p, but for bins of too many
//   5. a cluster of blocks shares a row and holds it: one reading of device memory, while other clusters are at their passes, and a row
//      alone has eight multiprocessors. The blocks meet three times; then one of them goes on with all their lists, the others leave
//   6. where it comes to a histogram of the row, tokens far below the threshold are added up in registers, since together they weigh less
//      than what top_p leaves out
//   7. many rows take a block each, for clusters would wait for room and for one another (kernels/shapes.py has the number). There the
//      threshold is nearly always among the row's best three thousand, of which the least that a pair of lanes has as its best is one.
//      They are listed while the weights of all are added up; if that does it, all else happens in the list. Two readings (this one).
//      (In a cluster: slower, since one block then has the whole list to itself)
#include "threshold.cuh"

// Leaves the row's token. Behind the cluster's last meeting nobody reads another block's memory.
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
  if (threadIdx.x == 0) {
    s.most = 0, s.least = s.floor = s.thread_floor = ~0u;
    s.raw = changed && first_block ? *raw_state : 0;
  }
  __syncthreads();
  if constexpr (HELD)
    hold(slice, look);
  else
    for_each_four(slice, look);
  u32 highest = __reduce_max_sync(~0u, ordered(most)), lowest = __reduce_min_sync(~0u, ordered(least));
  u32 floor = highest, thread_floor = 0;
  if (CLUSTER > 1) {
    thread_floor = __reduce_min_sync(~0u, ordered(most));
  } else {
    u32 pair = max(ordered(most), __shfl_xor_sync(~0u, ordered(most), 1));
    floor = __reduce_min_sync(~0u, pair > ordered(-INF) ? pair : ~0u);  // of those that have a token
  }
  raw = __reduce_or_sync(~0u, raw);
  if (threadIdx.x % 32 == 0) {
    atomicMax(&s.most, highest), atomicMin(&s.least, lowest), atomicMin(&s.floor, floor);
    if (CLUSTER > 1) atomicMin(&s.thread_floor, thread_floor);
    if (!changed) atomicOr(&s.raw, raw);
  }
  meet_cluster();
  u32 other = threadIdx.x % CLUSTER;
  most = from_ordered(__reduce_max_sync(~0u, of_block(s.most, other))), least = from_ordered(__reduce_min_sync(~0u, of_block(s.least, other)));
  raw = __reduce_or_sync(~0u, of_block(s.raw, other));
  if (most == INF) raw |= 1;  // penalties have made it of finite logits: no mass is a number then
  if (raw & 1 || most == -INF) {
    if (first_block && threadIdx.x == 0) decide(NOTHING, raw, chosen, status), *raw_state = 0;
    if (CLUSTER > 1) meet_cluster();
    return;
  }
  if (f.min_p > 0) least = fmaxf(least, most + logf(f.min_p) * f.temperature);
  int listed = -1;
  float inverse = 1.0f / f.temperature, bound = NOTHING.value;
  Best best = NOTHING;
  auto keep = [&](const float(&values)[4], int token) { compete(best, bound, values, token, f, inverse); };
  const bool top_k = f.top_k > 0 && f.top_k < vocab, top_p = f.top_p < 1;
  float base2 = LOG2_E * inverse;
  auto mass = [&](float value) { return exp2_fast((value - most) * base2) * 1099511627776.0f; };
  auto part_of = [&](u64 sum) { return max(1ull, (u64)((double)sum * (double)f.top_p)); };
  float lightest = most - 41.0f / base2;  // below, the mass is 0
  if (CLUSTER == 1 && (top_k || top_p)) {
    float bottom = top_k ? least : fmaxf(least, lightest), edge = fmaxf(from_ordered(s.floor), bottom);
    list_above(slice, s, edge, bottom, !top_k, mass);
    u64 target = part_of(s.sum);
    if (s.num_listed <= LISTED && (edge <= bottom || (top_k ? s.num_listed >= f.top_k : s.above >= target))) {
      listed = s.num_listed;
      if (threadIdx.x == 0) s.target = target;
      least = edge;
    }
  } else if (CLUSTER > 1 && top_k) {
    // Each warp, each thread has a token at or above the floor, so where they are k or more the threshold is not below.
    u32 floor = f.top_k <= CLUSTER * WARPS ? __reduce_min_sync(~0u, of_block(s.floor, other))
                : f.top_k <= CLUSTER * WIDE ? __reduce_min_sync(~0u, of_block(s.thread_floor, other)) : 0;
    if (floor) least = fmaxf(least, from_ordered(floor));
  }
  if (top_k) {
    u32 key = threshold<false>(slice, s, most, least, least, listed, best, [](float) { return 1.0f; },
                               [&](u64 sum) { return min(sum, (u64)f.top_k); }, keep);
    if (listed >= 0 && !first_block) return;
    least = from_ordered(key);
  }
  if (top_p) {
    bool whole_sum = top_k || listed < 0;  // of what it goes over
    float bottom = fmaxf(least, lightest);
    // All tokens below the floor together have less than 1 - p of the best one's mass.
    float floor = listed >= 0 ? bottom : fmaxf(bottom, most - LOG2_E * __logf(vocab / (1 - f.top_p)) / base2);
    u32 key = threshold<true>(slice, s, most, floor, bottom, listed, best, mass,
                              [&](u64 sum) { return whole_sum ? part_of(sum) : s.target; }, keep);
    if (listed >= 0 && !first_block) return;
    least = from_ordered(key);
  }
  if (listed >= 0) {
    for_each(slice, s, listed, least, [&](float value, int token) {
      uint4 words = noise_of(f, token / 4);
      u32 word = token % 4 == 0 ? words.x : token % 4 == 1 ? words.y : token % 4 == 2 ? words.z : words.w;
      best = better(best, Best{fmaf(value, inverse, gumbel(word)), token});
    });
  } else {
    // All lanes of a warp go round equally often, as in sample.cu.
    for_each_four<true, HELD ? 1 : 4>(slice, [&](const float4& four, int v) {
      if (!__any_sync(~0u, most_of(four) >= least)) return;
      float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (!(values[j] >= least)) values[j] = -INF;
      keep(values, v);
    });
    if (CLUSTER > 1) {
      leave(s, best);
      meet_cluster();
      if (first_block) take(s, best);
      meet_cluster();
      if (!first_block) return;
    }
  }
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
