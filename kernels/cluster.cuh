// Blocks that share a row: CLUSTER of them, one cluster (sm_90 and later). They run at once and read one another's shared memory.
// Where CLUSTER is 1 all of this is about the block itself.
#pragma once
#include "common.cuh"

#if CLUSTER > 1
#define IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#else
#define IN_CLUSTERS
#endif

__device__ __forceinline__ u32 rank_in_cluster() { return blockIdx.x % CLUSTER; }

// What any thread of the cluster has stored before it all of them see behind it. RULES: before the first one no other block's memory is
// read, since that block may not have begun; and behind the last reading stands another one, since a block's memory leaves with it.
__device__ __forceinline__ void meet_cluster() {
  if constexpr (CLUSTER > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
}
__device__ __forceinline__ void meet(bool alone) { alone ? __syncthreads() : meet_cluster(); }

// A variable in shared memory as block `rank` of the cluster has it.
template <typename T>
__device__ __forceinline__ T of_block(const T& mine, u32 rank) {
  if constexpr (CLUSTER > 1)
    return load_of_block(&mine, rank);
  else
    return mine;
}
