// Every instruction of PTX that has no name in CUDA C++, but for mbarriers (barrier.cuh) and those of sm_90a (wgmma.cuh, tma.cuh).
// Included by common.cuh, which says what the elements are.
//
// tests/emulator/cuda/ptx.cuh has the same functions in plain C++, for the tests that run these kernels without a GPU.
#pragma once

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes from device to shared memory that no register waits for (cp.async, past L1). Plain loads that are meant to be in flight early
// are sunk by the assembler to their first use, past any wait; these stay where they are written. Zeros where `valid` is false: nothing
// is read then. A thread that reads back only what it copied itself needs no barrier, just copies_done.
__device__ __forceinline__ void copy16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// The same for data that is read in long runs: the cache fetches the rest of the 128-byte line along with it.
__device__ __forceinline__ void copy16_streaming(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING>
__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// A load that stays where it is written, through L1; `arrived_in` is where its register must have come.
__device__ __forceinline__ void load_word(u32& word, const void* from) { asm volatile("ld.global.ca.u32 %0, [%1];" : "=r"(word) : "l"(from)); }
__device__ __forceinline__ void arrived_in(u32 word) { asm volatile("" ::"r"(word)); }

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
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

// Clusters (sm_90 and later). Who waits for its cluster has arrived before; what was stored before arriving is seen behind the wait.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// The address of a variable in shared memory, in the block `rank` of the cluster; and what stands there.
__device__ __forceinline__ u32 address_in_block(const void* mine, u32 rank) {
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(mine)), "r"(rank));
  return there;
}
__device__ __forceinline__ u32 load_of_block(const u32* mine, u32 rank) {
  u32 word;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(word) : "r"(address_in_block(mine, rank)) : "memory");
  return word;
}
__device__ __forceinline__ u64 load_of_block(const u64* mine, u32 rank) {
  u64 word;
  asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(word) : "r"(address_in_block(mine, rank)) : "memory");
  return word;
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

// Four 8x8 matrices of elements from shared memory, lane i naming row i % 8 of matrix i / 8; a lane gets two neighbours of row lane / 4 of
// each. Transposed: of column lane / 4.
__device__ __forceinline__ uint4 load_matrices(const uint4* at) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(shared_address(at)));
  return v;
}
__device__ __forceinline__ uint4 load_matrices_transposed(const uint4* at) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(shared_address(at)));
  return v;
}
