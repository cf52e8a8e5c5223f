// Attention of 64 queries a warpgroup over tiles of 128 keys and values that warps of their own bring from the paged cache, on sm_90a:
// what prefill_wgmma.cu and prefix_attention.cu have in common.
//
// A block: CONSUMERS warpgroups, then four warps that bring tiles, two keys and two values, a tile each in turn.
#pragma once
#include "tma.cuh"

constexpr int GROUP = HEADS / KV_HEADS;
constexpr int CONSUMERS = HEAD_DIM == 64 ? 3 : 2;
constexpr int STAGES = HEAD_DIM == 64 ? 3 : 2;
constexpr int TILE_ROWS = CONSUMERS * 64;
constexpr int TILE_KEYS = 128;
constexpr int CHUNKS = HEAD_DIM / 8;                   // 16-byte pieces of a key
constexpr int PANELS = HEAD_DIM / 64;
constexpr int PANEL_VECTORS = TILE_KEYS * 8;
constexpr int TILE_VECTORS = PANELS * PANEL_VECTORS;
constexpr int QUERY_VECTORS = PANELS * 64 * 8;         // of a warpgroup
constexpr int OUT = HEAD_DIM / 2;                      // sums of a thread
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "head_dim must be 64 or 128");
static_assert(BLOCK_SIZE % 16 == 0, "16 tokens must lie in one block");

// Queries of all warpgroups, then STAGES of keys, then STAGES of values; then the barriers.
extern __shared__ __align__(1024) uint4 shared[];

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct Barriers {
  u64 full[2][STAGES], empty[2][STAGES];  // of keys, of values

  __device__ __forceinline__ void init() {
    if (threadIdx.x < 2 * STAGES) {
      barrier_init(&full[threadIdx.x / STAGES][threadIdx.x % STAGES], 1);
      barrier_init(&empty[threadIdx.x / STAGES][threadIdx.x % STAGES], CONSUMERS * 4);
      publish_to_products();
    }
  }
};

// All of consumer warpgroup `group`.
__device__ __forceinline__ void warpgroup_sync(int group) { meet_at(group + 1, 128); }

// One warp: keys or values [tile * TILE_KEYS, + TILE_KEYS) of a row whose block i is blocks[i], by the tensor memory accelerator, 16 tokens of
// a panel at a time. `cache` is a map of rows of HEAD_DIM, `first_row` the one of the head's first token in block 0.
template <typename Blocks>
__device__ __forceinline__ void fetch_tile(uint4* to, const TensorMap& cache, int first_row, Blocks blocks, int tile, u64* full) {
  int lane = threadIdx.x % 32, part = lane % 8, panel = lane / 8, first = tile * TILE_KEYS + part * 16;
  if (lane == 0) barrier_expect(full, TILE_VECTORS * 16);
  __syncwarp();
  if (panel < PANELS)
    load_tile(to + panel * PANEL_VECTORS + part * 128, cache, full, panel * 64,
              first_row + blocks[first / BLOCK_SIZE] * (KV_HEADS * BLOCK_SIZE) + first % BLOCK_SIZE);
}

struct State {
  float o[OUT], maximum[2], sum[2];
};

// Scores become weights exp2(s * scale - maximum), in place; returns what older sums must be multiplied by.
__device__ __forceinline__ float soften(float (&s)[64], float& maximum, float& sum, float scale, int half) {
  float best = -INF;
#pragma unroll
  for (int j = 0; j < 16; j++) best = fmaxf(best, fmaxf(s[4 * j + 2 * half], s[4 * j + 2 * half + 1]));
  best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
  best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
  best = fmaxf(maximum, best * scale);
  float base = best == -INF ? 0.0f : best, shrink = exp2_fast(maximum - base), added = 0;
  maximum = best;
#pragma unroll
  for (int j = 0; j < 16; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float& x = s[4 * j + 2 * half + e];
      x = exp2_fast(fmaf(x, scale, -base));
      added += x;
    }
  sum = sum * shrink + added;
  return shrink;
}

