// A block's slice of a row of logits: visited where it lies, or held in shared memory.
#pragma once
#include "common.cuh"

// With clusters: the slice where it is held; in a block that goes on alone the lists of all (threshold.cuh).
extern __shared__ float4 held[];

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
  const float* x = HELD ? reinterpret_cast<const float*>(held) : slice.x;
  for (int done = 0; done < count; done += STRIDE) {
    int first = BACK ? (count - 1) / STRIDE * STRIDE - done : done;
    float4 four[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      int v = first + (i * WIDE + threadIdx.x) * 4;
      four[i] = v < count ? *reinterpret_cast<const float4*>(x + v) : make_float4(-INF, -INF, -INF, -INF);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      int v = first + (i * WIDE + threadIdx.x) * 4;
      if (!HELD && v + 1 >= count) four[i].y = -INF;
      if (!HELD && v + 2 >= count) four[i].z = -INF;
      if (!HELD && v + 3 >= count) four[i].w = -INF;
      visit(four[i], slice.first + v);
    }
  }
}
__device__ __forceinline__ float most_of(const float4& four) { return fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w)); }

// Copies the slice into shared memory and visits it on the way, what has arrived while the rest comes.
template <typename Visit>
__device__ __forceinline__ void hold(const Slice<true>& slice, Visit visit) {
  constexpr int GROUPS = 4, STEP = WIDE * 4;
  float* to = reinterpret_cast<float*>(held);
  int each = (slice.count + STEP * GROUPS - 1) / (STEP * GROUPS) * STEP;
  for (int g = 0; g < GROUPS; g++) {
    for (int v = g * each + threadIdx.x * 4; v < min(slice.count, (g + 1) * each); v += STEP) copy16_streaming(to + v, slice.x + v);
    end_group();
  }
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    if (g == 0) copies_done<3>();
    if (g == 1) copies_done<2>();
    if (g == 2) copies_done<1>();
    if (g == 3) copies_done<0>();
    for (int v = g * each + threadIdx.x * 4; v < min(slice.count, (g + 1) * each); v += STEP) {
      float4 four = *reinterpret_cast<const float4*>(to + v);
      if (v + 3 >= slice.count) {
        if (v + 1 >= slice.count) four.y = -INF;
        if (v + 2 >= slice.count) four.z = -INF;
        four.w = -INF;
        *reinterpret_cast<float4*>(to + v) = four;  // as all passes see it
      }
      visit(four, slice.first + v);
    }
  }
}
