// Products of the decode step with what stands before and behind them, for K = hidden_size:
//   matvec_qkv         q, k, v = x w^T + bias, rotated; queries to qkv, keys and values to the cache        m <= 16
//   matvec_norm_qkv    the same with x = norm(residual + added) * weight                                    m <= 4
//   matvec_norm_silu   y = silu(gate) * up of x = norm(residual + added) * weight                           m <= 4
//   matvec_norm_float  logits of x = norm(residual[rows] + added[rows]) * weight                            m <= 4
//
// qkv, cache, cos, sin, positions, slots as in qkv_epilogue.cu; residual and added as in rms_norm.cu. The new residual goes to another
// tensor than the old one, since other blocks still read that.
//
// Bound by bytes, as matvec.cu. What is saved is latency: two kernels a layer less in front of the products, one behind QKV, each of
// which reads and writes a few kilobytes while the memory waits.
// Ladder
//   1. norm, product, epilogue as kernels of their own: 2.5 to 4.5 us each, three times a layer
//   2. rows d and d + HEAD_DIM / 2 of a head are the two halves of a tile of 16 rows, so a thread that stores holds both numbers of a
//      rotation
//   3. every block normalises all rows for itself: 8 KB of reads a row from the L2 cache instead of a kernel. Beyond four rows that
//      traffic costs more than the kernel did (this one)
#define HIDDEN K
#define THREADS (WARPS * 32)
#include "matvec.cuh"
#include "norm.cuh"

constexpr int FUSED_ROWS = 4;

// Rows of norm(residual + added) * weight in shared memory. Row i is row rows[i] of both, if rows is given.
struct Normed {
  static constexpr bool IN_SHARED = true;
  const uint4 *added, *residual, *bias, *weight;
  const int* rows;
  uint4* out;  // the new residual, by row i, written by the first block; may be null
  float epsilon;
  uint4 scale[PER_THREAD];

  __device__ __forceinline__ void before_wait() { load_scale(scale, weight); }
  __device__ __forceinline__ void after_wait(elem* made, int m) {
    uint4 sum[FUSED_ROWS][PER_THREAD];
    float squares[FUSED_ROWS];
#pragma unroll
    for (int r = 0; r < FUSED_ROWS; r++) {
      squares[r] = 0;
      if (r >= m) continue;
      size_t row = rows ? max(rows[r], 0) : r;  // a graph's padding computes on row 0
#pragma unroll
      for (int i = 0; i < PER_THREAD; i++) {
        int at = threadIdx.x + i * THREADS;
        if (at >= VECTORS) continue;
        sum[r][i] = residual[row * VECTORS + at];
        if (added) sum[r][i] = add_vector(sum[r][i], added[row * VECTORS + at], bias, at);
        if (out && blockIdx.x == 0) out[r * VECTORS + at] = sum[r][i];
        squares[r] = add_squares(squares[r], sum[r][i]);
      }
    }
    block_sums(squares);
#pragma unroll
    for (int r = 0; r < FUSED_ROWS; r++) {
      if (r >= m) continue;
      float inverse = rsqrtf(squares[r] / HIDDEN + epsilon);
#pragma unroll
      for (int i = 0; i < PER_THREAD; i++) {
        int at = threadIdx.x + i * THREADS;
        if (at < VECTORS) *reinterpret_cast<uint4*>(made + r * X_PITCH + at * 8) = scale_vector(sum[r][i], inverse, scale[i]);
      }
    }
    __syncthreads();
  }
};

constexpr int TILES_PER_HEAD = HEAD_DIM / 16;
constexpr int ALL_HEADS = HEADS + 2 * KV_HEADS;

struct QkvTensors {
  const elem *w, *bias;
  const float *cos, *sin;
  const int *positions, *slots;
  elem *qkv, *cache;
  long long values_offset;  // in elements
};

