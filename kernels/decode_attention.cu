// Attention of one new token of each row over its paged cache.
//   out[r, h, :] = sum_p softmax_p(scale * q[r, h] . k[p]) v[p],  p in [max(0, context - window), context)
//
// qkv    [tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM], queries rotated
// cache  one layer, as in qkv_epilogue.cu; block_table int32 [max_rows, max_blocks]
// items  work list of plan_decode (row_state.cu), 8 int32 each: a split of a row, or what its window or prefix leaves of one; num_items[0]
//        of them, the longest first
// -DAFTER_PREFIX: some rows' items begin behind a shared prefix, whose results lie in `partials` (prefix_attention.cu). A build of its
//        own, so that the other one's code does not change
//
// Bound by bytes: the keys and values of all rows, read once. A query head alone would do 1 multiply-add a byte; the GROUP query heads
// that share a KV head are rows of one tensor-core tile, so each key and value is loaded once for all of them.
// Ladder
//   1. one block a (row, head), keys in turn: reads K and V GROUP times; one long row keeps one multiprocessor busy, the rest idle
//   2. split over the sequence, partial results merged exactly by their maxima and sums (Flash-Decoding, Dao et al. 2023)
//   3. all heads of a group share each load; tensor cores do the products, so arithmetic no longer limits large groups
//   4. 16-byte reads without ldmatrix or shuffles: the order of dimensions within q.k, of tokens within p.v, and of output columns
//      is free, and is chosen such that a lane's 16 bytes are its mma operands. (When each lane also copied its own bytes, a
//      quarter warp touched four lines at once and the L2 moved every sector twice: half the speed)
//   5. the last block of a row to finish merges (threadfence and a counter): no second launch
//   6. an item is one record, and the next item's record and first tokens are on their way while this one is finished
//   7. every warp goes its own way through its own tokens of the block's items, so that the copies in flight thin out less at an
//      item's end
//   8. what earlier steps wrote is fetched before the wait, while the QKV product still runs, and the next kernels start once the rest
//      is here: when their weights (25 MB at the 1b shape) are in the memory's queue, every load takes microseconds
//   9. items of 1,024 tokens: merging across blocks is four more trips to memory behind that
//      queue, and takes as long as streaming 100 tokens when the memory is busy (items of 256 instead of 512 cost a quarter of the speed
//      at 256 rows)
//  10. four blocks of four warps a multiprocessor instead of two of eight: while one merges, more others stream. For few rows eight warps
//      still, the same slots
//  11. nobody waits at an item's end. A warp stores its slots' sums, goes on with the next item, and merges the query heads that are its own
//      (decode_merge.cuh) once that item's first tokens are consumed and the next ones under way; until then all met at a barrier, and
//      nothing new was asked for. Block ids come an iteration early for the same reason. In p.v the values are the rows of the product and
//      eight heads its columns: half the products and half the sums, so that a third block fits for HEAD_DIM 128
//  12. items longest first, dealt out forth and back: of rows of 100 to 1,500 tokens in the order of the rows some blocks had half as many
//      tokens again as others, and what is left when most have ended does not fill the memory's queue
//  13. the shortest items are left to blocks that start when the first ones end (decode_layers in kernels/shapes.py)
//  14. where a step has at most 16 tokens, items of 512 for rows of up to sixteen of them, so that a row has twice the blocks; and for few
//      rows, which leave registers for it, sixteen splits come in one trip to memory where they are merged (this one)
//
// Splits lie at absolute positions, and their size follows from how many tokens the row attends to and how many the step has (decode_split
// in kernels/shapes.py); from the latter follows the order of the products' sums, too. So up to 16 tokens, and beyond, a row's result does
// not depend on its neighbours.
#include "barrier.cuh"
#include "decode_merge.cuh"

