// The engine of the matrix-vector kernels (matvec.cu, matvec_fused.cu): blocks that walk over tiles of 16 rows of w.
//
// Tensor cores multiply: 16 rows of w are the A operand, the rows of x the columns of B. A thread's 16-byte piece is 8 neighbouring k;
// the order of k within a product is free, so those 8 serve as two k-pairs of two mma instructions without any shuffle, provided that
// x is read in the same order. All M cost the same, and a row's result has the same bits for any M. The warps of a block share K,
// interleaved, and are summed in a fixed order.
#pragma once
#include "common.cuh"

constexpr int STEPS = K / (32 * WARPS);               // steps of a warp and tile: 32 k each, 4 lanes of 8
constexpr int AHEAD = STEPS < DEPTH ? STEPS : DEPTH;  // steps whose weights are in flight at once
constexpr int TILES = (M_MAX + 7) / 8;                // columns of B in eights
constexpr bool X_STAYS = STEPS <= 8;                  // x of a warp fits into registers
constexpr int X_PITCH = K + 32;                       // of rows of x in shared memory: no two of 8 lanes on one bank
static_assert(K % (32 * WARPS) == 0, "K must be a multiple of 32 * WARPS");
static_assert(M_MAX * 8 <= 32 * WARPS, "each thread stores one element of a tile");

// First k of a lane in a step. Two steps of one warp lie side by side where they can: 128 bytes of a row.
__device__ __forceinline__ int k_of(int step) {
  int warp = threadIdx.x / 32, t = threadIdx.x % 4;
  return (STEPS % 2 ? (step * WARPS + warp) * 32 : (step / 2 * WARPS + warp) * 64 + step % 2 * 32) + t * 8;
}

// x [m, K] as it stands in memory.
struct Plain {
  static constexpr bool IN_SHARED = false;
  const elem* x;

  __device__ void before_wait() {}
  __device__ void after_wait(elem*, int) {}
};

__device__ __forceinline__ void multiply(float (&c)[TILES][4], const uint4* weights, const uint4 (&x)[TILES]) {
  uint4 low = weights[0], high = weights[32];
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    mma(c[j], make_uint4(low.x, high.x, low.y, high.y), x[j].x, x[j].y);
    mma(c[j], make_uint4(low.z, high.z, low.w, high.w), x[j].z, x[j].w);
  }
}

