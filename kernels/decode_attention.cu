// Attention of one new token of each row over its paged cache.
//   out[r, h, :] = sum_p softmax_p(scale * q[r, h] . k[p]) v[p],  p in [max(0, context - window), context)
//
// qkv    [tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM], queries rotated
// cache  one layer, as in qkv_epilogue.cu; block_table int32 [max_rows, max_blocks]
// items  work list of plan_decode (row_state.cu), 8 int32 each: SPLIT tokens of a row at an absolute position; num_items[0] of them
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
//   7. every warp goes its own way through its own tokens of the block's items, so that the copies in flight never thin out at an
//      item's end
//   8. what earlier steps wrote is fetched before the wait, while the QKV product still runs, and the next kernels start once the rest
//      is here: when their weights (25 MB at the 1b shape) are in the memory's queue, every load takes microseconds
//   9. items of 1,024 tokens for HEAD_DIM 64: merging across blocks is four more trips to memory behind that
//      queue, and takes as long as streaming 100 tokens when the memory is busy (items of 256 instead of 512 cost a quarter of the speed
//      at 256 rows)
//  10. four blocks of four warps a multiprocessor instead of two of eight: while one merges, more others stream. For few rows eight warps
//      still, the same slots (this one)
//
// The split size is fixed and splits lie at absolute positions, so a row's result does not depend on its neighbours.
#include "common.cuh"

// A block's tokens go to SLOTS, every SLOTS-th 16 tokens to one. Its WARPS take the slots one after the other, a slot's sums stay apart: a
// result's bits follow from SLOTS and SPLIT alone. BLOCKS are resident at once; iterations of 16 tokens in flight in each warp: DEPTH.
constexpr int GROUP = HEADS / KV_HEADS;
constexpr int M_TILES = (GROUP + 15) / 16;             // blocks of 16 query heads
constexpr bool HALF_TILE = GROUP <= 8;                 // rows 8..15 of the tile are empty
constexpr int CHUNKS = HEAD_DIM / 8;                   // 16-byte pieces of a key
constexpr int PIECES = 16 * CHUNKS / 32;               // of a lane for 16 keys
#if __CUDA_ARCH__ >= 1000
constexpr int COPIES_UNROLLED = 2;                     // more spill there
#else
constexpr int COPIES_UNROLLED = WARPS < SLOTS ? 2 : PIECES;
#endif
constexpr int N_TILES = HEAD_DIM / 8;
constexpr int STEP = 16 * SLOTS;                       // tokens of a block in one iteration
constexpr int TILE_ROWS = HALF_TILE ? 8 : 16;
constexpr int PARTIAL = HEAD_DIM + 2;                  // unnormalised output, maximum (base 2), sum
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "head_dim must be 64 or 128");
static_assert(BLOCK_SIZE % 16 == 0 && SPLIT % STEP == 0 && SLOTS % WARPS == 0, "a warp's 16 tokens must lie in one block");

constexpr int STAGE_VECTORS = 2 * PIECES * 32;        // keys, then values of 16 tokens
constexpr int RING_VECTORS = DEPTH * STAGE_VECTORS;   // of a warp

// Shared memory: the rings of all warps, then the slots' results, then the block's maxima and sums.
//   WARPS * RING_VECTORS * 16 + SLOTS * TILE_ROWS * PARTIAL * 4 + TILE_ROWS * 8 bytes
extern __shared__ uint4 shared[];

// Words 0 to 6 of an item, as plan_decode writes them; word 5 names the permanent row.
struct Item {
  int row, begin, end, token;  // row of the step, tokens [begin, end) of the split, the query's token
  int first_item, splits;      // of the row
  const int* blocks;
#ifdef AFTER_PREFIX
  int prefix;                  // word 7: slot of the row's first result of prefix_attention * 32 + how many; 0: none
#else
  static constexpr int prefix = 0;
#endif

