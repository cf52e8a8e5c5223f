// What every kernel shares: the element type, 16-byte vectors, warp reductions.
//
// -DFLOAT16 makes the element __half instead of __nv_bfloat16; arithmetic is float32 either way.
#pragma once
#ifdef FLOAT16
#include <cuda_fp16.h>
typedef __half elem;
typedef __half2 elem2;
#define MMA_TYPE "f16"
#else
#include <cuda_bf16.h>
typedef __nv_bfloat16 elem;
typedef __nv_bfloat162 elem2;
#define MMA_TYPE "bf16"
#endif

typedef unsigned int u32;
typedef unsigned long long u64;

#include "ptx.cuh"

__device__ __forceinline__ float2 to_float2(elem2 x) {
#ifdef FLOAT16
  return __half22float2(x);
#else
  return __bfloat1622float2(x);
#endif
}
__device__ __forceinline__ float to_float(elem x) {
#ifdef FLOAT16
  return __half2float(x);
#else
  return __bfloat162float(x);
#endif
}
__device__ __forceinline__ elem to_elem(float x) {
#ifdef FLOAT16
  return __float2half_rn(x);
#else
  return __float2bfloat16_rn(x);
#endif
}
// Two floats as two elements in one register, the first in the low half.
__device__ __forceinline__ u32 pack(float low, float high) {
#ifdef FLOAT16
  elem2 both = __floats2half2_rn(low, high);
#else
  elem2 both = __floats2bfloat162_rn(low, high);
#endif
  return *reinterpret_cast<u32*>(&both);
}

// Eight elements in one 16-byte register quad.
__device__ __forceinline__ void unpack8(uint4 v, float (&out)[8]) {
  const elem2* pairs = reinterpret_cast<const elem2*>(&v);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float2 f = to_float2(pairs[i]);
    out[2 * i] = f.x;
    out[2 * i + 1] = f.y;
  }
}
__device__ __forceinline__ uint4 pack8(const float (&in)[8]) {
  return make_uint4(pack(in[0], in[1]), pack(in[2], in[3]), pack(in[4], in[5]), pack(in[6], in[7]));
}

// Eight elements that gemm_parts left as `splits` (at most MOST_SPLITS) float32 sums, `stride` vectors of four apart: added in their
// order, rounded. All loads are under way before the first sum.
constexpr int MOST_SPLITS = 8;
__device__ __forceinline__ uint4 sum_of_parts(const float4* parts, size_t at, int splits, size_t stride) {
  float4 low[MOST_SPLITS], high[MOST_SPLITS];
#pragma unroll
  for (int s = 0; s < MOST_SPLITS; s++)
    if (s < splits) low[s] = parts[s * stride + 2 * at], high[s] = parts[s * stride + 2 * at + 1];
  float sum[8] = {low[0].x, low[0].y, low[0].z, low[0].w, high[0].x, high[0].y, high[0].z, high[0].w};
#pragma unroll
  for (int s = 1; s < MOST_SPLITS; s++) {
    if (s >= splits) continue;
    sum[0] += low[s].x, sum[1] += low[s].y, sum[2] += low[s].z, sum[3] += low[s].w;
    sum[4] += high[s].x, sum[5] += high[s].y, sum[6] += high[s].z, sum[7] += high[s].w;
  }
  return pack8(sum);
}

constexpr float LOG2_E = 1.4426950408889634f;
#define INF __int_as_float(0x7f800000)

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}
