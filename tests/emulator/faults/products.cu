// One fault of a warpgroup's products or of tiles a kernel, each of which the emulator must name; and one that is right.
#include "tma.cuh"

extern __shared__ __align__(1024) uint4 shared[];

constexpr int PANEL = 64 * 8;  // vectors of 64 rows

// A tile as both operands: out[i] is the product of its row 1 by its row i, 64 elements each.
template <typename Fault>
__device__ __forceinline__ void square(const TensorMap& map, float* out, Fault fault) {
  __shared__ u64 there;
  if (threadIdx.x == 0) barrier_init(&there, 1);
  __syncthreads();
  if (threadIdx.x == 0) barrier_expect(&there, fault.bytes), load_tile(shared, map, &there, 0, 0);
  barrier_wait(&there, 0);
  float c[32] = {};
  u32 registers[4] = {};
  if (fault.begins) products_begin();
  for (int i = 0; i < 4; i++) multiply_rows(c, operand(shared) + i * 2, operand(shared) + i * 2, i > 0);
  multiply_columns(c, registers, operand(shared));
  products_commit();
  fault.under_way(c, registers);
  if (fault.waits) products_wait<0>();
  if (threadIdx.x / 4 == 1)
    for (int j = 0; j < 8; j++)
      for (int e = 0; e < 2; e++) out[8 * j + threadIdx.x % 4 * 2 + e] = c[4 * j + e];
}
struct Right {
  int bytes = PANEL * 16;
  bool begins = true, waits = true;
  __device__ void under_way(float (&)[32], u32 (&)[4]) const {}
};

extern "C" __global__ void squares(const __grid_constant__ TensorMap map, float* out) { square(map, out, Right{}); }

extern "C" __global__ void more_bytes_than_expected(const __grid_constant__ TensorMap map, float* out) {
  Right fault;
  fault.bytes = 128;
  square(map, out, fault);
}
extern "C" __global__ void fewer_bytes_than_expected(const __grid_constant__ TensorMap map, float* out) {
  Right fault;
  fault.bytes *= 2;
  square(map, out, fault);
}
extern "C" __global__ void does_not_begin(const __grid_constant__ TensorMap map, float* out) {
  Right fault;
  fault.begins = false;
  square(map, out, fault);
}
extern "C" __global__ void products_under_way(const __grid_constant__ TensorMap map, float* out) {
  Right fault;
  fault.waits = false;
  square(map, out, fault);
}
struct Sums : Right {
  __device__ void under_way(float (&c)[32], u32 (&)[4]) const { c[5] = 0; }
};
extern "C" __global__ void sums_change(const __grid_constant__ TensorMap map, float* out) { square(map, out, Sums{}); }
struct Registers : Right {
  __device__ void under_way(float (&)[32], u32 (&registers)[4]) const { registers[2] = 1; }
};
extern "C" __global__ void registers_change(const __grid_constant__ TensorMap map, float* out) { square(map, out, Registers{}); }

extern "C" __global__ void lanes_differ(const __grid_constant__ TensorMap map, float* out) {
  float c[32] = {};
  products_begin();
  multiply_rows(c, operand(shared) + threadIdx.x % 2, operand(shared), false);
  products_commit();
  products_wait<0>();
}
extern "C" __global__ void beyond_the_end(const __grid_constant__ TensorMap map, float* out) {
  float c[32] = {};
  products_begin();
  multiply_rows(c, operand(shared) + PANEL, operand(shared), false);
  products_commit();
  products_wait<0>();
}
extern "C" __global__ void a_tile_on_its_way(const __grid_constant__ TensorMap map, float* out) {
  __shared__ u64 there;
  if (threadIdx.x == 0) barrier_init(&there, 1), barrier_expect(&there, PANEL * 16), load_tile(shared, map, &there, 0, 0);
}
extern "C" __global__ void other_dimensions(const __grid_constant__ TensorMap map, float* out) {
  __shared__ u64 there;
  if (threadIdx.x == 0) barrier_init(&there, 1), load_tile_4d(shared, map, &there, 0, 0);
}
extern "C" __global__ void numbers_differ(const __grid_constant__ TensorMap map, float* out) { meet_at(3, threadIdx.x < 32 ? 64 : 128); }
extern "C" __global__ void too_few_meet(const __grid_constant__ TensorMap map, float* out) {
  if (threadIdx.x < 96) meet_at(3, 128);
}