  // Slots lie at absolute positions; what lies outside [begin, end) is left out.
  __device__ int token_of(int slot, int iteration) const { return begin / SPLIT * SPLIT + iteration * STEP + slot * 16; }
  __device__ int first_iteration(int slot) const { return (begin % SPLIT / 16 + SLOTS - 1 - slot) / SLOTS; }
  __device__ int iterations(int slot) const { return ((end - 1) % SPLIT / 16 + SLOTS - slot) / SLOTS; }
};

__device__ __forceinline__ Item load_item(const int4* items, int at, const int* block_table, int max_blocks) {
  int4 a = __ldcg(items + 2 * at), b = __ldcg(items + 2 * at + 1);
  Item item{a.x, a.y, a.z, a.w, b.x, b.z, block_table + (size_t)b.y * max_blocks};
#ifdef AFTER_PREFIX
  item.prefix = b.w;
#endif
  return item;
}

// Walks over the block's items blockIdx.x, + gridDim.x, ..., and this warp's slots of each, an iteration at a time. The next item's record is
// loaded an item early.
struct Walk {
  const int4* items;
  const int* block_table;
  int max_blocks, at, count, slot, iteration;
  Item now, next;

  __device__ __forceinline__ void start(const int4* list, int length, const int* table, int columns) {
    items = list, block_table = table, max_blocks = columns, count = length, at = blockIdx.x;
    now = load_item(items, at, block_table, max_blocks);
    enter();
  }
  __device__ __forceinline__ bool more() const { return at < count; }
  __device__ __forceinline__ void next_item() {
    at += gridDim.x, now = next;
    enter();
  }
  __device__ __forceinline__ void next_iteration() { iteration++, skip(); }
  __device__ __forceinline__ void skip() {  // slots and items that have nothing for this warp
    while (more() && iteration >= now.iterations(slot)) {
      if (slot + WARPS < SLOTS) enter_slot(slot + WARPS);
      else next_item();
    }
  }
  __device__ __forceinline__ int token() const { return now.token_of(slot, iteration); }
  __device__ __forceinline__ void enter_slot(int which) { slot = which, iteration = now.first_iteration(slot); }
  __device__ __forceinline__ void enter() {
    enter_slot(threadIdx.x / 32);
    next = load_item(items, min(at + (int)gridDim.x, count - 1), block_table, max_blocks);
  }
};

// A slot's results: o[j] holds output column (g' * 8 + j % 8) of half j / 8, where g' is the mma's column index.
struct Running {
  float o[N_TILES][4], maximum[2], sum[2];
};

// Where chunk `chunk` of a token lies in a stage. A warp reads keys by (token = lane / 4, chunk = lane % 4) and values by
// (token = 2 * (lane % 4), chunk = lane / 4): with this order neither has two of eight lanes on one bank.
__device__ __forceinline__ int place_of(int token, int chunk) {
  return token * CHUNKS + (chunk ^ (token / 2 % 4 * 2) ^ (token % 2 * 4));
}

// A warp copies 16 tokens, neighbouring lanes neighbouring bytes: a block's tokens of one head are one run of memory.
// EARLY: before the wait, where L1 may hold an older step's block table, and token `newest` does not stand in the cache yet.
template <bool EARLY>
__device__ __forceinline__ void copy_tokens(uint4* stage, const uint4* keys, const uint4* values, const Item& item, int first,
                                            int newest = -1) {
  int lane = threadIdx.x % 32;
  const int* block_id = item.blocks + first / BLOCK_SIZE;
  size_t block = EARLY ? __ldcg(block_id) : *block_id;
  size_t base = (block * KV_HEADS * BLOCK_SIZE + first % BLOCK_SIZE) * CHUNKS;
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
    q[c][1] = !HALF_TILE && g + 8 < heads ? query[(g + 8) * (HEAD_DIM / 8) + c * 4 + t] : make_uint4(0, 0, 0, 0);
  }
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
  for (int half = 0; half < (HALF_TILE ? 1 : 2); half++) {
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
#pragma unroll
    for (int j = 0; j < N_TILES; j++) run.o[j][half * 2] *= shrink, run.o[j][half * 2 + 1] *= shrink;
  }
}

