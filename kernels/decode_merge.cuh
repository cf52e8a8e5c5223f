// From the slots of an item to the row's output: what decode_attention.cu does once its warps have stored what they summed up.
//
// A warp merges whole query heads, and waits for nobody: it reads what all warps have stored, and of several blocks that share a row
// the last one to come adds up the splits, each head for itself.
#pragma once
#include "decode_items.cuh"

// A part's result: HEAD_DIM unnormalised sums, then their maximum (base 2) and the sum of their weights.
constexpr int PARTIAL = HEAD_DIM + 2;
constexpr int PAIRS = HEAD_DIM / 64;  // of a lane: columns 64 k + 2 lane, + 1

struct Result {
  float maximum = -INF, sum = 0;
  float2 value[PAIRS] = {};

  // One part more, as the online softmax adds keys.
  __device__ __forceinline__ void add(float2 stats, const float2 (&part)[PAIRS]) {
    float next = fmaxf(maximum, stats.x), base = next == -INF ? 0.0f : next;
    float shrink = exp2_fast(maximum - base), weight = exp2_fast(stats.x - base);
#pragma unroll
    for (int k = 0; k < PAIRS; k++) {
      value[k].x = value[k].x * shrink + part[k].x * weight;
      value[k].y = value[k].y * shrink + part[k].y * weight;
    }
    sum = sum * shrink + stats.y * weight;
    maximum = next;
  }

  // `count` results of one head in device memory, `stride` apart, in their order: MERGE_AHEAD a trip, asked for in fours as far as there
  // are any. Each lane fetches one's maximum and sum, which costs fewer registers.
  __device__ __forceinline__ void add_parts(const float2* parts, int count, size_t stride) {
    int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = 0; first < count; first += MERGE_AHEAD, parts += MERGE_AHEAD * stride) {
      float2 part[MERGE_AHEAD][PAIRS];
      float2 mine = __ldcg(parts + min(lane % MERGE_AHEAD, count - 1 - first) * stride + HEAD_DIM / 2);
#pragma unroll
      for (int four = 0; four < MERGE_AHEAD; four += 4) {
        if (four > 0 && first + four >= count) continue;
#pragma unroll
        for (int i = four; i < four + 4; i++) {
          const float2* from = parts + min(i, count - 1 - first) * stride;
#pragma unroll
          for (int k = 0; k < PAIRS; k++) part[i][k] = __ldcg(from + k * 32 + lane);
        }
      }
#pragma unroll
      for (int four = 0; four < MERGE_AHEAD; four += 4) {
        if (four > 0 && first + four >= count) continue;
#pragma unroll
        for (int i = four; i < four + 4; i++) {
          Result with = *this;  // and no branch, so that all weights are on their way at once
          with.add(make_float2(__shfl_sync(~0u, mine.x, i), __shfl_sync(~0u, mine.y, i)), part[i]);
          if (first + i < count) *this = with;
        }
      }
    }
  }

  __device__ __forceinline__ void store(float2* to) const {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < PAIRS; k++) to[k * 32 + lane] = value[k];
    if (lane == 0) to[HEAD_DIM / 2] = make_float2(maximum, sum);
  }

  __device__ __forceinline__ void write(elem* out) const {
#pragma unroll
    for (int k = 0; k < PAIRS; k++)
      reinterpret_cast<u32*>(out)[k * 32 + threadIdx.x % 32] = pack(value[k].x / sum, value[k].y / sum);
  }
};

// One head of the slots' results in shared memory, `stride` floats apart.
__device__ __forceinline__ Result merge_slots(const float* slots, int stride) {
  int lane = threadIdx.x % 32;
  Result all;
#pragma unroll
  for (int s = 0; s < SLOTS; s++) all.maximum = fmaxf(all.maximum, slots[s * stride + HEAD_DIM]);
  float base = all.maximum == -INF ? 0.0f : all.maximum;
#pragma unroll
  for (int s = 0; s < SLOTS; s++) {
    const float2* slot = reinterpret_cast<const float2*>(slots + s * stride);
    float2 stats = slot[HEAD_DIM / 2];
    float weight = exp2_fast(stats.x - base);
#pragma unroll
    for (int k = 0; k < PAIRS; k++) {
      float2 part = slot[k * 32 + lane];
      all.value[k].x = fmaf(part.x, weight, all.value[k].x);
      all.value[k].y = fmaf(part.y, weight, all.value[k].y);
    }
    all.sum = fmaf(stats.y, weight, all.sum);
  }
  return all;
}

// One head of item `item`, from its slots: to `out`, or to `partials` where other blocks have the row's other splits and have not all come yet. `partials` and `counter` are the head's; STRIDE float2 lie between two items' partials.
template <int STRIDE>
__device__ __forceinline__ void finish_head(Result result, const Item& item, float2* partials, int* counter, elem* out) {
  int splits = item.splits();
  if (splits > 1) {
    result.store(partials + (size_t)(item.first_partial + item.split()) * STRIDE);
    __syncwarp();  // all lanes have stored
    int before = 0;
    if (threadIdx.x % 32 == 0) {
      __threadfence();
      before = atomicInc(reinterpret_cast<u32*>(counter), splits - 1);  // 0 again after the last, for the next layer
      __threadfence();
    }
    if (__shfl_sync(~0u, before, 0) < splits - 1) return;
    __syncwarp();
    result = Result{};
    result.add_parts(partials + (size_t)item.first_partial * STRIDE, splits, STRIDE);
  }
  if (item.prefix > 0) result.add_parts(partials + (size_t)(item.prefix / 32) * STRIDE, item.prefix % 32, STRIDE);
  result.write(out);
}
