// y[m, n] = sum_k x[m, k] * w[n, k]      for m <= ROWS on sm_90a       w [N, K] row-major, x [M, K]
//   gemm_parts    float32 sums of each of `splits` parts of K: parts [splits, M, N], which the next kernel adds up in their order
//   gemm_float    y in float32, rows `stride` apart (logits)
//   gemm_silu     w holds gate rows, then up rows [2N, K]; y = silu(gate) * up in the element type
//
// Bound by bytes: the weights, read once; x is read by every block from the L2 cache.
// Ladder
//   1. cuBLAS: 15 to 30 % over the bytes at 24 to 64 rows, and the order of K changes with M
//   2. the weights are the M operand, 128 rows of them a block, the rows of x are N, padded to ROWS: a row's result has the same bits
//      for any M and any ROWS
//   3. where N / 128 blocks are too few for the chip, K is split; the sums meet in the kernel that follows anyway (norm or QKV epilogue).
//      (The parts of a tile as a cluster that adds them up in its shared memory: half as fast, since eight blocks must find room at once)
//   4. one thread asks the tensor memory accelerator for whole tiles. (With 16-byte copies by 128 threads a stage was on its way again
//      only a microsecond after it was free: 2.1 TB/s at 64 rows.) A tile of gate_up has eight gate rows and the eight up rows that
//      belong to them in turn, so that a thread holds both
//   5. rings of their own for w and x: what comes from memory takes microseconds and needs twice as many bytes on their way as what
//      comes from the L2 cache, and is asked for before the wait for the previous kernel (this one). (Clusters of two blocks that
//      fetch half of x for each other: as fast alone, slower in a step. Less shared memory where K has few steps, so that
//      weights come while the attention still runs: slower)
#include "tma.cuh"

constexpr int STEP_K = 64;
constexpr int TILE = 128;                              // rows of w of a block, 64 a warpgroup
constexpr int TILE_VECTORS = TILE * 8, X_VECTORS = ROWS * 8;
constexpr int SUMS = ROWS / 2;                         // of a thread
constexpr int THREADS = 320;                           // two warpgroups multiply, one warp fetches w, one x

extern __shared__ __align__(1024) uint4 shared[];      // W_STAGES of w, X_STAGES of x

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int STAGES>
struct Ring {
  u64 full[STAGES], empty[STAGES];

  __device__ __forceinline__ void init() {
    if (threadIdx.x < STAGES) barrier_init(&full[threadIdx.x], 1), barrier_init(&empty[threadIdx.x], 8);
  }
};