__device__ __forceinline__ void add_values(Running& run, const float (&s)[2][4], const uint4* stage) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  uint4 p = make_uint4(pack(s[0][0], s[0][1]), HALF_TILE ? 0 : pack(s[0][2], s[0][3]), pack(s[1][0], s[1][1]),
                       HALF_TILE ? 0 : pack(s[1][2], s[1][3]));
#pragma unroll
  for (int half = 0; half < HEAD_DIM / 64; half++) {
    uint4 v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = stage[PIECES * 32 + place_of(2 * t + i % 2 + i / 2 * 8, half * 8 + g)];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      // Dimension j of this lane's eight: pairs of neighbouring tokens go into one register.
      auto word = [&](int i) { return j < 4 ? (j < 2 ? v[i].x : v[i].y) : (j < 6 ? v[i].z : v[i].w); };
      u32 pick = j % 2 ? 0x7632 : 0x5410;
      mma(run.o[half * 8 + j], p, __byte_perm(word(0), word(1), pick), __byte_perm(word(2), word(3), pick));
    }
  }
}

// The block's result for a split: element (row, d) at values[row * PARTIAL + d], maximum and sum at stats[row].
struct Merged {
  const float* values;
  const float2* stats;
};

__device__ __forceinline__ float* slot_results() { return reinterpret_cast<float*>(shared + WARPS * RING_VECTORS); }

__device__ __forceinline__ void store_slot(Running& run, int slot) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < (HALF_TILE ? 1 : 2); half++) {
    float sum = run.sum[half];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    float* mine = slot_results() + (slot * TILE_ROWS + half * 8 + g) * PARTIAL;
#pragma unroll
    for (int j = 0; j < N_TILES; j++) {
      // Column 2t + e of tile j is dimension (2t + e) * 8 + j % 8 of the half.
      mine[j / 8 * 64 + 2 * t * 8 + j % 8] = run.o[j][half * 2];
      mine[j / 8 * 64 + (2 * t + 1) * 8 + j % 8] = run.o[j][half * 2 + 1];
    }
    if (t == 0) mine[HEAD_DIM] = run.maximum[half], mine[HEAD_DIM + 1] = sum;
  }
}

__device__ __forceinline__ Merged merge_slots() {
  float* parts = slot_results();
  float2* stats = reinterpret_cast<float2*>(parts + SLOTS * TILE_ROWS * PARTIAL);
  __syncthreads();
  for (int i = threadIdx.x; i < TILE_ROWS * HEAD_DIM; i += WARPS * 32) {
    int row = i / HEAD_DIM, d = i % HEAD_DIM;
    float best = -INF, value = 0, sum = 0;
#pragma unroll
    for (int w = 0; w < SLOTS; w++) best = fmaxf(best, parts[(w * TILE_ROWS + row) * PARTIAL + HEAD_DIM]);
    float base = best == -INF ? 0.0f : best;
#pragma unroll
    for (int w = 0; w < SLOTS; w++) {
      const float* part = parts + (w * TILE_ROWS + row) * PARTIAL;
      float weight = exp2_fast(part[HEAD_DIM] - base);
      value = fmaf(part[d], weight, value);
      sum = fmaf(part[HEAD_DIM + 1], weight, sum);
    }
    parts[row * PARTIAL + d] = value;  // in place of slot 0's, which nobody else reads
    if (d == 0) stats[row] = make_float2(best, sum);
  }
  __syncthreads();
  return Merged{parts, stats};
}