// A block's tokens go to SLOTS, every SLOTS-th 16 tokens to one. Its WARPS take the slots one after the other, a slot's sums stay apart: a
// result's bits follow from SLOTS and its splits alone. BLOCKS are resident at once; iterations of 16 tokens in flight in each warp: DEPTH.
constexpr int GROUP = HEADS / KV_HEADS;
constexpr int M_TILES = (GROUP + 15) / 16;             // blocks of 16 query heads
constexpr int HALVES = GROUP <= 8 ? 1 : 2;             // of the tile: rows 8..15 may be empty
constexpr int CHUNKS = HEAD_DIM / 8;                   // 16-byte pieces of a key
constexpr int PIECES = 16 * CHUNKS / 32;               // of a lane for 16 keys
#if __CUDA_ARCH__ >= 1000
constexpr int COPIES_UNROLLED = 1;                     // more spill there
#else
constexpr int COPIES_UNROLLED = WARPS < SLOTS ? 2 : PIECES;
#endif
constexpr int TILE_HEADS = GROUP < 16 ? GROUP : 16;    // of its rows, those that hold a query head
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "head_dim must be 64 or 128");
static_assert(BLOCK_SIZE % 16 == 0 && SLOTS % WARPS == 0, "a warp's 16 tokens must lie in one block");

constexpr int STAGE_VECTORS = 2 * PIECES * 32;        // keys, then values of 16 tokens
constexpr int RING_VECTORS = DEPTH * STAGE_VECTORS;   // of a warp

// Shared memory: the rings of all warps, then the slots' results.
//   WARPS * RING_VECTORS * 16 + SLOTS * TILE_HEADS * PARTIAL * 4 bytes
extern __shared__ uint4 shared[];

// A slot's results, with g = lane / 4 and t = lane % 4. Maxima and sums are those of query heads g and g + 8; o[half][j] holds, of heads
// half * 8 + 2t (words 0 and 2) and + 1 (words 1 and 3), columns j / 4 * 64 + g * 8 + j % 4 * 2 (words 0 and 1) and + 1 (words 2 and 3).
struct Running {
  float o[HALVES][HEAD_DIM / 16][4], maximum[HALVES], sum[HALVES];
};

// Where chunk `chunk` of a token lies in a stage. A warp reads keys by (token = lane / 4, chunk = lane % 4) and values by
// (token = 2 * (lane % 4), chunk = lane / 4): with this order neither has two of eight lanes on one bank.
__device__ __forceinline__ int place_of(int token, int chunk) {
  return token * CHUNKS + (chunk ^ (token / 2 % 4 * 2) ^ (token % 2 * 4));
}

// A warp copies 16 tokens, neighbouring lanes neighbouring bytes: a block's tokens of one head are one run of memory.
// EARLY: before the wait, where token `newest` does not stand in the cache yet.
template <bool EARLY>
__device__ __forceinline__ void copy_tokens(uint4* stage, const uint4* keys, const uint4* values, const Walk& walk, int newest = -1) {
  int lane = threadIdx.x % 32, first = walk.token();
  const Item& item = walk.now;
  size_t base = ((size_t)walk.block_id * KV_HEADS * BLOCK_SIZE + first % BLOCK_SIZE) * CHUNKS;
  if (!EARLY && first >= item.begin && first + 16 <= item.end) {
    // All of them, as nearly always: pieces lie 32 apart here and there, but for the exchange within a token.
    const uint4 *k = keys + base + lane, *v = values + base + lane;
    int mine = place_of(lane / CHUNKS, lane % CHUNKS);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      uint4* to = stage + (mine ^ (CHUNKS == 8 ? i % 2 * 4 : i % 4 * 2)) + i * 32;
      copy16(to, k + i * 32), copy16(to + PIECES * 32, v + i * 32);
    }
    return;
  }
#pragma unroll COPIES_UNROLLED
  for (int i = 0; i < PIECES; i++) {
    int at = i * 32 + lane, token = at / CHUNKS;
    bool valid = first + token >= item.begin && first + token < item.end;
    if (EARLY && first + token == newest) continue;
    int place = place_of(token, at % CHUNKS);
    copy16(stage + place, keys + (valid ? base + at : 0), valid);
    copy16(stage + PIECES * 32 + place, values + (valid ? base + at : 0), valid);
  }
}

