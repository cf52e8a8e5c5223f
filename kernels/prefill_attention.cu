// Causal attention of prompt chunks over the paged cache, which holds the chunk's own keys already.
//   out[i, h, :] = sum_p softmax_p(scale * q[i, h] . k[p]) v[p],  p in [max(0, pos(i) - window + 1), pos(i)]
//
// qkv, cache, block_table, rows, q_start as in decode_attention.cu. Row r computes num_scheduled[r] tokens that end at
// context_lens[r]. tiles: int2 (r, tile); a tile is TILE_ROWS pairs (token, query head) of one KV head, heads running fastest, so that
// a loaded key serves all heads of its group and a short chunk still fills a tile.
//
// Bound by operations: 4 * HEAD_DIM * (tokens^2 / 2) * HEADS a layer. mma.sync reaches about 60 % of what wgmma could on sm_90; it is
// portable from sm_80 to sm_120.
// Ladder
//   1. scores to memory, softmax, product: three passes over tokens^2 numbers
//   2. FlashAttention (Dao et al. 2022; FlashAttention-2, 2023): a tile of queries stays in registers, keys and values pass through
//      shared memory, the softmax runs along, its sums are in float32
//   3. two stages of asynchronous copies: the next keys arrive while these are multiplied (this one)
//   4. wgmma and TMA with specialised warps (FlashAttention-3): for sm_90a only
//
// KV tiles lie at absolute positions and a masked score changes nothing, so a token's result does not depend on how its prompt was cut.
#include "common.cuh"

constexpr int GROUP = HEADS / KV_HEADS;
constexpr int WARPS = HEAD_DIM == 64 ? 4 : 8;
constexpr int M_TILES = HEAD_DIM == 64 ? 2 : 1;       // 16-row tiles of a warp
constexpr int TILE_ROWS = WARPS * M_TILES * 16;       // 128
constexpr int TILE_KEYS = 64;
constexpr int CHUNKS = HEAD_DIM / 8;                  // 16-byte pieces of a key
constexpr int TILE_VECTORS = TILE_KEYS * CHUNKS;
constexpr int THREADS = WARPS * 32;
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "head_dim must be 64 or 128");

extern __shared__ uint4 shared[];  // 2 stages of keys and values: 4 * TILE_VECTORS vectors

// Pieces of eight neighbouring keys lie in eight different bank groups: ldmatrix reads them without conflict.
__device__ __forceinline__ int swizzled(int token, int chunk) { return token * CHUNKS + (chunk ^ (token & 7)); }

// Keys or values [first, first + TILE_KEYS); those outside [begin, end) become zero and are not read.
__device__ __forceinline__ void copy_tile(uint4* to, const uint4* from, const int* blocks, int first, int begin, int end) {
#pragma unroll
  for (int i = 0; i < TILE_VECTORS / THREADS; i++) {
    int at = threadIdx.x + i * THREADS, token = at / CHUNKS, chunk = at % CHUNKS, position = first + token;
    bool valid = position >= begin && position < end;
    size_t block = valid ? blocks[position / BLOCK_SIZE] : 0;
    size_t offset = (block * KV_HEADS * BLOCK_SIZE + position % BLOCK_SIZE) * CHUNKS + chunk;
    copy16(to + swizzled(token, chunk), from + (valid ? offset : 0), valid);
  }
  end_group();
}

struct Warp {
  uint4 q[M_TILES][HEAD_DIM / 16];
  float o[M_TILES][CHUNKS][4], maximum[M_TILES][2], sum[M_TILES][2];
  int position[M_TILES][2];
};

__device__ __forceinline__ void scores(float (&s)[M_TILES][TILE_KEYS / 8][4], const Warp& w, const uint4* keys) {
  int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 16; k++)
#pragma unroll
    for (int n = 0; n < TILE_KEYS / 16; n++) {
      uint4 b = load_matrices(keys + swizzled(n * 16 + matrix / 2 * 8 + row, k * 2 + matrix % 2));
#pragma unroll
      for (int m = 0; m < M_TILES; m++) {
        mma(s[m][2 * n], w.q[m][k], b.x, b.y);
        mma(s[m][2 * n + 1], w.q[m][k], b.z, b.w);
      }
    }
}

__device__ __forceinline__ void mask(float (&s)[M_TILES][TILE_KEYS / 8][4], const Warp& w, int first, int window) {
  int t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < M_TILES; m++)
#pragma unroll
    for (int n = 0; n < TILE_KEYS / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        int key = first + n * 8 + 2 * t + e % 2, position = w.position[m][e / 2];
        if (key > position || (window > 0 && key <= position - window)) s[m][n][e] = -INF;
      }
}

