// Philox4x32-10 (Salmon et al., SC 2011), as worker/sampling/philox.py has it: noise is a function of (seed, output index, token).
#pragma once
#include "common.cuh"

__device__ __forceinline__ uint4 philox(u32 c0, u32 c1, u32 c2, u32 c3, u32 k0, u32 k1) {
#pragma unroll
  for (int i = 0; i < 10; i++) {
    u32 high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0, high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// -log(-log(u)) for u = (word + 0.5) / 2^32. Near 1 u itself would round to 1, so 1 - u is formed from the complement.
__device__ __forceinline__ float gumbel(u32 word) {
  constexpr float UNIT = 2.3283064365386963e-10f;
  float exponential = word >> 31 ? -log1pf(-((float)~word + 0.5f) * UNIT) : -logf(((float)word + 0.5f) * UNIT);
  return -logf(exponential);
}