// The tile's eight rows d and eight rows d + HEAD_DIM / 2 of one head.
template <typename Source>
__device__ __forceinline__ void qkv_of(const QkvTensors& a, Source source, int m) {
  int slot = -1, position = 0;
  float cos_low = 1, cos_high = 1, sin_low = 0, sin_high = 0, bias_low = 0, bias_high = 0;
  auto head_of = [](int tile) { return tile / TILES_PER_HEAD; };
  auto low_of = [](int tile, int g) { return tile % TILES_PER_HEAD * 8 + g; };
  walk<true>(
      ALL_HEADS * TILES_PER_HEAD, source, m,
      [&](int tile, int g, const elem*& low, const elem*& high) {
        low = a.w + ((size_t)head_of(tile) * HEAD_DIM + low_of(tile, g)) * K;
        high = low + (size_t)(HEAD_DIM / 2) * K;
      },
      [&] {
        if (threadIdx.x / 8 < m) slot = a.slots[threadIdx.x / 8], position = a.positions[threadIdx.x / 8];
      },
      [&](int tile) {
        int row = threadIdx.x / 8, d = low_of(tile, threadIdx.x % 8), head = head_of(tile);
        if (row >= m) return;
        if (head < HEADS + KV_HEADS) {
          size_t at = (size_t)max(position, 0) * HEAD_DIM + d;
          cos_low = a.cos[at], cos_high = a.cos[at + HEAD_DIM / 2], sin_low = a.sin[at], sin_high = a.sin[at + HEAD_DIM / 2];
        }
        if (a.bias) bias_low = to_float(a.bias[head * HEAD_DIM + d]), bias_high = to_float(a.bias[head * HEAD_DIM + d + HEAD_DIM / 2]);
      },
      [&](int tile, int row, int column, float low_sum, float high_sum) {
        if (slot < 0) return;  // padding
        int head = head_of(tile), d = low_of(tile, column);
        // Rounded where the unfused path rounds.
        float low = to_float(to_elem(low_sum)), high = to_float(to_elem(high_sum));
        if (a.bias) low = to_float(to_elem(low + bias_low)), high = to_float(to_elem(high + bias_high));
        if (head < HEADS + KV_HEADS) {
          float turned = fmaf(low, cos_low, high * sin_low);
          high = fmaf(high, cos_high, low * sin_high), low = turned;
        }
        elem* to = a.qkv + ((size_t)row * ALL_HEADS + head) * HEAD_DIM;
        if (head >= HEADS) {
          bool is_value = head >= HEADS + KV_HEADS;
          int kv_head = head - HEADS - (is_value ? KV_HEADS : 0);
          to = a.cache + (is_value ? a.values_offset : 0) +
               (((size_t)(slot / BLOCK_SIZE) * KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM;
        }
        to[d] = to_elem(low), to[d + HEAD_DIM / 2] = to_elem(high);
      });
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
matvec_qkv(const elem* __restrict__ w, const elem* __restrict__ bias, const float* __restrict__ cos, const float* __restrict__ sin,
           const int* positions, const int* slots, elem* qkv, elem* cache, long long values_offset, const elem* x, int m) {
  qkv_of(QkvTensors{w, bias, cos, sin, positions, slots, qkv, cache, values_offset}, Plain{x}, m);
}

#if M_MAX == 8  // those that normalise take FUSED_ROWS at most
extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
matvec_norm_qkv(const elem* __restrict__ w, const elem* __restrict__ bias, const float* __restrict__ cos, const float* __restrict__ sin,
                const int* positions, const int* slots, elem* qkv, elem* cache, long long values_offset, const uint4* added,
                const uint4* residual, const uint4* __restrict__ added_bias, const uint4* __restrict__ norm, const int* rows,
                uint4* residual_out, float epsilon, int m) {
  qkv_of(QkvTensors{w, bias, cos, sin, positions, slots, qkv, cache, values_offset},
         Normed{added, residual, added_bias, norm, rows, residual_out, epsilon, {}}, m);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
matvec_norm_silu(const elem* __restrict__ w, const elem* __restrict__ bias, elem* __restrict__ y, int n, const uint4* added,
                 const uint4* residual, const uint4* __restrict__ added_bias, const uint4* __restrict__ norm, const int* rows,
                 uint4* residual_out, float epsilon, int m) {
  walk<false>((n + 7) / 8, Normed{added, residual, added_bias, norm, rows, residual_out, epsilon, {}}, m, GateAndUp{w, n}, Nothing{}, Nothing{},
              StoreSilu{y, bias, n});
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
matvec_norm_float(const elem* __restrict__ w, float* __restrict__ y, int n, int stride, const uint4* added, const uint4* residual,
                  const uint4* __restrict__ added_bias, const uint4* __restrict__ norm, const int* rows, float epsilon, int m) {
  walk<false>((n + 15) / 16, Normed{added, residual, added_bias, norm, rows, nullptr, epsilon, {}}, m, Neighbours{w, n}, Nothing{}, Nothing{},
              StoreTile<float>{y, n, stride});
}
#endif