// out[h] for the group's heads, from `count` partial results in a fixed order.
__device__ __forceinline__ void merge_splits(const float* partials, int count, size_t stride, int heads, elem* out) {
  for (int i = threadIdx.x; i < heads * HEAD_DIM; i += WARPS * 32) {
    int head = i / HEAD_DIM, d = i % HEAD_DIM;
    const float* part = partials + head * PARTIAL;
    float best = -INF, value = 0, sum = 0;
#pragma unroll 4
    for (int s = 0; s < count; s++) {
      float maximum = __ldcg(part + s * stride + HEAD_DIM);
      float next = fmaxf(best, maximum), base = next == -INF ? 0.0f : next;
      float shrink = exp2_fast(best - base), weight = exp2_fast(maximum - base);
      value = value * shrink + __ldcg(part + s * stride + d) * weight;
      sum = sum * shrink + __ldcg(part + s * stride + HEAD_DIM + 1) * weight;
      best = next;
    }
    out[i] = to_elem(value / sum);
  }
}

// The same for a row whose prefix prefix_attention has read: its own results, from `result` where they are one split's, then the prefix's.
// Rows have few tokens of their own then, and a block spends its time here: four columns a thread, so that all loads are one round trip.
__device__ __forceinline__ void merge_with_prefix(const Merged& result, const Item& item, const float* partials, size_t stride, int heads,
                                                  elem* out) {
  for (int i = threadIdx.x; i < heads * HEAD_DIM / 4; i += WARPS * 32) {
    int head = i / (HEAD_DIM / 4), pair = i % (HEAD_DIM / 4) * 2;
    float best = -INF, sum = 0, value[4] = {};
    auto add = [&](float2 stats, float2 low, float2 high) {
      float next = fmaxf(best, stats.x), base = next == -INF ? 0.0f : next;
      float shrink = exp2_fast(best - base), weight = exp2_fast(stats.x - base);
      value[0] = value[0] * shrink + low.x * weight, value[1] = value[1] * shrink + low.y * weight;
      value[2] = value[2] * shrink + high.x * weight, value[3] = value[3] * shrink + high.y * weight;
      sum = sum * shrink + stats.y * weight;
      best = next;
    };
    auto add_slots = [&](int slot, int count) {
      const float2* part = reinterpret_cast<const float2*>(partials + slot * stride + head * PARTIAL);
#pragma unroll 4
      for (int s = 0; s < count; s++, part += stride / 2) add(__ldcg(part + HEAD_DIM / 2), __ldcg(part + pair), __ldcg(part + pair + 1));
    };
    const float2* own = reinterpret_cast<const float2*>(result.values + head * PARTIAL);
    if (item.splits == 1) add(result.stats[head], own[pair], own[pair + 1]);
    else add_slots(item.first_item, item.splits);
    add_slots(item.prefix / 32, item.prefix % 32);
    reinterpret_cast<uint2*>(out)[i] = make_uint2(pack(value[0] / sum, value[1] / sum), pack(value[2] / sum, value[3] / sum));
  }
}

