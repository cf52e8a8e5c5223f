// Causal attention of prompt chunks on sm_90a; the same function, arguments and promise as prefill_attention.cu.
//
// A block: CONSUMERS warpgroups, each with 64 pairs (token, query head) of one KV head, and four warps that bring keys and values, 128
// tokens at a time, from the paged cache.
//
// Bound by operations: 4 * HEAD_DIM * (tokens^2 / 2) * HEADS a layer, and for HEAD_DIM 64 as much by the exponentials: 16 a clock and
// multiprocessor, which is 256 operations each, against 4,096 of the tensor cores.
// Ladder
//   1. mma.sync with operands through registers (prefill_attention.cu): 260 TFLOP/s on an H100
//   2. wgmma reads keys and values from shared memory; the next tile's scores are multiplied behind this one's values without a pause,
//      and warpgroups overlap: one's softmax with another's products
//   3. warps of their own copy (two for keys, two for values, a tile each), so that products never wait for addresses (this one).
//      Blocks of 16 tokens lie anywhere in the cache, and slots outside the row must read as zeros, which cp.async gives for nothing;
//      a tensor map would need a pass over the last tile
//
// KV tiles lie at absolute positions and a masked score changes nothing, so a token's result does not depend on how its prompt was cut.
#include "attention_tiles.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct Tile {
  int row, first_row, last_row;       // of the step; pairs (token, head) of the row
  int start, end, begin, lowest;      // position of the row's first query; keys [begin, end); position of the tile's first query
  int first, last;                    // KV tiles
  const int* blocks;
};

__device__ __forceinline__ void produce(Barriers& b, uint4* tiles, const uint4* from, const Tile& t, int kind, int which) {
  for (int n = which, tile = t.first + which; tile <= t.last; n += 2, tile += 2) {
    int stage = n % STAGES;
    barrier_wait(&b.empty[kind][stage], n / STAGES % 2 ^ 1);
    copy_tile(tiles + stage * TILE_VECTORS, from, t, tile);
    hand_over(&b.full[kind][stage]);
  }
}

__device__ __forceinline__ void mask(float (&s)[64], const int (&position)[2], int first, int window) {
  int t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < 16; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int key = first + j * 8 + 2 * t + e % 2;
      if (key > position[e / 2] || (window > 0 && key <= position[e / 2] - window)) s[4 * j + e] = -INF;
    }
}

__device__ __forceinline__ void consume(Barriers& b, const uint4* queries, const uint4* keys, const uint4* values, const Tile& t,
                                        const int (&position)[2], int mine, int window, float scale, State& w) {
  float s[64];
  u32 p[8][4];
  bool elected = threadIdx.x % 32 == 0;
  // A warpgroup whose last query stands before a tile has nothing to do with it, and says so.
  int last = __shfl_sync(~0u, min(t.last, mine < 0 ? -1 : mine / TILE_KEYS), 0);
  auto hide = [&](int tile) {
    int first = tile * TILE_KEYS;
    if (first + TILE_KEYS - 1 > t.lowest || (window > 0 && first <= t.end - 1 - window)) mask(s, position, first, window);
  };
  int stage = 0, phase = 0, tile = t.first;
  if (tile <= last) {
    barrier_wait(&b.full[0][0], 0);
    products_begin();
    start_scores(s, queries, keys);
    products_wait<0>();
    if (elected) barrier_arrive(&b.empty[0][0]);
    for (; tile < last; tile++) {
      int next = stage + 1 == STAGES ? 0 : stage + 1, next_phase = stage + 1 == STAGES ? phase ^ 1 : phase;
      hide(tile);
      weigh(w, s, p, scale);
      barrier_wait(&b.full[1][stage], phase);
      barrier_wait(&b.full[0][next], next_phase);
      products_begin();
      start_values(w, p, values + stage * TILE_VECTORS);
      start_scores(s, queries, keys + next * TILE_VECTORS);
      products_wait<0>();
      if (elected) barrier_arrive(&b.empty[1][stage]), barrier_arrive(&b.empty[0][next]);
      stage = next, phase = next_phase;
    }
    hide(tile);
    weigh(w, s, p, scale);
    barrier_wait(&b.full[1][stage], phase);
    products_begin();
    start_values(w, p, values + stage * TILE_VECTORS);
    products_wait<0>();
    if (elected) barrier_arrive(&b.empty[1][stage]);
    tile++;
    stage = stage + 1 == STAGES ? 0 : stage + 1, phase = stage == 0 ? phase ^ 1 : phase;
  }
  for (; tile <= t.last; tile++) {
    for (int kind = 0; kind < 2; kind++) {
      barrier_wait(&b.full[kind][stage], phase);
      if (elected) barrier_arrive(&b.empty[kind][stage]);
    }
    stage = stage + 1 == STAGES ? 0 : stage + 1, phase = stage == 0 ? phase ^ 1 : phase;
  }
}

