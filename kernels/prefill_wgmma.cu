// Causal attention of prompt chunks on sm_90a; the same function and promise as prefill_attention.cu. Before the same
// arguments stands the cache once more, as a map of one layer as in prefix_attention.cu.
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
//   3. warps of their own copy (two for keys, two for values, a tile each), so that products never wait for addresses. Blocks of 16
//      tokens lie anywhere in the cache
//   4. whole tiles come by the tensor memory accelerator, 16 tokens a request. Slots outside what is read must be zeros, which
//      cp.async gives for nothing: tiles that the window or the newest query cuts come that way
//   5. scores are asked for before values, and their softmax runs behind the values' products; two warpgroups take turns at the tensor
//      cores, since both at once in their softmax leave them idle (Shah et al. 2024, FlashAttention-3) (this one)
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

// One warp copies keys or values [tile * TILE_KEYS, + TILE_KEYS); those outside [t.begin, t.end) become zero and are not read.
__device__ __forceinline__ void copy_tile(uint4* to, const uint4* from, const Tile& t, int tile) {
  constexpr int LANES = CHUNKS, ROWS = 32 / LANES;  // lanes a token, tokens at a time
  int lane = threadIdx.x % 32, chunk = lane % LANES, row = lane / LANES;
  int place = tile * TILE_KEYS + lane % 8 * 16;
  int mine = place < t.end && place + 16 > t.begin ? t.blocks[place / BLOCK_SIZE] : 0;
  to += chunk / 8 * PANEL_VECTORS;
#pragma unroll 1
  for (int part = 0; part < TILE_KEYS / 16; part++) {
    int first = tile * TILE_KEYS + part * 16;
    size_t block = __shfl_sync(~0u, mine, part);
    const uint4* source = from + (block * KV_HEADS * BLOCK_SIZE + first % BLOCK_SIZE) * CHUNKS + chunk;
#pragma unroll
    for (int i = row; i < 16 + row; i += ROWS) {
      bool valid = first + i >= t.begin && first + i < t.end;
      copy16(to + panel_place(part * 16 + i, chunk % 8), valid ? source + i * CHUNKS : from, valid);
    }
  }
}

// One warp: what it copied is there for products.
__device__ __forceinline__ void hand_over(u64* full) {
  end_group();
  copies_done<0>();
  publish_to_products();
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(full);
}

// One of two warps: every other tile of keys or values.
__device__ __forceinline__ void produce(Barriers& b, uint4* tiles, const uint4* from, const TensorMap& cache, int first_row, const Tile& t,
                                        int kind, int which) {
  for (int n = which, tile = t.first + which; tile <= t.last; n += 2, tile += 2) {
    int stage = n % STAGES;
    barrier_wait(&b.empty[kind][stage], n / STAGES % 2 ^ 1);
    if (tile * TILE_KEYS >= t.begin && (tile + 1) * TILE_KEYS <= t.end) {
      fetch_tile(tiles + stage * TILE_VECTORS, cache, first_row, t.blocks, tile, &b.full[kind][stage]);
    } else {
      copy_tile(tiles + stage * TILE_VECTORS, from, t, tile);
      hand_over(&b.full[kind][stage]);
    }
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

// `group`'s queries. `mine`: the position of its last one, `others` that of the other warpgroup's; below 0: it has none.
__device__ __forceinline__ void consume(Barriers& b, const uint4* queries, const uint4* keys, const uint4* values, const Tile& t,
                                        const int (&position)[2], int group, int mine, int others, int window, float scale, State& w) {
  // A warpgroup whose last query stands before a tile has nothing to do with it, and says so.
  auto last_of = [&](int position) { return __shfl_sync(~0u, min(t.last, position < 0 ? -1 : position / TILE_KEYS), 0); };
  int last = last_of(mine);
  auto hide = [&](float (&s)[64], int tile) {
    int first = tile * TILE_KEYS;
    if (first + TILE_KEYS - 1 > t.lowest || (window > 0 && first <= t.end - 1 - window)) mask(s, position, first, window);
  };
  Turns turns{group, CONSUMERS == 2 ? min(last, last_of(others)) - t.first : 0};
  turns.begin();
  Place at;
  int tile = t.first;
  if (tile <= last) attend(b, queries, keys, values, at, tile, last, hide, turns, scale, w), tile = last + 1;
  for (; tile <= t.last; tile++, at = at.following())
    for (int kind = 0; kind < 2; kind++) {
      barrier_wait(&b.full[kind][at.stage], at.phase);
      if (threadIdx.x % 32 == 0) barrier_arrive(&b.empty[kind][at.stage]);
    }
}

#endif

extern "C" __global__ void __launch_bounds__((CONSUMERS + 1) * 128, 1)
prefill_wgmma(const __grid_constant__ TensorMap cache_map, const uint4* qkv, const uint4* cache, long long values_offset,
              const int* __restrict__ block_table, int max_blocks, const int* __restrict__ rows, const int* __restrict__ q_start,
              const int* __restrict__ num_scheduled, const int* __restrict__ context_lens, const int2* __restrict__ tiles, int window, float scale,
              u32* __restrict__ out) {
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
    int first_row = kv_head * BLOCK_SIZE + (kind ? (int)(values_offset / CHUNKS) : 0);
    produce(b, kind ? values : keys, from, cache_map, first_row, t, kind, warp % 2);
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
    auto last_of = [&](int first) { return first > t.last_row ? -1 : t.start + min(first + 63, t.last_row) / GROUP; };
    int others = last_of(t.first_row + (group ^ 1) * 64);
    consume(b, queries, keys, values, t, position, group, last_of(first), others, window, scale, w);
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
