// What stands between the QKV product and attention, in one pass over its output:
//   bias, QK norm (with -DQK_NORM), rotary embedding, and the append of keys and values to the paged cache.
//
// qkv    [tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM]; queries are rotated in place, keys and values go to the cache
// cos, sin float32 [max_model_len, HEAD_DIM]; sin's first half is negated, so a rotation is x * cos + swap_halves(x) * sin
// cache  one layer: keys, then values, each [num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM]; a block of a head is one contiguous piece
// slots  int32 [tokens], block_id * BLOCK_SIZE + offset, or -1 for padding: nothing is written then
//
// Bound by bytes: the product's output is read once, the same amount is written.
// Ladder
//   1. bias, norm, rotation, two scatters: six kernels over the same few kilobytes, all launch latency
//   2. one warp a head, two halves of the head by shuffles
//   3. one thread for 8 dimensions, whose partner (half a head away) is HEAD_DIM / 16 lanes away (this one): 16-byte accesses and
//      one shuffle a value
#include "common.cuh"

constexpr int LANES = HEAD_DIM / 8;                 // threads a head
constexpr int ALL_HEADS = HEADS + 2 * KV_HEADS;
constexpr int HEADS_PER_BLOCK = 128 / LANES;
static_assert(HEAD_DIM % 16 == 0 && (LANES & (LANES - 1)) == 0 && LANES <= 32, "head_dim must be a power of two up to 256");

// product(at): the product's vector `at`.
template <typename Product>
__device__ __forceinline__ void epilogue(Product product, uint4* qkv, const uint4* bias, const uint4* q_norm, const uint4* k_norm,
                                         const float4* cos, const float4* sin, const int* positions, const int* slots, uint4* cache,
                                         long long values_offset, float epsilon) {
  int head = blockIdx.y * HEADS_PER_BLOCK + threadIdx.x / LANES, lane = threadIdx.x % LANES;
  size_t token = blockIdx.x;
  wait_for_previous();
  let_next_start();  // only now: decode_attention reads older kernels' results before its own wait
  int slot = slots[token], position = max(positions[token], 0);
  bool valid = head < ALL_HEADS && slot >= 0;
  size_t at = (token * ALL_HEADS + (valid ? head : 0)) * LANES + lane;
  float x[8];
  unpack8(product(at), x);
  if (bias) {
    float b[8];
    unpack8(bias[(valid ? head : 0) * LANES + lane], b);
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = to_float(to_elem(x[j] + b[j]));
  }
#ifdef QK_NORM
  float squares = 0;
#pragma unroll
  for (int j = 0; j < 8; j++) squares = fmaf(x[j], x[j], squares);
#pragma unroll
  for (int d = LANES / 2; d; d >>= 1) squares += __shfl_xor_sync(~0u, squares, d);
  if (head < HEADS + KV_HEADS) {
    float inverse = rsqrtf(squares / HEAD_DIM + epsilon), w[8];
    unpack8((head < HEADS ? q_norm : k_norm)[lane], w);
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = to_float(to_elem(to_float(to_elem(x[j] * inverse)) * w[j]));
  }
#endif
  float partner[8];
#pragma unroll
  for (int j = 0; j < 8; j++) partner[j] = __shfl_xor_sync(~0u, x[j], LANES / 2);
  if (!valid) return;
  if (head < HEADS + KV_HEADS) {
    const float4* c = cos + (size_t)position * (HEAD_DIM / 4) + lane * 2;
    const float4* s = sin + (size_t)position * (HEAD_DIM / 4) + lane * 2;
    float4 c0 = c[0], c1 = c[1], s0 = s[0], s1 = s[1];
    float cosines[8] = {c0.x, c0.y, c0.z, c0.w, c1.x, c1.y, c1.z, c1.w};
    float sines[8] = {s0.x, s0.y, s0.z, s0.w, s1.x, s1.y, s1.z, s1.w};
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = fmaf(x[j], cosines[j], partner[j] * sines[j]);
  }
  if (head < HEADS) {
    qkv[at] = pack8(x);
    return;
  }
  bool is_value = head >= HEADS + KV_HEADS;
  int kv_head = head - HEADS - (is_value ? KV_HEADS : 0);
  size_t block = slot / BLOCK_SIZE, offset = slot % BLOCK_SIZE;
  cache[(is_value ? values_offset : 0) + ((block * KV_HEADS + kv_head) * BLOCK_SIZE + offset) * LANES + lane] = pack8(x);
}

extern "C" __global__ void __launch_bounds__(128)
qkv_epilogue(uint4* qkv, const uint4* __restrict__ bias, const uint4* __restrict__ q_norm, const uint4* __restrict__ k_norm,
             const float4* __restrict__ cos, const float4* __restrict__ sin, const int* __restrict__ positions,
             const int* __restrict__ slots, uint4* __restrict__ cache, long long values_offset, float epsilon) {
  epilogue([&](size_t at) { return qkv[at]; }, qkv, bias, q_norm, k_norm, cos, sin, positions, slots, cache, values_offset, epsilon);
}

// The product is still in parts [splits, gridDim.x, ...] (gemm_wgmma.cu).
extern "C" __global__ void __launch_bounds__(128)
qkv_epilogue_parts(const float4* parts, int splits, uint4* qkv, const uint4* __restrict__ bias, const uint4* __restrict__ q_norm,
                   const uint4* __restrict__ k_norm, const float4* __restrict__ cos, const float4* __restrict__ sin,
                   const int* __restrict__ positions, const int* __restrict__ slots, uint4* __restrict__ cache, long long values_offset,
                   float epsilon) {
  size_t stride = (size_t)gridDim.x * ALL_HEADS * LANES * 2;
  epilogue([&](size_t at) { return sum_of_parts(parts, at, splits, stride); }, qkv, bias, q_norm, k_norm, cos, sin, positions, slots,
           cache, values_offset, epsilon);
}
