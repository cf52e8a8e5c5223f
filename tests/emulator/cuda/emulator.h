// CUDA C++ on a CPU: what a kernel's source finds instead of nvcc's built-ins, and what it asks of device.cpp.
//
// A thread of a block is a fiber with a stack of its own. It runs until it has to wait for others; which one runs next is drawn at random, so
// that what a kernel leaves to chance goes wrong sooner or later.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

typedef unsigned int u32;
typedef unsigned long long u64;

namespace emulator {

// As library.py lays it out. kinds: of each argument `p` for an address or a 64-bit number, `i` int, `f` float.
struct Launch {
  int grid[3], threads, shared_bytes;
  u32 seed;
  int count;
  const void* const* arguments;
  const char* kinds;  // and `m` for a Tensor, of whose 128 bytes the address is given
  void (*previous)(int ended);  // null, or told whether what stood before has ended: 0 where blocks start, 1 where they wait for it
};

// Runs all blocks. Null, or what went wrong.
const char* run(const char* kernel, const Launch& launch, int cluster, void (*body)(const Launch&), char* statics, char* statics_end);

[[noreturn]] void fail(const char* format, ...);  // ends the launch with this error
void check_alignment(const void* at, size_t bytes);

void copy(void* to, const void* from);  // 16 bytes to shared memory, zeros from null
void end_group();
void wait_for_copies(int pending);
void wait_for_previous();
void after_atomic(const void* at);  // on global memory: for a while other blocks may go on

// Each lane of the warp leaves `mine`; the last to come calls all(32 lanes); each goes on with what stands in its place then.
void* open_meeting();
bool last_to_meet(const char* what);  // false: another lane was the last one, and the meeting is over
void close_meeting();
int lane();
template <typename T, typename All>
T meet(const char* what, T mine, All all) {
  static_assert(sizeof(T) <= 64, "a warp has room for 64 bytes a lane");
  T* lanes = static_cast<T*>(open_meeting());
  lanes[lane()] = mine;
  if (last_to_meet(what)) {
    all(lanes);
    close_meeting();
  }
  return lanes[lane()];
}
void meet_block();

void cluster_arrive();
void cluster_wait();
void read_of_block(void* to, const void* mine, size_t bytes, u32 rank);  // what the cluster's block of this rank has there

void barrier_init(u64* barrier, int arrivals);
void barrier_arrive(u64* barrier);
void barrier_wait(u64* barrier, int parity);
void barrier_expect(u64* barrier, int bytes);             // arrives, and so many bytes must come before the phase ends
void arrive_at(int barrier, int threads, bool waits);     // of the hardware's sixteen

// A product of a warpgroup, 64 rows by 2 * count columns by 16: what this thread has of it (products.cpp).
struct Product {
  float* sums;
  int count;
  u64 a;                 // as wgmma.cuh's operand, or
  const u32* registers;  // four of them
  u64 b;
  bool columns;          // the sum runs down b's columns
  bool add;
  float (*element)(unsigned short bits);
};
u64 shared_offset(const void* at);
void multiply(const Product& product);
void products_begin();
void products_commit();
void products_wait(int pending);

// What the tensor memory accelerator knows of a tensor of 16-bit elements: the innermost dimension first. As library.py lays it out.
struct Tensor {
  const char* begin;
  int rank, box[5];
  u64 sizes[5], strides[5];  // in elements
};
static_assert(sizeof(Tensor) <= 128, "it travels as a TensorMap");
void fetch(void* to, const void* tensor, u64* barrier, const int* at, int rank);

extern char dynamic_shared[];

template <typename P>
P argument(const Launch& launch, int i) {
  char kind = launch.kinds[i], wanted = std::is_floating_point<P>::value ? 'f' : sizeof(P) == 4 ? 'i' : sizeof(P) == 128 ? 'm' : 'p';
  if (kind != wanted) fail("argument %d is of kind %c, the kernel takes %c", i, kind, wanted);
  P value;
  memcpy(&value, launch.arguments[i], sizeof value);
  return value;
}
template <typename... P, size_t... I>
void call(void (*kernel)(P...), const Launch& launch, std::index_sequence<I...>) {
  if (launch.count != sizeof...(P)) fail("%d arguments, the kernel takes %d", launch.count, (int)sizeof...(P));
  kernel(argument<P>(launch, I)...);
}
template <typename... P>
void call(void (*kernel)(P...), const Launch& launch) { call(kernel, launch, std::index_sequence_for<P...>{}); }

}  // namespace emulator

// The linker's names for where a library's variables without a value lie. A kernel's library has none but those in shared memory.
extern "C" char __bss_start[] __attribute__((visibility("hidden")));
extern "C" char _end[] __attribute__((visibility("hidden")));

#define EMULATE(kernel)                                                                                            \
  extern "C" __attribute__((visibility("default"))) const char* emulate_##kernel(const emulator::Launch* launch) { \
    auto body = [](const emulator::Launch& launch) { emulator::call(kernel, launch); };                            \
    return emulator::run(#kernel, *launch, EMULATED_CLUSTER, body, __bss_start, _end);                               \
  }

