// y[m, n] = sum_k x[m, k] * w[n, k]      for 1 <= m <= 16       w [N, K] row-major, x [M, K], y [M, N]
//   matvec         y in the element type
//   matvec_float   y in float32, rows `stride` apart (logits)
//   matvec_silu    w holds gate rows, then up rows [2N, K]; y = silu(gate) * up
//
// Bound by bytes: the weights, read once, N * K * 2 bytes; everything else is noise. At 16 rows that is 16 multiply-adds a weight,
// far below what either unit can do, but float32 units would need 16 conversions and multiply-adds a weight and lag behind.
// Ladder
//   1. one thread a row of w: uncoalesced, a tenth of the bandwidth
//   2. one warp a row, 16-byte loads, shuffles: 80 % for one row of x, and it slows down with each further row
//   3. copies of a whole tile issued before the first use, and before the wait for the previous kernel: the weight stream never
//      pauses between kernels
//   4. tensor cores: 16 rows of w are the A operand, the rows of x the columns of B. A thread's 16-byte piece is 8 neighbouring k;
//      the order of k within a product is free, so those 8 serve as two k-pairs of two mma instructions without any shuffle,
//      provided that x is read in the same order. All M cost the same, and a row's result has the same bits for any M
//   5. blocks that stay and walk over tiles (this one): x is fetched once a block and kept in registers, and the next tile's weights
//      are on their way while this one is summed up. Fetching x for each tile cost 300 us of 1,100 a token at 8 rows
//
// A tile: 16 rows of w (8 gate and 8 up). The warps of a block share K, interleaved, and are summed in a fixed order.
#include "common.cuh"

constexpr int STEPS = K / (32 * WARPS);               // steps of a warp and tile: 32 k each, 4 lanes of 8
constexpr int AHEAD = STEPS < DEPTH ? STEPS : DEPTH;  // steps whose weights are in flight at once
constexpr int TILES = (M_MAX + 7) / 8;                // columns of B in eights
constexpr bool X_STAYS = STEPS <= 8;                  // x of a warp fits into registers
constexpr int PIECES = X_STAYS ? 2 : 2 + TILES;       // 16-byte pieces of a thread and step: two rows of w, then x
static_assert(K % (32 * WARPS) == 0, "K must be a multiple of 32 * WARPS");

// First k of a lane in a step. Two steps of one warp lie side by side where they can: 128 bytes of a row.
__device__ __forceinline__ int k_of(int step) {
  int warp = threadIdx.x / 32, t = threadIdx.x % 4;
  return (STEPS % 2 ? (step * WARPS + warp) * 32 : (step / 2 * WARPS + warp) * 64 + step % 2 * 32) + t * 8;
}

__device__ __forceinline__ void multiply(float (&c)[TILES][4], const uint4* weights, const uint4 (&x)[TILES]) {
  uint4 low = weights[0], high = weights[32];
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    mma(c[j], make_uint4(low.x, high.x, low.y, high.y), x[j].x, x[j].y);
    mma(c[j], make_uint4(low.z, high.z, low.w, high.w), x[j].z, x[j].w);
  }
}

