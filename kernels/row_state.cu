// Rows live on the device: token ids, block table and RowFields, all int32, in one arena. A step's plan arrives as one buffer of int32.
//
//   apply_plan       copies segments of the plan to where they belong in the arena: new rows, appended blocks, chunk tokens
//   prepare_tokens   looks up the input token, position and cache slot of every scheduled token, and counts them as computed
//   plan_decode      lists the (row, split) items of the step's decode attention, the longest first
//   copy_words       brings a step's columns from the host's pinned memory
//   count_tokens     keeps how often each token stands in a row with penalties
//
// Bound by latency: kilobytes in all. What matters is that the CPU never needs an answer: the token that step n sampled is in the
// arena when step n + 1 looks it up.
// Ladder
//   1. the CPU holds the rows and sends ids, positions, slots and block tables each step: a synchronisation a step to learn the token
//   2. one small copy for each changed tensor: a dozen launches a step
//   3. one copy of one buffer, one kernel that spreads it
//   4. what every step needs goes through pinned memory that kernels read and write (this one): between a kernel and a copy of the copy
//      engine the device pauses for 7 us, twice a step
#include "row_state.cuh"

// plan[segments + 3 i ...] = (destination in the arena, source in the plan, length), in words; one block a segment.
extern "C" __global__ void __launch_bounds__(128) apply_plan(int* __restrict__ arena, const int* __restrict__ plan, int segments) {
  let_next_start();
  wait_for_previous();
  const int* segment = plan + segments + 3 * blockIdx.x;
  int to = segment[0], from = segment[1], length = segment[2];
  for (int i = threadIdx.x; i < length; i += 128) arena[(size_t)to + i] = plan[from + i];
}

// Either side may be pinned memory of the host.
extern "C" __global__ void __launch_bounds__(256) copy_words(int* to, const int* from, int words) {
  let_next_start();
  int at = blockIdx.x * 256 + threadIdx.x, word = at < words ? from[at] : 0;  // the host wrote it before the launch
  wait_for_previous();
  if (at < words) to[at] = word;
}

// One block a row. num_scheduled 0 marks a padding row of a graph: its tokens, up to the next row's or `num_tokens`, get slot and position
// -1, so nothing is stored for them.
extern "C" __global__ void __launch_bounds__(128)
prepare_tokens(const int* __restrict__ rows, const int* __restrict__ num_scheduled, const int* __restrict__ q_start, int* fields,
               const int* __restrict__ tokens, int max_len, const int* __restrict__ block_table, int max_blocks,
               int* __restrict__ token_ids, int* __restrict__ positions, int* __restrict__ slots, int* __restrict__ context_lens,
               int num_tokens) {
  let_next_start();
  wait_for_previous();
  int r = blockIdx.x, count = num_scheduled[r], row = rows[r], first = q_start[r];
  if (count == 0) {
    int end = r + 1 < gridDim.x ? q_start[r + 1] : num_tokens;
    for (int i = first + threadIdx.x; i < end; i += 128) token_ids[i] = positions[i] = slots[i] = -1;
    if (threadIdx.x == 0) context_lens[r] = 0;
    return;
  }
  int* num_computed = fields + (size_t)row * ROW_WORDS;
  int start = *num_computed;
  for (int i = threadIdx.x; i < count; i += 128) {
    int position = start + i;
    token_ids[first + i] = tokens[(size_t)row * max_len + position];
    positions[first + i] = position;
    slots[first + i] = block_table[(size_t)row * max_blocks + position / BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE;
  }
  __syncthreads();  // everyone has read it
  if (threadIdx.x == 0) *num_computed = context_lens[r] = start + count;
}

// Inclusive.
__device__ __forceinline__ int scan_warp(int sum) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    int other = __shfl_up_sync(~0u, sum, d);
    if (threadIdx.x % 32 >= d) sum += other;
  }
  return sum;
}