#define __global__
#define __grid_constant__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(x, y, z)
#define __align__(bytes) alignas(bytes)
#define __shared__ static

struct Place {
  unsigned x, y, z;
};
extern Place threadIdx, blockIdx, gridDim, blockDim;

struct alignas(8) float2 { float x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { u32 x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

template <typename To, typename From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline float __uint_as_float(u32 x) { return same_bits<float>(x); }
inline u32 __float_as_uint(float x) { return same_bits<u32>(x); }
inline float __fadd_rz(float a, float b) {
  double sum = (double)a + b;  // exact but for floats far apart
  float near = (float)sum;
  return std::fabs((double)near) > std::fabs(sum) ? nextafterf(near, 0.0f) : near;
}
inline u32 __float2uint_rz(float x) { return x >= 4294967296.0f ? ~0u : x > 0 ? (u32)x : 0; }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline u32 __umulhi(u32 a, u32 b) { return (u64)a * b >> 32; }
inline u32 __byte_perm(u32 low, u32 high, u32 pick) {
  u64 bytes = (u64)high << 32 | low;
  u32 out = 0;
  for (int i = 0; i < 4; i++) out |= (u32)(bytes >> 8 * (pick >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}
#define __expf expf
#define __logf logf
#define rsqrtf(x) (1.0f / sqrtf(x))
template <typename T> constexpr T min(T a, T b) { return b < a ? b : a; }
template <typename T> constexpr T max(T a, T b) { return a < b ? b : a; }

template <typename T>
T __ldcg(const T* from) {
  emulator::check_alignment(from, sizeof(T));
  return *from;
}

// Fibers take turns only where they wait, so each of these is indivisible.
template <typename T, typename Change>
T atomic(T* at, Change change) {
  T old = *at;
  *at = change(old);
  emulator::after_atomic(at);
  return old;
}
template <typename T, typename V> T atomicAdd(T* at, V x) { return atomic(at, [=](T old) { return old + (T)x; }); }
template <typename T, typename V> T atomicOr(T* at, V x) { return atomic(at, [=](T old) { return old | (T)x; }); }
template <typename T, typename V> T atomicMin(T* at, V x) { return atomic(at, [=](T old) { return min(old, (T)x); }); }
template <typename T, typename V> T atomicMax(T* at, V x) { return atomic(at, [=](T old) { return max(old, (T)x); }); }
template <typename T, typename V> T atomicExch(T* at, V x) { return atomic(at, [=](T) { return (T)x; }); }
inline u32 atomicInc(u32* at, u32 most) { return atomic(at, [=](u32 old) { return old < most ? old + 1 : 0; }); }
inline void __threadfence() {}

inline void __syncthreads() { emulator::meet_block(); }
inline void check_mask(u32 mask) {
  if (mask != ~0u) emulator::fail("a meeting of part of a warp (mask %08x) is not emulated", mask);
}
inline void __syncwarp(u32 mask = ~0u) {
  check_mask(mask);
  emulator::meet("__syncwarp", 0, [](int*) {});
}
template <typename T>
struct Sent {
  T value;
  int from;
};
// The value of lane `from`.
template <typename T>
T shuffle(const char* what, u32 mask, T value, int from) {
  check_mask(mask);
  Sent<T> mine{value, from & 31};
  return emulator::meet(what, mine, [](Sent<T>* lanes) {
    T sent[32];
    for (int i = 0; i < 32; i++) sent[i] = lanes[i].value;
    for (int i = 0; i < 32; i++) lanes[i].value = sent[lanes[i].from];
  }).value;
}
template <typename T, typename Merge>
T reduce(const char* what, u32 mask, T mine, Merge merge) {
  check_mask(mask);
  return emulator::meet(what, mine, [&](T* lanes) {
    for (int i = 1; i < 32; i++) lanes[0] = merge(lanes[0], lanes[i]);
    for (int i = 1; i < 32; i++) lanes[i] = lanes[0];
  });
}
template <typename T> T __shfl_sync(u32 mask, T x, int from) { return shuffle("__shfl", mask, x, from); }
template <typename T> T __shfl_xor_sync(u32 mask, T x, int d) { return shuffle("__shfl_xor", mask, x, emulator::lane() ^ d); }
template <typename T> T __shfl_up_sync(u32 mask, T x, int d) { return shuffle("__shfl_up", mask, x, emulator::lane() < d ? emulator::lane() : emulator::lane() - d); }
template <typename T> T __reduce_add_sync(u32 m, T x) { return reduce("__reduce_add", m, x, [](T a, T b) { return a + b; }); }
template <typename T> T __reduce_or_sync(u32 m, T x) { return reduce("__reduce_or", m, x, [](T a, T b) { return a | b; }); }
template <typename T> T __reduce_min_sync(u32 m, T x) { return reduce("__reduce_min", m, x, [](T a, T b) { return min(a, b); }); }
template <typename T> T __reduce_max_sync(u32 m, T x) { return reduce("__reduce_max", m, x, [](T a, T b) { return max(a, b); }); }
inline int __any_sync(u32 mask, int x) { return reduce("__any", mask, x, [](int a, int b) { return a || b; }); }
