// y[m, n] = sum_k x[m, k] * w[n, k]      for m <= 64 on sm_90a       w [N, K] row-major, x [M, K]
//   gemm_parts    float32 sums of each of `splits` parts of K: parts [splits, M, N], which the next kernel adds up in their order
//   gemm_float    y in float32, rows `stride` apart (logits)
//   gemm_silu     w holds gate rows, then up rows [2N, K]; y = silu(gate) * up in the element type
//
// Bound by bytes: the weights, read once; x is read by every block from the L2 cache.
// Ladder
//   1. cuBLAS: 15 to 30 % over the bytes at 24 to 64 rows, and the order of K changes with M
//   2. the weights are the M operand, 128 rows of them a block, the rows of x are N, padded to 64: all M cost the same, and a row's
//      result has the same bits for any M. (Padded to 128 it lost to cuBLAS: 2.44 ms a step of 128 rows against 2.11)
//   3. where N / 128 blocks are too few for the chip, K is split; the sums meet in the kernel that follows anyway (norm or QKV epilogue)
//   4. as many stages as fit, those of the weights asked for before the wait for the previous kernel (this one)
#include "wgmma.cuh"

constexpr int ROWS = 64, STEP_K = 64;
constexpr int STAGES = 4;
constexpr int TILE = 128;                              // rows of w of a block, 64 a warpgroup
constexpr int WEIGHT_VECTORS = TILE * 8, STAGE_VECTORS = WEIGHT_VECTORS + ROWS * 8;
constexpr int SUMS = ROWS / 2;                         // of a thread

extern __shared__ __align__(1024) uint4 shared[];      // STAGES of weights, then x

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct Barriers {
  u64 full[STAGES], empty[STAGES];
};

// Four warps, each with every fourth step. row_of(i): row of w of the block's row i. LATE: the next kernel starts when the last weights of
// this one are asked for.
template <bool LATE, typename RowOf>
__device__ __forceinline__ void produce(Barriers& b, const elem* w, const elem* x, int k, int m, int first, int steps, RowOf row_of) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, chunk = lane % 8;
  auto copy_weights = [&](int n) {
    uint4* to = shared + n % STAGES * STAGE_VECTORS;
    const elem* from = w + (size_t)(first + n) * STEP_K + chunk * 8;
#pragma unroll 8
    for (int i = lane / 8; i < TILE; i += 4) copy16_streaming(to + panel_place(i, chunk), from + row_of(i) * k);
  };
  if (warp < steps) copy_weights(warp);
  wait_for_previous();
  for (int n = warp; n < steps; n += 4) {
    int stage = n % STAGES;
    if (n >= STAGES) {
      barrier_wait(&b.empty[stage], n / STAGES % 2 ^ 1);
      copy_weights(n);
    }
    uint4* to = shared + stage * STAGE_VECTORS + WEIGHT_VECTORS;
    const elem* from = x + (size_t)(first + n) * STEP_K + chunk * 8;
#pragma unroll 8
    for (int i = lane / 8; i < ROWS; i += 4) copy16(to + panel_place(i, chunk), from + (size_t)(i < m ? i : 0) * k, i < m);
    end_group();
    if (LATE && n + 4 >= steps) let_next_start();
    copies_done<0>();
    publish_to_products();
    __syncwarp();
    if (lane == 0) barrier_arrive(&b.full[stage]);
  }
}