// One block. Rows with one scheduled token become items of decode attention, those of most tokens first (to 16; in any order among equals,
// since no result depends on it). An item is
//   (row of the step, first token, end, query's token),
//   (its row's first partial, permanent row, which of the row's splits * 65536 + how many there are, word 1 of its prefix)
// where a row's partials stand one behind another, in the order of the rows.
// prefixes: of each row of the step the tokens of its shared prefix, where its items begin, and where prefix_attention leaves its
// results (decode_attention.cu); both 0 without one. Null: no row has any. split: tokens of an item, long_split of a row that attends to
// more than `most`; LARGEST_SPLIT at most.
extern "C" __global__ void __launch_bounds__(1024)
plan_decode(const int* __restrict__ rows, const int* __restrict__ num_scheduled, const int* __restrict__ q_start,
            const int* __restrict__ context_lens, const int2* __restrict__ prefixes, int num_rows, int window,
            int split, int long_split, int most, int4* __restrict__ items, int* __restrict__ num_items) {
  constexpr int SIZES = LARGEST_SPLIT / 16;  // an item's size: tokens / 16, less 1
  __shared__ int warp_sums[32], places[SIZES];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, base = 0;
  let_next_start();
  for (int i = threadIdx.x; i < SIZES; i += 1024) places[i] = 0;
  wait_for_previous();
  __syncthreads();
  struct Row {
    int split = 1, begin = 0, skipped = 0, count = 0, context = 0, prefix = 0;  // skipped: splits before the first item's
    __device__ int first(int i) const { return max(begin, (skipped + i) * split); }
    __device__ int end(int i) const { return min(context, (skipped + i + 1) * split); }
    __device__ int size(int i) const { return (end(i) - first(i) - 1) / 16; }
  };
  auto row_of = [&](int r) {
    Row row;
    if (r >= num_rows || num_scheduled[r] != 1) return row;
    row.context = context_lens[r];
    row.begin = window > 0 ? max(0, row.context - window) : 0;
    if (prefixes) row.begin = prefixes[r].x, row.prefix = prefixes[r].y;
    row.split = row.context - row.begin > most ? long_split : split;
    row.skipped = row.begin / row.split;
    row.count = (row.context - 1) / row.split - row.skipped + 1;
    return row;
  };
  for (int first = 0; first < num_rows; first += 1024) {
    Row row = row_of(first + threadIdx.x);
    for (int i = 0; i < row.count; i++) atomicAdd(places + row.size(i), 1);
  }
  __syncthreads();
  if (warp == 0) {  // from how many there are of a size to where the first of them stands
    int total = 0;
    for (int last = SIZES - 1; last >= 0; last -= 32) {
      int mine = last - lane, count = mine >= 0 ? places[mine] : 0, before = scan_warp(count);
      if (mine >= 0) places[mine] = total + before - count;
      total += __shfl_sync(~0u, before, 31);
    }
    if (lane == 0) *num_items = total;
  }
  __syncthreads();
  for (int first = 0; first < num_rows; first += 1024) {
    int r = first + threadIdx.x;
    Row row = row_of(r);
    int before = scan_warp(row.count);
    if (lane == 31) warp_sums[warp] = before;
    __syncthreads();
    int total = 0;
    for (int w = 0; w < 32; w++) {
      if (w < warp) before += warp_sums[w];
      total += warp_sums[w];
    }
    for (int i = 0; i < row.count; i++) {
      int at = atomicAdd(places + row.size(i), 1);
      items[2 * at] = make_int4(r, row.first(i), row.end(i), q_start[r]);
      items[2 * at + 1] = make_int4(base + before - row.count, rows[r], i << 16 | row.count, row.prefix);
    }
    base += total;
    __syncthreads();
  }
}

// jobs: (row, first, length, clear) for each block: tokens [first, first + length) of the row are counted, after clearing where asked.
// counts uint32 [max_rows, vocab]: bit 31 says that the token stands in the prompt, the rest counts outputs.
extern "C" __global__ void __launch_bounds__(1024)
count_tokens(const int4* __restrict__ jobs, const int* __restrict__ fields, const int* __restrict__ tokens, int max_len, u32* counts,
             int vocab) {
  let_next_start();
  wait_for_previous();
  int4 job = jobs[blockIdx.x];
  u32* mine = counts + (size_t)job.x * vocab;
  if (job.w) {
    for (int i = threadIdx.x; i < vocab; i += 1024) mine[i] = 0;
    __syncthreads();
  }
  int num_prompt = fields_of(fields, job.x).num_prompt;
  for (int i = job.y + threadIdx.x; i < job.y + job.z; i += 1024) {
    int token = tokens[(size_t)job.x * max_len + i];
    if (i < num_prompt) atomicOr(mine + token, 0x80000000u);
    else atomicAdd(mine + token, 1u);
  }
}