// One token of a stage, from block `block` of the cache.
__device__ __forceinline__ void copy_token(uint4* stage, const uint4* keys, const uint4* values, int token, size_t block) {
  int lane = threadIdx.x % 32, chunk = lane % CHUNKS;
  if (lane >= 2 * CHUNKS) return;
  size_t from = (block * KV_HEADS * BLOCK_SIZE + token % BLOCK_SIZE) * CHUNKS + chunk;
  copy16(stage + (lane < CHUNKS ? 0 : PIECES * 32) + place_of(token % 16, chunk), (lane < CHUNKS ? keys : values) + from, true);
}

__device__ __forceinline__ void load_query(uint4 (&q)[HEAD_DIM / 32][2], const uint4* qkv, const Item& item, int first_head, int heads) {
  constexpr int ROW_VECTORS = (HEADS + 2 * KV_HEADS) * HEAD_DIM / 8;
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint4* query = qkv + (size_t)item.token * ROW_VECTORS + first_head * (HEAD_DIM / 8);
#pragma unroll
  for (int c = 0; c < HEAD_DIM / 32; c++) {
    q[c][0] = g < heads ? query[g * (HEAD_DIM / 8) + c * 4 + t] : make_uint4(0, 0, 0, 0);
    q[c][1] = HALVES == 2 && g + 8 < heads ? query[(g + 8) * (HEAD_DIM / 8) + c * 4 + t] : make_uint4(0, 0, 0, 0);
  }
}

// The lines of an item's queries come into L1, where load_query finds them when the item's turn comes: whoever waits for memory then has
// nothing new on its way. Until `arrived_in` nobody waits.
__device__ __forceinline__ u32 touch_query(const uint4* qkv, const Item& item, int first_head, int heads) {
  constexpr int ROW_VECTORS = (HEADS + 2 * KV_HEADS) * HEAD_DIM / 8;
  u32 word = 0;
  int lane = threadIdx.x % 32;
  if (lane < heads * (HEAD_DIM / 64)) load_word(word, qkv + (size_t)item.token * ROW_VECTORS + first_head * (HEAD_DIM / 8) + lane * 8);
  return word;
}

// Scores of 16 tokens: s[h][0..1] belong to query row g and tokens h * 8 + 2t, +1; s[h][2..3] to row g + 8.
__device__ __forceinline__ void scores(float (&s)[2][4], const uint4* stage, const uint4 (&q)[HEAD_DIM / 32][2]) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int c = 0; c < HEAD_DIM / 32; c++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      uint4 k = stage[place_of(h * 8 + g, c * 4 + t)];
      mma(s[h], make_uint4(q[c][0].x, q[c][1].x, q[c][0].y, q[c][1].y), k.x, k.y);
      mma(s[h], make_uint4(q[c][0].z, q[c][1].z, q[c][0].w, q[c][1].w), k.z, k.w);
    }
  }
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Online softmax (Milakov and Gimelshein 2018): rescale what is there when the maximum grows, then add p = exp2(s - maximum).
__device__ __forceinline__ void soften(Running& run, float (&s)[2][4], int first, const Item& item, float scale) {
  int t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < HALVES; half++) {
    float best = run.maximum[half];
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        int token = first + h * 8 + 2 * t + e;
        float& x = s[h][half * 2 + e];
        x = token >= item.begin && token < item.end ? x * scale : -INF;
        best = fmaxf(best, x);
      }
    best = quad_max(best);
    float base = best == -INF ? 0.0f : best, shrink = exp2_fast(run.maximum[half] - base);
    run.maximum[half] = best;
    run.sum[half] *= shrink;
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float& x = s[h][half * 2 + e];
        x = exp2_fast(x - base);
        run.sum[half] += x;
      }
    float even = __shfl_sync(~0u, shrink, 8 * t), odd = __shfl_sync(~0u, shrink, 8 * t + 4);  // of heads 2t and 2t + 1
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 16; j++) {
      float(&o)[4] = run.o[half][j];
      o[0] *= even, o[1] *= odd, o[2] *= even, o[3] *= odd;
    }
  }
}

