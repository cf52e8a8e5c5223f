// Warpgroup products of sm_90a and the barriers that go with them. tests/emulator/cuda/wgmma.cuh has the same functions in plain C++.
//
// Operands in shared memory are panels of 64 columns: rows of 128 bytes, whose 16-byte pieces are exchanged within eight rows (the
// 128-byte swizzle), on a multiple of 1,024 bytes.
#pragma once
#include "barrier.cuh"

// Where piece `chunk` (of 8) of a panel's row lies, in 16-byte vectors.
__device__ __forceinline__ int panel_place(int row, int chunk) { return row * 8 + (chunk ^ (row & 7)); }

// A panel as an operand whose sum runs along its rows (Q, K), or down its columns (V): `next_panel` bytes on are the next 64 columns.
__device__ __forceinline__ u64 operand(const void* panel, int next_panel = 16) {
  return (u64)(shared_address(panel) >> 4 & 0x3fff) | (u64)(next_panel >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

#define F8(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define F32(c, i) F8(c, i), F8(c, i + 8), F8(c, i + 16), F8(c, i + 24)
#define NAMES_0_31 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_32_63 \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define TYPES "f32." MMA_TYPE "." MMA_TYPE

// c[64 x 128] or [64 x 64] (+)= a[64 x 16] b[128 or 64 x 16]^T, both in shared memory, the sum along their rows. A thread's c[4 j + 2 h + e] is row
// 16 * warp + 8 h + lane / 4 and column 8 j + lane % 4 * 2 + e.
__device__ __forceinline__ void multiply_rows(float (&c)[64], u64 a, u64 b, bool add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16." TYPES " {" NAMES_0_31 "," NAMES_32_63
               "}, %64, %65, p, 1, 1, 0, 0;}"
               : F32(c, 0), F32(c, 32)
               : "l"(a), "l"(b), "r"((int)add));
}
__device__ __forceinline__ void multiply_rows(float (&c)[32], u64 a, u64 b, bool add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16." TYPES " {" NAMES_0_31
               "}, %32, %33, p, 1, 1, 0, 0;}"
               : F32(c, 0)
               : "l"(a), "l"(b), "r"((int)add));
}
// c[64 x 64] or [64 x 128] += a[64 x 16] b[16 x 64 or 128], a in registers as four pairs (rows g, g + 8, then 8 columns on), b in
// shared memory, the sum down its columns.
__device__ __forceinline__ void multiply_columns(float (&c)[32], const u32 (&a)[4], u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16." TYPES " {" NAMES_0_31 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
               : F32(c, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void multiply_columns(float (&c)[64], const u32 (&a)[4], u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16." TYPES " {" NAMES_0_31 "," NAMES_32_63 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
               : F32(c, 0), F32(c, 32)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Sums that products have added to in the background: nothing that reads them may stand before this.
template <int COUNT>
__device__ __forceinline__ void settled(float (&c)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(c[i])::"memory");
}

// What this thread stored into shared memory is seen by products that start after the next barrier.
__device__ __forceinline__ void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of the hardware, by its number, for `threads` threads of the block: who waits has arrived, too.
__device__ __forceinline__ void meet_at(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
__device__ __forceinline__ void arrive_at(int barrier, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

template <int REGISTERS>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
