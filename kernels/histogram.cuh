// A histogram with sums of 64 bits, in the shared memory of a block or of a cluster's blocks together.
#pragma once
#include "cluster.cuh"

constexpr int BIN_BITS = 10, BINS = 1 << BIN_BITS;

struct Histogram {
  alignas(16) u32 low[BINS], high[BINS];  // a sum is high * 2^32 + low
  u64 groups[32];                         // sums of BINS / 32 bins
  u64 above, target;
  u32 bin;
};

// RULE: behind the last find_bin the block, or the cluster where it took part, has met.
__device__ __forceinline__ void clear(Histogram& h) {
  for (int i = threadIdx.x; i < BINS; i += WIDE) h.low[i] = h.high[i] = 0;
  __syncthreads();
}
__device__ __forceinline__ void add(Histogram& h, u32 bin, u64 weight) {
  u32 part = (u32)weight, before = atomicAdd(&h.low[bin], part);
  u32 carried = (u32)(weight >> 32) + (before + part < before);
  if (carried) atomicAdd(&h.high[bin], carried);
}

__device__ __forceinline__ u64 sum_of(const Histogram& h, u32 bin) { return ((u64)h.high[bin] << 32) + h.low[bin]; }

// Of the lanes up to and with this one.
__device__ __forceinline__ u64 running_sum(u64 sum) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    u64 other = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += other;
  }
  return sum;
}

// With target_of(sum of all bins): h.bin is the first bin at which `above` + the sums up to it reach the target, h.above what lies before
// it, h.target the target. The bins are those of all blocks of the cluster together, or of this block where it is `alone`; every block
// finds the same. Of the others it reads their 32 groups, and the bins of one: there the cluster meets once.
template <typename TargetOf>
__device__ __forceinline__ void find_bin(Histogram& h, bool alone, u64 above, TargetOf target_of) {
  constexpr int LANES = BINS / 32 / 4;  // that share a group
  static_assert(BINS / 32 == 32 && WIDE % 32 == 0, "a lane has one bin of a group");
  __syncthreads();
  for (int i = threadIdx.x; i < BINS / 4; i += WIDE) {
    uint4 low = *reinterpret_cast<const uint4*>(h.low + 4 * i), high = *reinterpret_cast<const uint4*>(h.high + 4 * i);
    u64 sum = (u64)low.x + low.y + low.z + low.w + ((u64)(high.x + high.y + high.z + high.w) << 32);
#pragma unroll
    for (int d = 1; d < LANES; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (i % LANES == 0) h.groups[i / LANES] = sum;
  }
  meet(alone);
  if (threadIdx.x < 32) {
    u32 lane = threadIdx.x, ranks = alone ? 1 : CLUSTER;
    u64 own = 0;
#pragma unroll
    for (u32 r = 0; r < CLUSTER; r++)
      if (r < ranks) own += of_block(h.groups[lane], r);
    u64 sum = running_sum(own), target = target_of(__shfl_sync(~0u, sum, 31)), start = above + sum - own;
    u32 group = __reduce_max_sync(~0u, start < target && start + own >= target ? lane : 0);
    start = __shfl_sync(~0u, start, group);
    u32 bin = group * 32 + lane;
    own = 0;
#pragma unroll
    for (u32 r = 0; r < CLUSTER; r++)
      if (r < ranks) own += ((u64)of_block(h.high[bin], r) << 32) + of_block(h.low[bin], r);
    start += running_sum(own) - own;
    if (start < target && start + own >= target) h.bin = bin, h.above = start, h.target = target;
  }
  __syncthreads();
}