__device__ __forceinline__ void start_scores(float (&s)[64], const uint4* queries, const uint4* keys) {
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 16; k++)
    multiply_rows(s, operand(queries + k / 4 * 512) + k % 4 * 2, operand(keys + k / 4 * PANEL_VECTORS) + k % 4 * 2, k > 0);
  products_commit();
}

__device__ __forceinline__ void start_values(State& w, const u32 (&p)[8][4], const uint4* values) {
#pragma unroll
  for (int k = 0; k < TILE_KEYS / 16; k++) multiply_columns(w.o, p[k], operand(values, PANEL_VECTORS * 16) + k * 128);
  products_commit();
}

// Weights as an operand; older sums are scaled.
__device__ __forceinline__ void apply(State& w, const float (&s)[64], const float (&shrink)[2], u32 (&p)[8][4]) {
#pragma unroll
  for (int i = 0; i < OUT; i++) w.o[i] *= shrink[i / 2 % 2];
#pragma unroll
  for (int k = 0; k < 8; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) p[k][i] = pack(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
}

// Where a warpgroup is in the stages.
struct Place {
  int stage = 0, phase = 0;

  __device__ __forceinline__ Place following() const {
    Place next;
    next.stage = stage + 1 == STAGES ? 0 : stage + 1, next.phase = next.stage == 0 ? phase ^ 1 : phase;
    return next;
  }
};

// Two warpgroups take turns at the tensor cores: one asks for its products when the other has asked for its own, and has that time for its
// softmax. `left`: how often both will ask yet; group 0 is the first.
struct Turns {
  int group, left;

  __device__ __forceinline__ void begin() const {
    if (group == 1 && left > 0) arrive_at(own(0), 256);
  }
  __device__ __forceinline__ void take() const {
    if (left > 0) meet_at(own(group), 256);
  }
  __device__ __forceinline__ void give() {
    if (left > 1 || (left == 1 && group == 0)) arrive_at(own(1 - group), 256);
    left--;
  }
  __device__ __forceinline__ static int own(int group) { return CONSUMERS + 1 + group; }
};

// A warpgroup's queries over tiles [tile, last] of the ring, at least one. hide(s, tile) takes scores that do not count away.
template <typename Hide>
__device__ __forceinline__ void attend(Barriers& b, const uint4* queries, const uint4* keys, const uint4* values, Place& at, int tile, int last,
                                       Hide hide, Turns turns, float scale, State& w) {
  float s[64], shrink[2];
  u32 p[8][4];
  bool elected = threadIdx.x % 32 == 0;
  auto weigh = [&] {
#pragma unroll
    for (int half = 0; half < 2; half++) shrink[half] = soften(s, w.maximum[half], w.sum[half], scale, half);
  };
  barrier_wait(&b.full[0][at.stage], at.phase);
  products_begin();
  start_scores(s, queries, keys + at.stage * TILE_VECTORS);
  products_wait<0>();
  if (elected) barrier_arrive(&b.empty[0][at.stage]);
  settled(s);
  hide(s, tile);
  weigh();
  apply(w, s, shrink, p);
  for (; tile < last; tile++) {
    Place next = at.following();
    barrier_wait(&b.full[0][next.stage], next.phase);
    barrier_wait(&b.full[1][at.stage], at.phase);
    turns.take();
    products_begin();
    start_scores(s, queries, keys + next.stage * TILE_VECTORS);
    start_values(w, p, values + at.stage * TILE_VECTORS);
    turns.give();
    products_wait<1>();
    if (elected) barrier_arrive(&b.empty[0][next.stage]);
    settled(s);
    hide(s, tile + 1);
    weigh();
    products_wait<0>();
    if (elected) barrier_arrive(&b.empty[1][at.stage]);
    settled(w.o);
    apply(w, s, shrink, p);
    at = next;
  }
  barrier_wait(&b.full[1][at.stage], at.phase);
  products_begin();
  start_values(w, p, values + at.stage * TILE_VECTORS);
  products_wait<0>();
  if (elected) barrier_arrive(&b.empty[1][at.stage]);
  settled(w.o);
  at = at.following();
}

#endif
