// What every kernel shares: the element type, 16-byte vectors, warp reductions, programmatic dependent launch.
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

// 16 bytes from device to shared memory that no register waits for (cp.async, past L1). Plain loads that are meant to be in flight early
// are sunk by the assembler to their first use, past any wait; these stay where they are written. Zeros where `valid` is false: nothing
// is read then. A thread that reads back only what it copied itself needs no barrier, just copies_done.
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void copy16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
// The same for data that is read in long runs: the cache fetches the rest of the 128-byte line along with it.
__device__ __forceinline__ void copy16_streaming(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING>
__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
constexpr float LOG2_E = 1.4426950408889634f;
#define INF __int_as_float(0x7f800000)

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// Programmatic dependent launch (sm_90 and later): the next kernel of the stream may start while this one runs, and waits itself
// before it touches what this one writes. RULE: every kernel calls both, in this order, and neither reads what an earlier kernel
// wrote nor writes anything before the wait. So each kernel's end implies the end of all before it. (The exceptions are
// prefix_attention and decode_attention, before which a kernel must stand that calls them in the other order.)
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// c[16x8] += a[16x16] b[16x8], float32 accumulators. With g = lane / 4 and t = lane % 4 a lane holds
//   a: rows g (a.x, a.z) and g+8 (a.y, a.w), columns 2t,2t+1 (a.x, a.y) and 2t+8,2t+9 (a.z, a.w)
//   b: column g, rows 2t,2t+1 (b0) and 2t+8,2t+9 (b1)
//   c: rows g (c[0], c[1]) and g+8 (c[2], c[3]), columns 2t, 2t+1
__device__ __forceinline__ void mma(float (&c)[4], uint4 a, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
