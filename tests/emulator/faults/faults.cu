// One fault a kernel, each of which the emulator must name; and a few that are right.
#include "barrier.cuh"

extern __shared__ uint4 shared[];

// Thread i stores the number of its neighbour, by shared memory.
extern "C" __global__ void neighbours(int* out) {
  __shared__ int numbers[64];
  numbers[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = numbers[(threadIdx.x + 33) % 64];
}
extern "C" __global__ void neighbours_in_a_hurry(int* out) {
  __shared__ int numbers[64];
  numbers[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = numbers[(threadIdx.x + 33) % 64];
}

// Warp 0 hands over a number, warp 1 hands it back doubled, 5 times, by two barriers whose phases take turns.
extern "C" __global__ void ping_pong(int* out) {
  __shared__ u64 given, returned;
  __shared__ int number;
  if (threadIdx.x == 0) barrier_init(&given, 32), barrier_init(&returned, 32), number = 1;
  __syncthreads();
  for (int i = 0; i < 5; i++) {
    if (threadIdx.x < 32) {
      barrier_arrive(&given);
      barrier_wait(&returned, i % 2);
    } else {
      barrier_wait(&given, i % 2);
      if (threadIdx.x == 32) number *= 2;
      __syncwarp();
      barrier_arrive(&returned);
    }
  }
  if (threadIdx.x == 0) *out = number;
}
extern "C" __global__ void nobody_arrives(int* out) {
  __shared__ u64 barrier;
  if (threadIdx.x == 0) barrier_init(&barrier, 33);
  __syncthreads();
  if (threadIdx.x < 32) barrier_arrive(&barrier);
  barrier_wait(&barrier, 0);
}
extern "C" __global__ void no_barrier(int* out) {
  __shared__ u64 barrier;
  barrier_arrive(&barrier);
}

extern "C" __global__ void beyond_shared_memory(int* out) { reinterpret_cast<int*>(shared)[threadIdx.x + 1] = 1; }
extern "C" __global__ void beyond_the_tensor(int* out) { out[threadIdx.x + 1] = 1; }
extern "C" __global__ void beyond_an_array(int* out) {
  __shared__ int numbers[63];
  numbers[threadIdx.x] = 1;
}

extern "C" __global__ void a_lane_leaves(int* out) {
  if (threadIdx.x == 37) return;
  __syncwarp();
}
extern "C" __global__ void lanes_part(int* out) {
  if (threadIdx.x == 37) __syncwarp();
  else out[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
}
extern "C" __global__ void a_warp_waits_for_a_block_that_waits_for_it(int* out) {
  if (threadIdx.x == 3) __syncthreads();
  __syncwarp();
  __syncthreads();
}

extern "C" __global__ void misaligned_load(const int* from) { shared[threadIdx.x] = *reinterpret_cast<const uint4*>(from + 1); }
extern "C" __global__ void misaligned_copy(const int* from) {
  copy16(shared + threadIdx.x, from + 1, true);
  end_group();
  copies_done<0>();
}
extern "C" __global__ void copies_under_way(const int* from) {
  copy16(shared + threadIdx.x, from, true);
  end_group();
  copies_done<1>();
}
extern "C" __global__ void source_changes(int* from) {
  copy16(shared + threadIdx.x, from, true);
  end_group();
  from[1] += 1;
  copies_done<0>();
}
// 16 bytes by copy16, read after as many groups as are said to be done.
extern "C" __global__ void reads_a_copy(const int4* from, int4* out, int waits) {
  copy16(shared + threadIdx.x, from + threadIdx.x, true);
  end_group();
  if (waits) copies_done<0>();
  out[threadIdx.x] = reinterpret_cast<int4*>(shared)[threadIdx.x];
  copies_done<0>();
}