// Values as the rows of the product and heads as its columns: eight heads fill it, and their weights stand where the scores left them.
__device__ __forceinline__ void add_values(Running& run, const float (&s)[2][4], const uint4* stage) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  u32 p[HALVES][2];
#pragma unroll
  for (int half = 0; half < HALVES; half++)
#pragma unroll
    for (int h = 0; h < 2; h++) p[half][h] = pack(s[h][half * 2], s[h][half * 2 + 1]);
#pragma unroll
  for (int part = 0; part < HEAD_DIM / 64; part++) {
    uint4 v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = stage[PIECES * 32 + place_of(2 * t + i % 2 + i / 2 * 8, part * 8 + g)];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      // Dimensions 2j and 2j + 1 of this lane's eight: pairs of neighbouring tokens go into one register.
      auto word = [&](int i) { return j == 0 ? v[i].x : j == 1 ? v[i].y : j == 2 ? v[i].z : v[i].w; };
      uint4 a = make_uint4(__byte_perm(word(0), word(1), 0x5410), __byte_perm(word(0), word(1), 0x7632),
                           __byte_perm(word(2), word(3), 0x5410), __byte_perm(word(2), word(3), 0x7632));
#pragma unroll
      for (int half = 0; half < HALVES; half++) mma(run.o[half][part * 4 + j], a, p[half][0], p[half][1]);
    }
  }
}

__device__ __forceinline__ float* slot_results() { return reinterpret_cast<float*>(shared + WARPS * RING_VECTORS); }

__device__ __forceinline__ void store_slot(const Running& run, int slot) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < HALVES; half++) {
    float sum = run.sum[half];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    float* head = slot_results() + (slot * TILE_HEADS + half * 8) * PARTIAL;
    if (t == 0 && half * 8 + g < TILE_HEADS) head[g * PARTIAL + HEAD_DIM] = run.maximum[half], head[g * PARTIAL + HEAD_DIM + 1] = sum;
#pragma unroll
    for (int e = 0; e < 2; e++) {
      if (half * 8 + 2 * t + e >= TILE_HEADS) continue;
      float2* mine = reinterpret_cast<float2*>(head + (2 * t + e) * PARTIAL);
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 16; j++)
        mine[j / 4 * 32 + g * 4 + j % 4] = make_float2(run.o[half][j][e], run.o[half][j][2 + e]);
    }
  }
}