// RULE: the kernel before this one in the stream lets this one start only after its own wait (qkv_epilogue, matvec_qkv,
// prefix_attention). So what older kernels wrote (the work list, the block table, the cache without this step's tokens) may be read
// before the wait.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
decode_attention(const uint4* qkv, const uint4* cache, long long values_offset, const int* block_table, int max_blocks,
                 const int4* items, const int* num_items, float scale, float* partials, int* arrived, elem* __restrict__ out) {
  constexpr size_t STRIDE = (size_t)HEADS * PARTIAL;
  int warp = threadIdx.x / 32;
  int kv_head = blockIdx.y / M_TILES, tile = blockIdx.y % M_TILES;
  int heads = min(GROUP - tile * 16, 16), first_head = kv_head * GROUP + tile * 16;
  const uint4* keys = cache + (size_t)kv_head * BLOCK_SIZE * CHUNKS;
  const uint4* values = keys + values_offset;
  uint4* ring = shared + warp * RING_VECTORS;
  __shared__ int last;
  bool next_may_start = false;
  int count = __ldcg(num_items);
  if (blockIdx.x >= count) {
    if (blockIdx.x == 0) wait_for_previous();  // some block must: this kernel's end implies the end of all before it
    return;
  }
  Walk fed, eaten;
  fed.start(items, count, block_table, max_blocks);
  eaten = fed;
  fed.skip();
  // The newest token of a row, in its last split, is this step's: it is fetched after the wait, by the warp whose it is.
  bool newest_here = (int)blockIdx.x - fed.now.first_item == fed.now.splits - 1;
  int newest = newest_here ? fed.now.end - 1 : -1, newest_stage = -1, early = 0;
  size_t newest_block = newest_here ? __ldcg(fed.now.blocks + newest / BLOCK_SIZE) : 0;
  for (; early < DEPTH && fed.more() && fed.at == blockIdx.x; early++, fed.next_iteration()) {
    int first = fed.token();
    copy_tokens<true>(ring + early * STAGE_VECTORS, keys, values, fed.now, first, newest);
    if (first <= newest && newest < first + 16) newest_stage = early;
  }
  wait_for_previous();
  if (newest_stage >= 0) copy_token(ring + newest_stage * STAGE_VECTORS, keys, values, newest, newest_block);
  for (int i = early; i < DEPTH && fed.more(); i++, fed.next_iteration())
    copy_tokens<false>(ring + i * STAGE_VECTORS, keys, values, fed.now, fed.token());
#pragma unroll
  for (int i = 0; i < DEPTH; i++) end_group();  // all in the first; the others are empty
  uint4 q[HEAD_DIM / 32][2];
  load_query(q, qkv, eaten.now, first_head, heads);
  for (int place = 0;;) {
    const Item& item = eaten.now;
#pragma unroll 1
    for (int slot = warp; slot < SLOTS; slot += WARPS) {
      Running run = {};
      run.maximum[0] = run.maximum[1] = -INF;
#pragma unroll 1
      for (int i = item.first_iteration(slot), end = item.iterations(slot); i < end; i++) {
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
          copy_tokens<false>(stage, keys, values, fed.now, fed.token());
          fed.next_iteration();
        }
        end_group();  // also where it is empty: the count of pending groups stays the same
        place = (place + 1) % DEPTH;
      }
      store_slot(run, slot);
    }
    bool more = eaten.at + (int)gridDim.x < count;
    if (more) load_query(q, qkv, eaten.next, first_head, heads);
    Merged result = merge_slots();
    elem* target = out + ((size_t)item.token * HEADS + first_head) * HEAD_DIM;
    if (item.splits == 1 && item.prefix > 0) {
      merge_with_prefix(result, item, partials + first_head * PARTIAL, STRIDE, heads, target);
    } else if (item.splits == 1) {
      for (int i = threadIdx.x; i < heads * HEAD_DIM; i += WARPS * 32)
        target[i] = to_elem(result.values[i / HEAD_DIM * PARTIAL + i % HEAD_DIM] / result.stats[i / HEAD_DIM].y);
    } else {
      float* mine = partials + eaten.at * STRIDE + first_head * PARTIAL;
      for (int i = threadIdx.x; i < heads * HEAD_DIM; i += WARPS * 32)
        mine[i / HEAD_DIM * PARTIAL + i % HEAD_DIM] = result.values[i / HEAD_DIM * PARTIAL + i % HEAD_DIM];
      if (threadIdx.x < heads) {
        mine[threadIdx.x * PARTIAL + HEAD_DIM] = result.stats[threadIdx.x].x;
        mine[threadIdx.x * PARTIAL + HEAD_DIM + 1] = result.stats[threadIdx.x].y;
      }
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        int* counter = arrived + item.row * gridDim.y + blockIdx.y;
        last = atomicAdd(counter, 1) == item.splits - 1;
        if (last) *counter = 0;  // for the next layer
        __threadfence();
      }
      __syncthreads();
      if (last && item.prefix > 0)
        merge_with_prefix(result, item, partials + first_head * PARTIAL, STRIDE, heads, target);
      else if (last)
        merge_splits(partials + item.first_item * STRIDE + first_head * PARTIAL, item.splits, STRIDE, heads, target);
    }
    // Nothing is loaded in vain: a block does not end before its loads, which stand behind the next kernels' weights.
    if (!more) break;
    __syncthreads();  // this item's results have been read
    eaten.next_item();
  }
}