// Walks over the tiles blockIdx.x, + gridDim.x, ... For each, rows_of(tile, row_in_8, low, high) says which rows of w a lane copies, and
// store(tile, m, column, low, high) gets the sums of rows `column` and `column + 8` of the tile for row m of x. Each thread keeps a
// ring of AHEAD steps in shared memory, WARPS * AHEAD * PIECES * 512 bytes in all, and reads only its own pieces.
template <typename RowsOf, typename Store>
__device__ __forceinline__ void walk(int tiles, const elem* x, int m, RowsOf rows_of, Store store) {
  extern __shared__ uint4 ring[];
  __shared__ float parts[2][WARPS][TILES * 8][17];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  uint4* mine = ring + warp * AHEAD * PIECES * 32 + lane;
  const elem *low_row, *high_row;
  auto copy_weights = [&](int step) {
    uint4* to = mine + step % AHEAD * PIECES * 32;
    copy16_streaming(to, low_row + k_of(step));
    copy16_streaming(to + 32, high_row + k_of(step));
  };
  auto copy_x = [&](int step) {
    uint4* to = mine + (step % AHEAD * PIECES + 2) * 32;
#pragma unroll
    for (int j = 0; j < TILES; j++) copy16(to + j * 32, x + (size_t)(g + 8 * j < m ? g + 8 * j : 0) * K + k_of(step), g + 8 * j < m);
  };
  let_next_start();
  int tile = blockIdx.x, next = tile;
  rows_of(tile, g, low_row, high_row);
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    copy_weights(i);
    if (X_STAYS) end_group();
  }
  wait_for_previous();
  uint4 resident[X_STAYS ? STEPS : 1][TILES];
  if constexpr (X_STAYS) {
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
      for (int j = 0; j < TILES; j++)
        resident[step][j] = g + 8 * j < m ? *reinterpret_cast<const uint4*>(x + (size_t)(g + 8 * j) * K + k_of(step)) : make_uint4(0, 0, 0, 0);
  } else {
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      copy_x(i);
      end_group();
    }
  }
  for (int buffer = 0; tile < tiles; tile = next, buffer ^= 1) {
    next = tile + gridDim.x;
    float c[TILES][4] = {};
    const elem *low_now = low_row, *high_now = high_row;
    if (next < tiles) rows_of(next, g, low_row, high_row);
#pragma unroll 8
    for (int step = 0; step < STEPS; step++) {
      copies_done<AHEAD - 1>();
      const uint4* from = mine + step % AHEAD * PIECES * 32;
      if constexpr (X_STAYS) {
        multiply(c, from, resident[step]);
      } else {
        uint4 now[TILES];
#pragma unroll
        for (int j = 0; j < TILES; j++) now[j] = from[(2 + j) * 32];
        multiply(c, from, now);
      }
      // The step that takes this one's place in the ring: of this tile, or of the next one.
      int coming = step + AHEAD;
      if (coming < STEPS) {
        uint4* to = mine + coming % AHEAD * PIECES * 32;
        copy16_streaming(to, low_now + k_of(coming));
        copy16_streaming(to + 32, high_now + k_of(coming));
        if (!X_STAYS) copy_x(coming);
      } else if (next < tiles) {
        copy_weights(coming - STEPS);
        if (!X_STAYS) copy_x(coming - STEPS);
      }
      end_group();  // also where it is empty: the count of pending groups stays the same
    }
#pragma unroll
    for (int j = 0; j < TILES; j++) {
      parts[buffer][warp][8 * j + 2 * t][g] = c[j][0];
      parts[buffer][warp][8 * j + 2 * t + 1][g] = c[j][1];
      parts[buffer][warp][8 * j + 2 * t][g + 8] = c[j][2];
      parts[buffer][warp][8 * j + 2 * t + 1][g + 8] = c[j][3];
    }
    __syncthreads();  // one a tile is enough: the other buffer is written next
    for (int i = threadIdx.x; i < m * 8; i += WARPS * 32) {
      float low = 0, high = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) low += parts[buffer][w][i / 8][i % 8], high += parts[buffer][w][i / 8][i % 8 + 8];
      store(tile, i / 8, i % 8, low, high);
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
matvec(const elem* __restrict__ w, const elem* x, elem* __restrict__ y, int n, int m) {
  walk((n + 15) / 16, x, m,
       [&](int tile, int g, const elem*& low, const elem*& high) {
         low = w + (size_t)min(tile * 16 + g, n - 1) * K;
         high = w + (size_t)min(tile * 16 + g + 8, n - 1) * K;
       },
       [&](int tile, int row, int column, float low, float high) {
         size_t at = (size_t)row * n + tile * 16 + column;
         if (tile * 16 + column < n) y[at] = to_elem(low);
         if (tile * 16 + column + 8 < n) y[at + 8] = to_elem(high);
       });
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
matvec_float(const elem* __restrict__ w, const elem* x, float* __restrict__ y, int n, int m, int stride) {
  walk((n + 15) / 16, x, m,
       [&](int tile, int g, const elem*& low, const elem*& high) {
         low = w + (size_t)min(tile * 16 + g, n - 1) * K;
         high = w + (size_t)min(tile * 16 + g + 8, n - 1) * K;
       },
       [&](int tile, int row, int column, float low, float high) {
         size_t at = (size_t)row * stride + tile * 16 + column;
         if (tile * 16 + column < n) y[at] = low;
         if (tile * 16 + column + 8 < n) y[at + 8] = high;
       });
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
matvec_silu(const elem* __restrict__ w, const elem* __restrict__ bias, const elem* x, elem* __restrict__ y, int n, int m) {
  walk((n + 7) / 8, x, m,
       [&](int tile, int g, const elem*& low, const elem*& high) {
         low = w + (size_t)min(tile * 8 + g, n - 1) * K;
         high = low + (size_t)n * K;
       },
       [&](int tile, int row, int lane_column, float low, float high) {
         int column = tile * 8 + lane_column;
         if (column >= n) return;
         // Rounded where the unfused path rounds, so that both give the same bits for the same sums.
         float gate = to_float(to_elem(low)), up = to_float(to_elem(high));
         if (bias) gate = to_float(to_elem(gate + to_float(bias[column]))), up = to_float(to_elem(up + to_float(bias[n + column])));
         y[(size_t)row * n + column] = to_elem(to_float(to_elem(gate / (1.0f + __expf(-gate)))) * up);
       });
}