// Where one is in a ring.
template <int STAGES>
struct Place {
  int stage = 0, phase = 0;

  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

// One thread: stages 0 to steps - 1, each as soon as it is free. load(to, barrier, n).
template <int STAGES, typename Load>
__device__ __forceinline__ void fill(Ring<STAGES>& ring, uint4* stages, int vectors, int steps, Load load) {
  Place<STAGES> at;
  for (int n = 0; n < steps; n++, at.next()) {
    barrier_wait(&ring.empty[at.stage], at.phase ^ 1);  // the first time round it is
    barrier_expect(&ring.full[at.stage], vectors * 16);
    load(stages + at.stage * vectors, &ring.full[at.stage], n);
  }
}

__device__ __forceinline__ int row_of_thread() { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; }
__device__ __forceinline__ int column_of_thread() { return threadIdx.x % 4 * 2; }

// For each of `tiles` tiles the sums of 128 rows of w for all rows of x over `steps` steps of K: store(c, tile) in the threads of the
// two warpgroups. c[4 j + 2 h + e] belongs to the tile's row row_of_thread() + 8 h and row 8 j + column_of_thread() + e of x. load_w(to, barrier, tile, step). LATE: the next kernel starts when the last weights are asked for.
template <bool LATE, typename LoadW, typename Store>
__device__ __forceinline__ void product(const TensorMap& x, int tiles, int first, int steps, LoadW load_w, Store store) {
  __shared__ Ring<W_STAGES> ring_w;
  __shared__ Ring<X_STAGES> ring_x;
  uint4 *stages_w = shared, *stages_x = shared + W_STAGES * TILE_VECTORS;
  int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  ring_w.init();
  ring_x.init();
  publish_to_products();
  if (!LATE) let_next_start();
  __syncthreads();
  if (threadIdx.x == 256) {
    fill(ring_w, stages_w, TILE_VECTORS, tiles * steps, [&](void* to, u64* barrier, int n) { load_w(to, barrier, n / steps, n % steps); });
    if (LATE) let_next_start();
  } else if (threadIdx.x == 288) {
    wait_for_previous();
    fill(ring_x, stages_x, X_VECTORS, tiles * steps,
         [&](void* to, u64* barrier, int n) { load_tile(to, x, barrier, (first + n % steps) * STEP_K, 0); });
  } else if (group < 2) {
    Place<W_STAGES> of_w;
    Place<X_STAGES> of_x;
    for (int tile = 0; tile < tiles; tile++) {
      float c[SUMS];
      int last_w = -1, last_x = -1;  // stages whose products may still be under way
      auto release = [&] {
        if (last_w >= 0 && threadIdx.x % 32 == 0) barrier_arrive(&ring_w.empty[last_w]), barrier_arrive(&ring_x.empty[last_x]);
      };
      for (int n = 0; n < steps; n++, of_w.next(), of_x.next()) {
        const uint4 *w = stages_w + of_w.stage * TILE_VECTORS + group * 512, *rows = stages_x + of_x.stage * X_VECTORS;
        barrier_wait(&ring_x.full[of_x.stage], of_x.phase);
        barrier_wait(&ring_w.full[of_w.stage], of_w.phase);
        products_begin();
#pragma unroll
        for (int i = 0; i < STEP_K / 16; i++) multiply_rows(c, operand(w) + i * 2, operand(rows) + i * 2, n > 0 || i > 0);
        products_commit();
        products_wait<1>();
        release();
        last_w = of_w.stage, last_x = of_x.stage;
      }
      products_wait<0>();
      release();
      wait_for_previous();  // has long ended, but what is stored next must not come before
      store(c, tile);
    }
  }
}

// Where blocks walk over `tiles` tiles: how many are the block's, and which one its `tile`-th is.
__device__ __forceinline__ int tiles_of_block(int tiles) { return (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x; }
__device__ __forceinline__ int number_of(int tile) { return blockIdx.x + tile * gridDim.x; }

template <typename Put>
__device__ __forceinline__ void each(const float (&c)[SUMS], int m, Put put) {
#pragma unroll
  for (int i = 0; i < SUMS; i++) {
    int of_x = i / 4 * 8 + column_of_thread() + i % 2;
    if (of_x < m) put(of_x, row_of_thread() + i / 2 % 2 * 8, c[i]);
  }
}

#endif

// grid (N / 128, splits)
extern "C" __global__ void __launch_bounds__(THREADS, 1)
gemm_parts(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, float* parts, int n, int k, int m) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  int all = k / STEP_K, first = blockIdx.y * all / gridDim.y, end = (blockIdx.y + 1) * all / gridDim.y;
  float* mine = parts + (size_t)blockIdx.y * m * n + blockIdx.x * TILE;
  product<false>(x, 1, first, end - first,
      [&](void* to, u64* barrier, int, int step) { load_tile(to, w, barrier, (first + step) * STEP_K, blockIdx.x * TILE); },
      [&](const float(&c)[SUMS], int) {
        each(c, m, [&](int of_x, int of_w, float sum) { mine[(size_t)of_x * n + of_w] = sum; });
      });
#endif
}

// Blocks walk over the tiles: the weights of the next one come while this one is stored.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
gemm_float(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, float* y, int tiles, int k, int m, int stride) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  auto row_of = [&](int tile) { return number_of(tile) * TILE; };
  product<false>(x, tiles_of_block(tiles), 0, k / STEP_K,
      [&](void* to, u64* barrier, int tile, int step) { load_tile(to, w, barrier, step * STEP_K, row_of(tile)); },
      [&](const float(&c)[SUMS], int tile) {
        each(c, m, [&](int of_x, int of_w, float sum) { y[(size_t)of_x * stride + row_of(tile) + of_w] = sum; });
      });
#endif
}

// w as [N / 8, 2, 8, K]: eight gate rows, then eight up rows. Blocks walk over the tiles, as in gemm_float.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
gemm_silu(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const elem* __restrict__ bias, elem* y, int n, int k, int m) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  product<true>(x, tiles_of_block(n / 64), 0, k / STEP_K,
      [&](void* to, u64* barrier, int tile, int step) { load_tile_4d(to, w, barrier, step * STEP_K, number_of(tile) * 8); },
      [&](const float(&c)[SUMS], int tile) {
        int row = row_of_thread(), odd = row % 2, at = number_of(tile) * 64 + row / 16 * 8 + row % 8;
        float gate_bias = bias ? to_float(bias[at]) : 0.0f, up_bias = bias ? to_float(bias[n + at]) : 0.0f;
#pragma unroll
        for (int j = 0; j < ROWS / 8; j++) {
          float result[2];
#pragma unroll
          for (int e = 0; e < 2; e++) {
            // Rounded as in matvec.cuh.
            float gate = to_float(to_elem(c[4 * j + e])), up = to_float(to_elem(c[4 * j + 2 + e]));
            if (bias) gate = to_float(to_elem(gate + gate_bias)), up = to_float(to_elem(up + up_bias));
            result[e] = to_float(to_elem(gate / (1.0f + __expf(-gate)))) * up;
          }
          // Neighbours in `at` exchange: the even one stores both of row e = 0 of x, the odd one both of e = 1.
          u32 mine = pack(result[0], result[1]), other = __shfl_xor_sync(~0u, mine, 4);
          int of_x = j * 8 + column_of_thread() + odd;
          u32 both = odd ? __byte_perm(other, mine, 0x7632) : __byte_perm(mine, other, 0x5410);
          if (of_x < m) *reinterpret_cast<u32*>(y + (size_t)of_x * n + at - odd) = both;
        }
      });
#endif
}

// y [m, n] = the parts' sum. For the last layer, whose output does not go to a kernel that adds.
extern "C" __global__ void __launch_bounds__(256) sum_parts(const float4* parts, uint2* y, int splits, int vectors) {
  let_next_start();
  wait_for_previous();
  int at = blockIdx.x * 256 + threadIdx.x;
  if (at >= vectors) return;
  float4 sum = parts[at];
  for (int s = 1; s < splits; s++) {
    float4 part = parts[(size_t)s * vectors + at];
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  y[at] = make_uint2(pack(sum.x, sum.y), pack(sum.z, sum.w));
}
