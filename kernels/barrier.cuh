// Barriers in shared memory (sm_80 and later): who arrives does not wait, and who waits need not have arrived.
#pragma once
#include "common.cuh"

__device__ __forceinline__ void barrier_init(u64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u64* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#else
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0];}" ::"r"(shared_address(barrier)) : "memory");
#endif
}
#if __CUDA_ARCH__ >= 900
#define ASK_BARRIER "mbarrier.try_wait.parity"  // sleeps a while before it says no
#else
#define ASK_BARRIER "mbarrier.test_wait.parity"
#endif
// Waits until the phase of this parity has ended; the one before the first counts as ended, with parity 1.
__device__ __forceinline__ void barrier_wait(u64* barrier, int parity) {
  asm volatile("{.reg .pred done; again: " ASK_BARRIER ".shared::cta.b64 done, [%0], %1; @!done bra again;}" ::"r"(shared_address(barrier)),
               "r"(parity)
               : "memory");
}
