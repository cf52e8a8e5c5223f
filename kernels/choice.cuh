// What the kernels that choose a token share: the better of two, noise, the end of a row.
#pragma once
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

// Ascending with x, without gaps between negative and positive.
__device__ __forceinline__ u32 ordered(float x) {
  u32 bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(u32 key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// Rough -log(-log(u)) of gumbel(word), less than 1e-3 off: two instructions of the special function unit for some forty.
__device__ __forceinline__ float rough_gumbel(u32 word) {
  constexpr float UNIT = 2.3283064365386963e-10f;
  float t = ((float)~word + 0.5f) * UNIT;  // 1 - u
  return -__logf(t < 0.0078125f ? t * fmaf(0.5f, t, 1.0f) : -__logf(((float)word + 0.5f) * UNIT));
}

// Of four neighbouring tokens from `token` on, those with x > -inf compete: by x, or by x / T + noise where there is a temperature.
// `bound`: what someone of the same row has reached already; who can't reach it is not worth an exact logarithm.
__device__ __forceinline__ void compete(Best& best, const float (&x)[4], int token, const RowFields& f, float inverse, float bound) {
  float values[4];
  if (f.temperature > 0) {
    uint4 four = noise_of(f, token / 4);
    u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      values[j] = -INF;
      // Rounding is monotonic, so what is below the bound with 1e-3 to spare is below it exactly.
      if (x[j] > -INF && fmaf(x[j], inverse, rough_gumbel(words[j]) + 1e-3f) >= bound) values[j] = fmaf(x[j], inverse, gumbel(words[j]));
    }
  } else {
#pragma unroll
    for (int j = 0; j < 4; j++) values[j] = x[j];
  }
#pragma unroll
  for (int j = 0; j < 4; j++)
    if (values[j] > -INF) best = better(best, Best{values[j], token + j});
}
// The best value of the warp so far.
__device__ __forceinline__ float warp_bound(Best best) { return from_ordered(__reduce_max_sync(~0u, ordered(best.value))); }

__device__ __forceinline__ void decide(Best best, u32 raw, int* chosen, int* status) {
  bool broken = raw & 1 || !(raw & 2), empty = best.token == NOTHING.token;
  *status = broken ? NAN_STATUS : empty ? EMPTY_STATUS : 0;
  *chosen = broken || empty ? 0 : best.token;
}
