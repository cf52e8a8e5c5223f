// Attention of single new tokens over a prefix that many rows share, whose keys and values are read once for all of them (Hydragen,
// Juravsky et al. 2024; FlashInfer's cascade). Leaves what decode_attention merges with each row's own tokens.
//   partial[slot, h, :] = sum_p 2^(s_p - m) v[p],  m = max_p s_p,  sum_p 2^(s_p - m);   s_p = scale * q[row, h] . k[p],  p in [begin, end)
//
// qkv    [tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM], queries rotated
// cache  a map of one layer, as in qkv_epilogue.cu, as rows of HEAD_DIM, 16 at a time; values_row: the first one of values
// block_table int32 [max_rows, max_blocks]
// works  8 int32 each, num_works[0] of them: a tile of pairs (row of a group, query head) and a part of the group's prefix, as
//        (permanent row whose blocks are read, begin, end, tile), (the group's first place in `query_tokens`, its rows,
//        slot of its first row for this part, slots from one row to the next). begin and end are multiples of 128
// query_tokens int32: of the groups' rows, one group behind another; partials as in decode_attention.cu
//
// Bound by operations: 4 * HEAD_DIM * prefix * rows * HEADS a layer. decode_attention has 1 or 2 rows in 8 of its tensor-core tiles
// filled for a group of query heads, and reads the prefix once for each row, 128 times for 128 rows, from the L2 cache at best.
// Ladder
//   1. decode attention: a row's prefix is its own
//   2. rows are stacked: pairs (row, query head) of one KV head are the queries of a tile, and the prefix is cut into parts so that few
//      tiles fill the chip; what the parts leave is added up where decode attention adds up its splits anyway
//   3. the products of prefill_wgmma.cu without a mask: prefix and parts are whole tiles of keys, all of them older than the step
//   4. blocks walk over the works, so that the grid of a CUDA graph fits any number of them; keys and values of the next work come while
//      this one is stored, and those of the first before the wait, while the QKV product still runs
//   5. the tensor memory accelerator brings them, and softmax and products overlap as in prefill_wgmma.cu (this one)
//
// The parts follow from the prefix and the number of rows that share it (worker/backends/shared_prefix.py), and so do a row's bits.
#include "attention_tiles.cuh"

constexpr int PARTIAL = HEAD_DIM + 2;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct Work {
  int row, first_tile, end_tile;    // permanent row whose blocks are read; KV tiles
  int first, last;                  // pair of the tile's first query; the group's last pair
  int tokens, slot, stride;

  // The lists are older than the kernel before this one, and L1 may hold those of an older step.
  __device__ static Work load(const int4* works, int at) {
    int4 a = __ldcg(works + 2 * at), b = __ldcg(works + 2 * at + 1);
    return Work{a.x, a.y / TILE_KEYS, a.z / TILE_KEYS, a.w * TILE_ROWS, b.y * GROUP - 1, b.x, b.z, b.w};
  }
};

// A row of the block table. L1 may hold that of an older step.
struct Blocks {
  const int* of_row;
  __device__ int operator[](int i) const { return __ldcg(of_row + i); }
};

// One of two warps: every other tile of keys or values of all works of the block.
__device__ __forceinline__ void produce(Barriers& b, uint4* tiles, const TensorMap& cache, int first_row, const int* block_table,
                                        int max_blocks, const int4* works, int total, int kind, int which) {
  int n = 0;
#pragma unroll 1
  for (int at = blockIdx.x; at < total; at += gridDim.x) {
    Work w = Work::load(works, at / KV_HEADS);
    Blocks blocks{block_table + (size_t)w.row * max_blocks};
#pragma unroll 1
    for (int tile = w.first_tile; tile < w.end_tile; tile++, n++) {
      if (n % 2 != which) continue;
      int stage = n % STAGES;
      barrier_wait(&b.empty[kind][stage], n / STAGES % 2 ^ 1);
      fetch_tile(tiles + stage * TILE_VECTORS, cache, first_row + at % KV_HEADS * BLOCK_SIZE, blocks, tile, &b.full[kind][stage]);
    }
  }
}