// RULE: the kernel before this one in the stream lets this one start only after its own wait (qkv_epilogue, matvec_qkv,
// prefix_attention). So what older kernels wrote (the work list, the block table, the cache without this step's tokens) may be read
// before the wait.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
decode_attention(const uint4* qkv, const uint4* cache, long long values_offset, const int* block_table, int max_blocks,
                 const int4* items, const int* num_items, float scale, float* partials, int* arrived, elem* __restrict__ out) {
  constexpr int STRIDE = HEADS * PARTIAL / 2;  // float2 from one item's partials to the next's
  int warp = threadIdx.x / 32;
  int kv_head = blockIdx.y / M_TILES, tile = blockIdx.y % M_TILES;
  int heads = min(GROUP - tile * 16, 16), first_head = kv_head * GROUP + tile * 16;
  const uint4* keys = cache + (size_t)kv_head * BLOCK_SIZE * CHUNKS;
  const uint4* values = keys + values_offset;
  uint4* ring = shared + warp * RING_VECTORS;
  // A phase an item: all threads have stored its slots' results, all have read them. Every lane arrives: one for its warp, behind
  // __syncwarp, would do and is no faster, but compute-sanitizer's racecheck does not follow it.
  __shared__ u64 stored, merged;
  bool next_may_start = false;
  Deal mine = deal(__ldcg(num_items));
  int count = mine.end;
  if (mine.first >= count) {
    if (blockIdx.x == 0 && blockIdx.z == 0) wait_for_previous();  // some block must: this kernel's end implies the end of all before it
    return;
  }
  if (threadIdx.x == 0) barrier_init(&stored, WARPS * 32), barrier_init(&merged, WARPS * 32);
  Walk fed;
  fed.start(items, mine, block_table, max_blocks);
  Item item = fed.now, next = fed.next;
  fed.skip();
  // The newest token of a row, in its last split, is this step's: it is fetched after the wait, by the warp whose it is.
  bool newest_here = item.split() == item.splits() - 1;
  int newest = newest_here ? item.end - 1 : -1, newest_stage = -1, early = 0;
  size_t newest_block = newest_here ? __ldcg(item.blocks + newest / BLOCK_SIZE) : 0;
  for (; early < DEPTH && fed.more() && fed.at == mine.first; early++, fed.next_iteration()) {
    int first = fed.token();
    copy_tokens<true>(ring + early * STAGE_VECTORS, keys, values, fed, newest);
    if (first <= newest && newest < first + 16) newest_stage = early;
  }
  __syncthreads();  // the barriers are there
  wait_for_previous();
  if (newest_stage >= 0) copy_token(ring + newest_stage * STAGE_VECTORS, keys, values, newest, newest_block);
  for (int i = early; i < DEPTH && fed.more(); i++, fed.next_iteration())
    copy_tokens<false>(ring + i * STAGE_VECTORS, keys, values, fed);
#pragma unroll
  for (int i = 0; i < DEPTH; i++) end_group();  // all in the first; the others are empty
  uint4 q[HEAD_DIM / 32][2];
  load_query(q, qkv, item, first_head, heads);
  // A turn for each item of the block, and one more to merge the last one. `before` is the item whose slots have been stored and not
  // merged; `parity` that of its phases.
  Item before = item;
  int place = 0, at = mine.first, stride = first_stride(), parity = 1;
  bool to_merge = false;
#pragma unroll 1
  for (;;) {
    bool live = at < count, more = at + stride < count;
    u32 touched = more ? touch_query(qkv, next, first_head, heads) : 0;
#pragma unroll 1
    for (int slot = warp; slot < SLOTS; slot += WARPS) {
      Running run = {};
#pragma unroll
      for (int half = 0; half < HALVES; half++) run.maximum[half] = -INF;
      int i = live ? item.first_iteration(slot) : 0, end = live ? item.end_iteration(slot) : 0;
#pragma unroll 1
      do {
        if (i < end) {
          copies_done<DEPTH - 1>();
          __syncwarp();  // of all lanes
          uint4* stage = ring + place * STAGE_VECTORS;
          float s[2][4] = {};
          scores(s, stage, q);
          soften(run, s, item.token_of(slot, i), item, scale);
          add_values(run, s, stage);
          // Only now that the query and the newest token are here, so that they do not stand behind the next kernels' weights.
          if (!next_may_start) let_next_start(), next_may_start = true;
          __syncwarp();  // the stage has been read
          if (fed.more()) {
            copy_tokens<false>(stage, keys, values, fed);
            fed.next_iteration();
          }
          end_group();  // also where it is empty: the count of pending groups stays the same
          place = (place + 1) % DEPTH;
        }
        // Here the next tokens are on their way, and the other warps have had an iteration's time to come so far.
        if (to_merge) {
          to_merge = false;
          barrier_wait(&stored, parity);
          for (int head = warp; head < heads; head += WARPS)
            finish_head<STRIDE>(merge_slots(slot_results() + head * PARTIAL, TILE_HEADS * PARTIAL), before,
                                reinterpret_cast<float2*>(partials) + (first_head + head) * (PARTIAL / 2),
                                arrived + before.row * HEADS + first_head + head,
                                out + ((size_t)before.token * HEADS + first_head + head) * HEAD_DIM);
          barrier_arrive(&merged);
        }
      } while (++i < end);
      // Nothing is loaded in vain: a block does not end before its loads, which stand behind the next kernels' weights.
      if (!live) return;
      if (slot + WARPS >= SLOTS && more) arrived_in(touched), load_query(q, qkv, next, first_head, heads);
      barrier_wait(&merged, parity);  // at the first item that of the phase before the first
      store_slot(run, slot);
    }
    barrier_arrive(&stored);
    before = item, item = next, to_merge = true;
    at += stride, stride = other_stride(stride), parity ^= 1;
    if (at + stride < count) next = load_item(items, at + stride, block_table, max_blocks);
  }
}