// Walks over the tiles blockIdx.x, + gridDim.x, ... For each, rows_of(tile, row_in_8, low, high) says which rows of w a lane copies,
// early() loads what before(tile) needs, that loads what the store will need, and store(tile, m, column, low, high) gets the sums of rows `column` and `column + 8` of
// the tile for row m of x, at most one a thread: m = threadIdx.x / 8. Each thread keeps a ring of AHEAD steps in shared memory and reads
// only its own pieces; rows of x that a Source makes (IN_SHARED) lie behind the rings.
// LATE: the next kernel may read what stood before this one before its own wait.
template <bool LATE, typename Source, typename RowsOf, typename Early, typename Before, typename Store>
__device__ __forceinline__ void walk(int tiles, Source source, int m, RowsOf rows_of, Early early, Before before, Store store) {
  constexpr bool X_IN_RING = !X_STAYS && !Source::IN_SHARED;
  constexpr int PIECES = X_IN_RING ? 2 + TILES : 2;  // 16-byte pieces of a thread and step: two rows of w, then x
  extern __shared__ uint4 ring[];
  __shared__ float parts[2][WARPS][TILES * 8][17];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  uint4* mine = ring + warp * AHEAD * PIECES * 32 + lane;
  elem* made = reinterpret_cast<elem*>(ring + WARPS * AHEAD * PIECES * 32);
  const elem *low_row, *high_row;
  auto copy_weights = [&](int step) {
    uint4* to = mine + step % AHEAD * PIECES * 32;
    copy16_streaming(to, low_row + k_of(step));
    copy16_streaming(to + 32, high_row + k_of(step));
  };
  auto copy_x = [&](int step) {
    if constexpr (X_IN_RING) {
      uint4* to = mine + (step % AHEAD * PIECES + 2) * 32;
#pragma unroll
      for (int j = 0; j < TILES; j++) copy16(to + j * 32, source.x + (size_t)(g + 8 * j < m ? g + 8 * j : 0) * K + k_of(step), g + 8 * j < m);
    }
  };
  auto x_at = [&](int step, int j) {
    if (g + 8 * j >= m) return make_uint4(0, 0, 0, 0);
    if constexpr (Source::IN_SHARED) return *reinterpret_cast<const uint4*>(made + (g + 8 * j) * X_PITCH + k_of(step));
    else return *reinterpret_cast<const uint4*>(source.x + (size_t)(g + 8 * j) * K + k_of(step));
  };
  if (!LATE) let_next_start();
  int tile = blockIdx.x, next = tile;
  rows_of(tile, g, low_row, high_row);
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    copy_weights(i);
    if (!X_IN_RING) end_group();
  }
  source.before_wait();
  wait_for_previous();
  early();
  source.after_wait(made, m);
  // Only now that x is here, so that the next kernels' weights do not stand before it in the memory's queue.
  if (LATE && Source::IN_SHARED) let_next_start();
  uint4 resident[X_STAYS ? STEPS : 1][TILES];
  if constexpr (X_STAYS) {
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
      for (int j = 0; j < TILES; j++) resident[step][j] = x_at(step, j);
  } else if constexpr (X_IN_RING) {
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      copy_x(i);
      end_group();
    }
  }
  for (int buffer = 0; tile < tiles; tile = next, buffer ^= 1) {
    next = tile + gridDim.x;
    before(tile);
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
        for (int j = 0; j < TILES; j++) {
          if constexpr (X_IN_RING) now[j] = from[(2 + j) * 32];
          else now[j] = x_at(step, j);
        }
        multiply(c, from, now);
      }
      if (LATE && !Source::IN_SHARED && step == 0 && tile == (int)blockIdx.x) let_next_start();
      // The step that takes this one's place in the ring: of this tile, or of the next one.
      int coming = step + AHEAD;
      if (coming < STEPS) {
        uint4* to = mine + coming % AHEAD * PIECES * 32;
        copy16_streaming(to, low_now + k_of(coming));
        copy16_streaming(to + 32, high_now + k_of(coming));
        copy_x(coming);
      } else if (next < tiles) {
        copy_weights(coming - STEPS);
        copy_x(coming - STEPS);
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
    int row = threadIdx.x / 8, column = threadIdx.x % 8;
    if (row < m) {
      float low = 0, high = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) low += parts[buffer][w][row][column], high += parts[buffer][w][row][column + 8];
      store(tile, row, column, low, high);
    }
  }
}

// Rows [16 * tile, + 16) of w [n, K].
struct Neighbours {
  const elem* w;
  int n;

  __device__ void operator()(int tile, int g, const elem*& low, const elem*& high) const {
    low = w + (size_t)min(tile * 16 + g, n - 1) * K;
    high = w + (size_t)min(tile * 16 + g + 8, n - 1) * K;
  }
};

// Eight gate rows and the eight up rows n below them.
struct GateAndUp {
  const elem* w;
  int n;

  __device__ void operator()(int tile, int g, const elem*& low, const elem*& high) const {
    low = w + (size_t)min(tile * 8 + g, n - 1) * K;
    high = low + (size_t)n * K;
  }
};

template <typename Out>
struct StoreTile {
  Out* y;
  int n, stride;

  __device__ void operator()(int tile, int row, int column, float low, float high) const {
    size_t at = (size_t)row * stride + tile * 16 + column;
    if (tile * 16 + column < n) put(y + at, low);
    if (tile * 16 + column + 8 < n) put(y + at + 8, high);
  }
  __device__ static void put(elem* to, float x) { *to = to_elem(x); }
  __device__ static void put(float* to, float x) { *to = x; }
};

struct StoreSilu {
  elem* y;
  const elem* bias;
  int n;

  __device__ void operator()(int tile, int row, int lane_column, float low, float high) const {
    int column = tile * 8 + lane_column;
    if (column >= n) return;
    // Rounded where the unfused path rounds, so that both give the same bits for the same sums.
    float gate = to_float(to_elem(low)), up = to_float(to_elem(high));
    if (bias) gate = to_float(to_elem(gate + to_float(bias[column]))), up = to_float(to_elem(up + to_float(bias[n + column])));
    y[(size_t)row * n + column] = to_elem(to_float(to_elem(gate / (1.0f + __expf(-gate)))) * up);
  }
};

struct Nothing {
  __device__ void operator()() const {}
  __device__ void operator()(int) const {}
};