__device__ __forceinline__ void load_queries(uint4* queries, const uint4* qkv, const int* query_tokens, const Work& w, int first,
                                             int kv_head) {
  constexpr int ROW_VECTORS = (HEADS + 2 * KV_HEADS) * CHUNKS;
#pragma unroll
  for (int n = 0; n < CHUNKS / 2; n++) {
    int i = n * 128 + threadIdx.x % 128, chunk = i % CHUNKS, pair = min(first + i / CHUNKS, w.last);
    size_t token = __ldcg(query_tokens + w.tokens + pair / GROUP);
    queries[chunk / 8 * 512 + panel_place(i / CHUNKS, chunk % 8)] =
        qkv[token * ROW_VECTORS + (kv_head * GROUP + pair % GROUP) * CHUNKS + chunk];
  }
}

__device__ __forceinline__ void store(const State& state, const Work& w, int first, int kv_head, float* partials) {
  int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum = state.sum[half];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    int pair = first + warp * 16 + half * 8 + lane / 4;
    if (pair > w.last) continue;
    size_t slot = w.slot + pair / GROUP * w.stride;
    float2* to = reinterpret_cast<float2*>(partials + (slot * HEADS + kv_head * GROUP + pair % GROUP) * PARTIAL);
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; j++)
      to[j * 4 + lane % 4] = make_float2(state.o[4 * j + 2 * half], state.o[4 * j + 2 * half + 1]);
    if (lane % 4 == 0) to[HEAD_DIM / 2] = make_float2(state.maximum[half], sum);
  }
}

#endif

// RULE: the kernel before this one in the stream lets this one start only after its own wait, as before decode_attention; and this one does
// so for decode_attention, which stands behind it.
extern "C" __global__ void __launch_bounds__((CONSUMERS + 1) * 128, 1)
prefix_attention(const __grid_constant__ TensorMap cache, const uint4* qkv, int values_row, const int* block_table, int max_blocks,
                 const int4* works, const int* num_works, const int* query_tokens, float scale, float* partials) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ Barriers b;
  int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), group = warp / 4;
  uint4* keys = shared + CONSUMERS * QUERY_VECTORS;
  uint4* values = keys + STAGES * TILE_VECTORS;
  int total = __ldcg(num_works) * KV_HEADS;
  b.init();
  __syncthreads();
  if (group == CONSUMERS) {
    give_registers<HEAD_DIM == 64 ? 32 : 40>();
    int kind = warp % 4 / 2;
    produce(b, kind ? values : keys, cache, kind ? values_row : 0, block_table, max_blocks, works, total, kind, warp % 2);
  } else {
    take_registers<HEAD_DIM == 64 ? 160 : 232>();
    wait_for_previous();
    let_next_start();
    uint4* queries = shared + group * QUERY_VECTORS;
    Place place;
#pragma unroll 1
    for (int at = blockIdx.x; at < total; at += gridDim.x) {
      Work w = Work::load(works, at / KV_HEADS);
      int kv_head = at % KV_HEADS, first = w.first + group * 64;
      warpgroup_sync(group);  // the work before this one has read its queries
      load_queries(queries, qkv, query_tokens, w, first, kv_head);
      publish_to_products();
      warpgroup_sync(group);
      State state = {};
      state.maximum[0] = state.maximum[1] = -INF;
      int last = w.end_tile - 1;
      Turns turns{group, CONSUMERS == 2 ? last - w.first_tile : 0};
      turns.begin();
      // A part has a tile; the condition makes the assembler keep the sums in one place, where it would spill 31 registers otherwise.
      if (w.first_tile <= last) attend(b, queries, keys, values, place, w.first_tile, last, [](float (&)[64], int) {}, turns, scale, state);
      store(state, w, first, kv_head, partials);
      __syncwarp();  // lanes without a pair have not stored
    }
  }
#endif
}