__device__ __forceinline__ void soften(float (&s)[TILE_KEYS / 8][4], float (&o)[CHUNKS][4], float& maximum, float& sum, float scale,
                                       int half) {
  float best = -INF;
#pragma unroll
  for (int n = 0; n < TILE_KEYS / 8; n++) best = fmaxf(best, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
  best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
  best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
  best = fmaxf(maximum, best * scale);
  float base = best == -INF ? 0.0f : best, shrink = exp2_fast(maximum - base), added = 0;
  maximum = best;
#pragma unroll
  for (int n = 0; n < TILE_KEYS / 8; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float& x = s[n][half * 2 + e];
      x = exp2_fast(fmaf(x, scale, -base));
      added += x;
    }
  sum = sum * shrink + added;
#pragma unroll
  for (int d = 0; d < CHUNKS; d++) o[d][half * 2] *= shrink, o[d][half * 2 + 1] *= shrink;
}

__device__ __forceinline__ void add_values(Warp& w, const float (&s)[M_TILES][TILE_KEYS / 8][4], const uint4* values) {
  int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
#pragma unroll
  for (int k = 0; k < TILE_KEYS / 16; k++) {
    uint4 p[M_TILES];
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
      p[m] = make_uint4(pack(s[m][2 * k][0], s[m][2 * k][1]), pack(s[m][2 * k][2], s[m][2 * k][3]),
                        pack(s[m][2 * k + 1][0], s[m][2 * k + 1][1]), pack(s[m][2 * k + 1][2], s[m][2 * k + 1][3]));
#pragma unroll
    for (int d = 0; d < CHUNKS / 2; d++) {
      uint4 b = load_matrices_transposed(values + swizzled(k * 16 + matrix % 2 * 8 + row, d * 2 + matrix / 2));
#pragma unroll
      for (int m = 0; m < M_TILES; m++) {
        mma(w.o[m][2 * d], p[m], b.x, b.y);
        mma(w.o[m][2 * d + 1], p[m], b.z, b.w);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
prefill_attention(const u32* __restrict__ qkv, const uint4* __restrict__ cache, long long values_offset,
                  const int* __restrict__ block_table, int max_blocks, const int* __restrict__ rows, const int* __restrict__ q_start,
                  const int* __restrict__ num_scheduled, const int* __restrict__ context_lens, const int2* __restrict__ tiles, int window,
                  float scale, u32* __restrict__ out) {
  constexpr int ROW_WORDS = (HEADS + 2 * KV_HEADS) * HEAD_DIM / 2;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, kv_head = blockIdx.y;
  let_next_start();
  wait_for_previous();
  if (tiles[blockIdx.x].x < 0) return;  // padding of a graph
  int r = tiles[blockIdx.x].x, first_row = tiles[blockIdx.x].y * TILE_ROWS;
  int count = num_scheduled[r], start = context_lens[r] - count;
  int last_row = min(first_row + TILE_ROWS, count * GROUP) - 1;
  int lowest = start + first_row / GROUP, end = start + last_row / GROUP + 1;
  int begin = window > 0 ? max(0, lowest - window + 1) : 0;
  const int* blocks = block_table + (size_t)rows[r] * max_blocks;
  const uint4* keys = cache + (size_t)kv_head * BLOCK_SIZE * CHUNKS;
  const uint4* values = keys + values_offset;
  auto copy_stage = [&](int tile) {
    uint4* to = shared + tile % 2 * 2 * TILE_VECTORS;
    copy_tile(to, keys, blocks, tile * TILE_KEYS, begin, end);
    copy_tile(to + TILE_VECTORS, values, blocks, tile * TILE_KEYS, begin, end);
  };
  int tile = begin / TILE_KEYS, last_tile = (end - 1) / TILE_KEYS;
  copy_stage(tile);

  Warp w = {};
  size_t where[M_TILES][2];  // word of (token, head) for rows g and g + 8
#pragma unroll
  for (int m = 0; m < M_TILES; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = min(first_row + (warp * M_TILES + m) * 16 + half * 8 + g, last_row), token = row / GROUP;
      int head = kv_head * GROUP + row % GROUP;
      w.position[m][half] = start + token;
      w.maximum[m][half] = -INF;
      const u32* query = qkv + (size_t)(q_start[r] + token) * ROW_WORDS + head * (HEAD_DIM / 2);
      where[m][half] = ((size_t)(q_start[r] + token) * HEADS + head) * (HEAD_DIM / 2);
#pragma unroll
      for (int k = 0; k < HEAD_DIM / 16; k++) {
        (half ? w.q[m][k].y : w.q[m][k].x) = query[k * 8 + t];
        (half ? w.q[m][k].w : w.q[m][k].z) = query[k * 8 + t + 4];
      }
    }

#pragma unroll 1
  for (; tile <= last_tile; tile++) {
    if (tile < last_tile) {
      copy_stage(tile + 1);
      copies_done<2>();
    } else {
      copies_done<0>();
    }
    __syncthreads();
    const uint4* stage = shared + tile % 2 * 2 * TILE_VECTORS;
    float s[M_TILES][TILE_KEYS / 8][4] = {};
    scores(s, w, stage);
    int first = tile * TILE_KEYS;
    if (first + TILE_KEYS - 1 > lowest || (window > 0 && first <= end - 1 - window)) mask(s, w, first, window);
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) soften(s[m], w.o[m], w.maximum[m][half], w.sum[m][half], scale, half);
    add_values(w, s, stage + TILE_VECTORS);
    __syncthreads();  // before the next copies overwrite this stage
  }

#pragma unroll
  for (int m = 0; m < M_TILES; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = w.sum[m][half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (first_row + (warp * M_TILES + m) * 16 + half * 8 + g > last_row) continue;
      float inverse = 1.0f / sum;
#pragma unroll
      for (int d = 0; d < CHUNKS; d++)
        out[where[m][half] + d * 4 + t] = pack(w.o[m][d][half * 2] * inverse, w.o[m][d][half * 2 + 1] * inverse);
    }
}
