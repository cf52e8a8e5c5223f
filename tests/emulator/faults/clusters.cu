// One fault of a cluster of blocks a kernel, each of which the emulator must name; and one that is right.
#include "cluster.cuh"

// Thread i of a block stores the number that its neighbour of the other block has left.
template <bool MEETS, bool STAYS>
__device__ __forceinline__ void exchange(int* out) {
  __shared__ u32 numbers[64];
  u32 rank = rank_in_cluster();
  numbers[threadIdx.x] = blockIdx.x * 64 + threadIdx.x;
  meet_cluster();
  if (!MEETS) numbers[threadIdx.x] += 1000;
  __syncthreads();
  if (STAYS || rank == 0)
    for (int i = 0; i < (STAYS ? 1 : 1000); i++) out[blockIdx.x * 64 + threadIdx.x] = of_block(numbers[(threadIdx.x + 33) % 64], rank ^ 1);
  if (STAYS) meet_cluster();
}
extern "C" __global__ void IN_CLUSTERS neighbours_of_a_cluster(int* out) { exchange<true, true>(out); }
extern "C" __global__ void IN_CLUSTERS neighbours_of_a_cluster_in_a_hurry(int* out) { exchange<false, true>(out); }
extern "C" __global__ void IN_CLUSTERS a_block_leaves(int* out) { exchange<true, false>(out); }

extern "C" __global__ void IN_CLUSTERS too_early(int* out) {
  __shared__ u32 number;
  *out = of_block(number, 1);
}
extern "C" __global__ void IN_CLUSTERS no_such_block(int* out) {
  __shared__ u32 number;
  meet_cluster();
  *out = of_block(number, 2);
}
extern "C" __global__ void IN_CLUSTERS not_shared(int* out) {
  meet_cluster();
  out[1] = of_block(*reinterpret_cast<u32*>(out), 1);
}
extern "C" __global__ void IN_CLUSTERS arrives_twice(int* out) {
  cluster_arrive();
  cluster_arrive();
}
extern "C" __global__ void IN_CLUSTERS does_not_arrive(int* out) { cluster_wait(); }
extern "C" __global__ void IN_CLUSTERS does_not_wait(int* out) { cluster_arrive(); }
extern "C" __global__ void IN_CLUSTERS a_thread_waits_for_its_block_only(int* out) {
  if (threadIdx.x == 3) __syncthreads();
  else meet_cluster();
}