#endif

extern "C" __global__ void __launch_bounds__((CONSUMERS + 1) * 128, 1)
prefill_wgmma(const uint4* qkv, const uint4* cache, long long values_offset, const int* __restrict__ block_table, int max_blocks,
              const int* __restrict__ rows, const int* __restrict__ q_start, const int* __restrict__ num_scheduled,
              const int* __restrict__ context_lens, const int2* __restrict__ tiles, int window, float scale, u32* __restrict__ out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int ROW_VECTORS = (HEADS + 2 * KV_HEADS) * CHUNKS;
  __shared__ Barriers b;
  int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, group = warp / 4, kv_head = blockIdx.y;
  uint4* keys = shared + CONSUMERS * QUERY_VECTORS;
  uint4* values = keys + STAGES * TILE_VECTORS;
  b.init();
  let_next_start();
  wait_for_previous();
  if (tiles[blockIdx.x].x < 0) return;  // padding of a graph
  Tile t;
  t.row = tiles[blockIdx.x].x, t.first_row = tiles[blockIdx.x].y * TILE_ROWS;
  int count = num_scheduled[t.row];
  t.start = context_lens[t.row] - count;
  t.last_row = min(t.first_row + TILE_ROWS, count * GROUP) - 1;
  t.lowest = t.start + t.first_row / GROUP, t.end = t.start + t.last_row / GROUP + 1;
  t.begin = window > 0 ? max(0, t.lowest - window + 1) : 0;
  t.first = t.begin / TILE_KEYS, t.last = (t.end - 1) / TILE_KEYS;
  t.blocks = block_table + (size_t)rows[t.row] * max_blocks;
  __syncthreads();
  if (group == CONSUMERS) {
    give_registers<HEAD_DIM == 64 ? 32 : 40>();
    int kind = warp % 4 / 2;
    const uint4* from = cache + (size_t)kv_head * BLOCK_SIZE * CHUNKS + (kind ? values_offset : 0);
    produce(b, kind ? values : keys, from, t, kind, warp % 2);
  } else {
    take_registers<HEAD_DIM == 64 ? 160 : 232>();
    uint4* queries = shared + group * QUERY_VECTORS;
    int first = t.first_row + group * 64;
    const uint4* source = qkv + (size_t)q_start[t.row] * ROW_VECTORS + kv_head * GROUP * CHUNKS;
    for (int i = threadIdx.x % 128; i < 64 * CHUNKS; i += 128) {
      int chunk = i % CHUNKS, row = min(first + i / CHUNKS, t.last_row);
      queries[chunk / 8 * 512 + panel_place(i / CHUNKS, chunk % 8)] =
          source[(size_t)(row / GROUP) * ROW_VECTORS + row % GROUP * CHUNKS + chunk];
    }
    publish_to_products();
    warpgroup_sync(group);
    State w = {};
    int row[2], position[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      row[half] = first + warp % 4 * 16 + half * 8 + lane / 4;
      position[half] = t.start + min(row[half], t.last_row) / GROUP;
      w.maximum[half] = -INF;
    }
    int mine = first > t.last_row ? -1 : t.start + min(first + 63, t.last_row) / GROUP;
    consume(b, queries, keys, values, t, position, mine, window, scale, w);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = w.sum[half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (row[half] > t.last_row) continue;
      float inverse = 1.0f / sum;
      u32* to = out + ((size_t)(q_start[t.row] + row[half] / GROUP) * HEADS + kv_head * GROUP + row[half] % GROUP) * (HEAD_DIM / 2);
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 8; j++)
        to[j * 4 + lane % 4] = pack(w.o[4 * j + 2 * half] * inverse, w.o[4 * j + 2 * half + 1] * inverse);
    }
  }
#endif
}