__device__ __forceinline__ void consume(Barriers& b, float (&c)[SUMS], int group, int steps) {
  for (int n = 0, stage = 0, phase = 0; n < steps; n++) {
    const uint4* weights = shared + stage * STAGE_VECTORS;
    barrier_wait(&b.full[stage], phase);
    products_begin();
#pragma unroll
    for (int i = 0; i < STEP_K / 16; i++)
      multiply_rows(c, operand(weights + group * 512) + i * 2, operand(weights + WEIGHT_VECTORS) + i * 2, true);
    products_commit();
    products_wait<0>();
    if (threadIdx.x % 32 == 0) barrier_arrive(&b.empty[stage]);
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
}

// Sums of the block's 128 rows of w for all rows of x; store(c, row, column): c[4 j + 2 h + e] belongs to the block's row
// row + 8 h and row 8 j + column + e of x.
template <bool LATE, typename RowOf, typename Store>
__device__ __forceinline__ void product(const elem* w, const elem* x, int k, int m, int first, int steps, RowOf row_of, Store store) {
  __shared__ Barriers b;
  int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (threadIdx.x < STAGES) {
    barrier_init(&b.full[threadIdx.x], 1);
    barrier_init(&b.empty[threadIdx.x], 8);
    publish_to_products();
  }
  if (!LATE) let_next_start();
  __syncthreads();
  if (group == 2) {
    produce<LATE>(b, w, x, k, m, first, steps, row_of);
  } else {
    float c[SUMS] = {};
    consume(b, c, group, steps);
    wait_for_previous();  // has long ended, but what is stored next must not come before
    store(c, threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, threadIdx.x % 4 * 2);
  }
}

template <typename Put>
__device__ __forceinline__ void each(const float (&c)[SUMS], int row, int column, int m, Put put) {
#pragma unroll
  for (int i = 0; i < SUMS; i++) {
    int of_x = i / 4 * 8 + column + i % 2;
    if (of_x < m) put(of_x, row + i / 2 % 2 * 8, c[i]);
  }
}

#endif

// grid (N / 128, splits)
extern "C" __global__ void __launch_bounds__(384, 2)
gemm_parts(const elem* __restrict__ w, const elem* x, float* parts, int n, int k, int m) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  int all = k / STEP_K, first = blockIdx.y * all / gridDim.y, end = (blockIdx.y + 1) * all / gridDim.y;
  float* mine = parts + (size_t)blockIdx.y * m * n + blockIdx.x * TILE;
  product<false>(w, x, k, m, first, end - first, [&](int i) { return (size_t)blockIdx.x * TILE + i; },
          [&](const float(&c)[SUMS], int row, int column) {
            each(c, row, column, m, [&](int of_x, int of_w, float sum) { mine[(size_t)of_x * n + of_w] = sum; });
          });
#endif
}

extern "C" __global__ void __launch_bounds__(384, 2)
gemm_float(const elem* __restrict__ w, const elem* x, float* y, int k, int m, int stride) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  float* mine = y + blockIdx.x * TILE;
  product<false>(w, x, k, m, 0, k / STEP_K, [&](int i) { return (size_t)blockIdx.x * TILE + i; },
          [&](const float(&c)[SUMS], int row, int column) {
            each(c, row, column, m, [&](int of_x, int of_w, float sum) { mine[(size_t)of_x * stride + of_w] = sum; });
          });
#endif
}

// The first warpgroup has 64 gate rows, the second the up rows that belong to them.
extern "C" __global__ void __launch_bounds__(384, 2)
gemm_silu(const elem* __restrict__ w, const elem* __restrict__ bias, const elem* x, elem* y, int n, int k, int m) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  int begin = blockIdx.x * 64;
  product<true>(w, x, k, m, 0, k / STEP_K, [&](int i) { return (size_t)(i / 64 * n + begin + i % 64); },
          [&](const float(&c)[SUMS], int row, int column) {
            float* ups = reinterpret_cast<float*>(shared) + threadIdx.x % 128;
            asm volatile("bar.sync 1, 256;" ::: "memory");  // nobody multiplies any more
            if (threadIdx.x >= 128) {
#pragma unroll
              for (int i = 0; i < SUMS; i++) ups[i * 128] = c[i];
            }
            asm volatile("bar.sync 1, 256;" ::: "memory");
            if (threadIdx.x >= 128) return;
#pragma unroll
            for (int i = 0; i < SUMS; i++) {
              int of_x = i / 4 * 8 + column + i % 2, at = begin + row + i / 2 % 2 * 8;
              if (of_x >= m) continue;
              // Rounded as in matvec.cuh.
              float gate = to_float(to_elem(c[i])), up = to_float(to_elem(ups[i * 128]));
              if (bias) gate = to_float(to_elem(gate + to_float(bias[at]))), up = to_float(to_elem(up + to_float(bias[n + at])));
              y[(size_t)of_x * n + at] = to_elem(to_float(to_elem(gate / (1.0f + __expf(-gate)))) * up);
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
