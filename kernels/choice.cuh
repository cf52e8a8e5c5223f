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

// 2^32 times a chance that noise -log(-log(u)) is at least what a token of logit `most` needs to come up to `bound`; never too small.
// So a token can do it only where 2^32 (1 - u), which is ~word + 0.5, is at most that: 1 - u < -log(u) = exp(-noise).
__device__ __forceinline__ float reach(float most, float inverse, float bound) {
  float spare = fmaf(fabsf(bound), 2.4e-7f, 2e-3f);  // for what rounding and logarithms may be off
  return exp2_fast(fmaf(fmaf(most, inverse, -bound) + spare, LOG2_E, 32.0f));
}

// Of four neighbouring tokens from `token` on, those with x > -inf compete by x / T + noise. `bound`: what someone of the warp has
// reached at least; it rises. All lanes call it together. Most tokens are out after a comparison of random words, the few others after
// a rough logarithm, so that a handful of a row cost an exact one; far below the bound not even the words are drawn.
__device__ __forceinline__ void compete(Best& best, float& bound, const float (&x)[4], int token, const RowFields& f, float inverse) {
  float rough[4], reached = NOTHING.value;
  u32 words[4];
#pragma unroll
  for (int j = 0; j < 4; j++) rough[j] = -INF;
  float within = reach(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])), inverse, bound);
  if (within >= 0.5f) {
    uint4 four = noise_of(f, token / 4);
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    u32 least = ~__float2uint_rz(within);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (words[j] < least || !(x[j] > -INF)) continue;
      // Rounding is monotonic, so what is below the bound with 1e-3 to spare is below it exactly.
      float noise = rough_gumbel(words[j]);
      rough[j] = fmaf(x[j], inverse, noise + 1e-3f);
      reached = fmaxf(reached, fmaf(x[j], inverse, noise - 1e-3f));
    }
  }
  if (__any_sync(~0u, reached > bound)) bound = fmaxf(bound, from_ordered(__reduce_max_sync(~0u, ordered(reached))));
#pragma unroll
  for (int j = 0; j < 4; j++)
    if (rough[j] >= bound) best = better(best, Best{fmaf(x[j], inverse, gumbel(words[j])), token + j});
}

__device__ __forceinline__ void decide(Best best, u32 raw, int* chosen, int* status) {
  bool broken = raw & 1 || !(raw & 2), empty = best.token == NOTHING.token;
  *status = broken ? NAN_STATUS : empty ? EMPTY_STATUS : 0;
  *chosen = broken || empty ? 0 : best.token;
}
