// The work list of decode_attention.cu, as plan_decode (row_state.cu) writes it, and each warp's way through it.
#pragma once
#include "common.cuh"

constexpr int STEP = 16 * SLOTS;  // tokens of a block in one iteration

// Words 0 to 6 of an item, as plan_decode writes them; word 5 names the permanent row.
struct Item {
  int row, begin, end, token;  // row of the step, tokens [begin, end) of its split, the query's token
  int first_partial, which;    // of the row's partials; which of its splits * 65536 + how many there are
  const int* blocks;
#ifdef AFTER_PREFIX
  int prefix;                  // word 7: slot of the row's first result of prefix_attention * 32 + how many; 0: none
#else
  static constexpr int prefix = 0;
#endif

  // Slots lie at absolute positions, iterations of all of them STEP tokens apart, wherever splits begin; what lies outside [begin, end)
  // is left out.
  __device__ int token_of(int slot, int iteration) const { return begin / STEP * STEP + iteration * STEP + slot * 16; }
  __device__ int first_iteration(int slot) const { return (begin % STEP / 16 + SLOTS - 1 - slot) / SLOTS; }
  __device__ int end_iteration(int slot) const { return ((end - 1 - begin / STEP * STEP) / 16 + SLOTS - slot) / SLOTS; }
  __device__ int split() const { return which >> 16; }
  __device__ int splits() const { return which & 0xffff; }
};

__device__ __forceinline__ Item load_item(const int4* items, int at, const int* block_table, int max_blocks) {
  int4 a = __ldcg(items + 2 * at), b = __ldcg(items + 2 * at + 1);
  Item item{a.x, a.y, a.z, a.w, b.x, b.z, block_table + (size_t)b.y * max_blocks};
#ifdef AFTER_PREFIX
  item.prefix = b.w;
#endif
  return item;
}

// Which items are this block's: from `first`, below `end`. Those of a grid's first layer are resident at once. A second layer's blocks start
// where one of the first has ended, and take an item each, the shortest ones: multiprocessors do not all read at the same speed, and
// the faster ones do more of them.
struct Deal {
  int first, end;
};
__device__ __forceinline__ Deal deal(int count) {
  int columns = gridDim.x, apart = gridDim.z > 1 ? min(columns, max(count - columns, 0)) : 0, column = blockIdx.x;
  if (blockIdx.z == 0) return Deal{column, count - apart};
  return Deal{count - apart + column, count - apart + min(column + 1, apart)};
}

// Items stand longest first, and blocks take them forth and back: 0, 1, 2, then 2, 1, 0, ..., which gives each about as many tokens. From
// its first item, blockIdx.x, a block goes on by this and by 2 * gridDim.x less it in turn.
__device__ __forceinline__ int first_stride() { return 2 * ((int)gridDim.x - (int)blockIdx.x) - 1; }
__device__ __forceinline__ int other_stride(int stride) { return 2 * (int)gridDim.x - stride; }

// Walks over the block's items, and this warp's slots of each, an iteration at a time. The next item's record is loaded an item early, an
// iteration's block_id an iteration early: whoever waits for either copies nothing meanwhile. (Past L1, which may hold an older step's
// before the wait.)
struct Walk {
  const int4* items;
  const int* block_table;
  int max_blocks, at, stride, count, slot, iteration, block_id;
  Item now, next;

  __device__ __forceinline__ void start(const int4* list, Deal deal, const int* table, int columns) {
    items = list, block_table = table, max_blocks = columns, count = deal.end, at = deal.first;
    stride = first_stride();
    now = load_item(items, at, block_table, max_blocks);
    enter();
  }
  __device__ __forceinline__ bool more() const { return at < count; }
  __device__ __forceinline__ void next_item() {
    at += stride, stride = other_stride(stride), now = next;
    enter();
  }
  __device__ __forceinline__ void next_iteration() {
    iteration++;
    skip();
  }
  __device__ __forceinline__ void skip() {  // slots and items that have nothing for this warp
    while (more() && iteration >= now.end_iteration(slot)) {
      if (slot + WARPS < SLOTS) enter_slot(slot + WARPS);
      else next_item();
    }
    if (more()) block_id = __ldcg(now.blocks + token() / BLOCK_SIZE);
  }
  __device__ __forceinline__ int token() const { return now.token_of(slot, iteration); }
  __device__ __forceinline__ void enter_slot(int which) { slot = which, iteration = now.first_iteration(slot); }
  __device__ __forceinline__ void enter() {
    enter_slot(threadIdx.x / 32);
    next = load_item(items, min(at + stride, count - 1), block_table, max_blocks);
  }
};
