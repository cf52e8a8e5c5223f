// What changes a row's logits before a token is chosen: logit_bias, allowed ids, bad words, min_tokens, penalties (in vLLM's order).
// Rows without PROCESS are skipped; others are copied to `processed`, because log-probabilities are of the raw logits.
//
// logits, processed float32 [rows, stride]; sample_rows[s] is the permanent row of logits row s; grid (rows, PARTS).
// raw_state[s] collects what the raw logits hold: 1 NaN or +inf, 2 something finite.
//
// Bound by bytes: 8 a logit and 4 for its count, of the rows that ask for it only.
// Ladder
//   1. dense masks and biases [rows, vocab] made on the CPU each step: 0.5 MB a row over PCIe
//   2. sparse lists on the device, a kernel for each rule: six passes over the row
//   3. one block owns a part of a row and applies the dense rules on the way, the sparse ones after a barrier (this one)
#include "row_state.cuh"

extern "C" __global__ void __launch_bounds__(256)
process_logits(const float* __restrict__ logits, int stride, int vocab, const int* __restrict__ sample_rows,
               const int* __restrict__ fields, const int* __restrict__ tokens, int max_len, const u32* __restrict__ counts,
               float* __restrict__ processed, u32* raw_state) {
  let_next_start();
  wait_for_previous();
  int s = blockIdx.x, row = sample_rows[s];
  if (row < 0) return;
  const RowFields& f = fields_of(fields, row);
  if (!(f.flags & PROCESS)) return;
  int part = (vocab + PARTS - 1) / PARTS, begin = blockIdx.y * part, end = min(vocab, begin + part);
  const float* from = logits + (size_t)s * stride;
  float* to = processed + (size_t)s * stride;
  const int* extras = reinterpret_cast<const int*>(f.extras);
  const u32* allowed = reinterpret_cast<const u32*>(f.allowed);
  const u32* seen = counts + (size_t)row * vocab;
  bool penalties = f.flags & PENALTIES;
  auto changed = [&](float x, int v) {
    u32 count = penalties ? seen[v] : 0;
    if (count) x = x > 0 ? x / f.repetition_penalty : x * f.repetition_penalty;
    if (count & 0x7fffffff) x -= f.presence_penalty + f.frequency_penalty * (float)(count & 0x7fffffff);
    return !allowed || allowed[v / 32] >> (v % 32) & 1 ? x : -INF;
  };
  u32 state = 0;
#pragma unroll 4
  for (int v = begin + threadIdx.x; v < end; v += 256) {
    float x = from[v];
    state |= x != x || x == INF ? 1 : x > -INF ? 2 : 0;
    to[v] = changed(x, v);
  }
  state = __reduce_or_sync(~0u, state);
  if (threadIdx.x % 32 == 0 && state) atomicOr(raw_state + s, state);
  __syncthreads();
  // A bias comes before the penalties: the few tokens that have one are done again.
  for (int i = threadIdx.x; i < f.num_bias; i += 256) {
    int v = extras[i];
    if (v >= begin && v < end) to[v] = changed(from[v] + __int_as_float(extras[f.num_bias + i]), v);
  }
  __syncthreads();
  auto ban = [&](int v) {
    if (v >= begin && v < end) to[v] = -INF;
  };
  const int* stops = extras + 2 * f.num_bias;
  if (f.num_computed - f.num_prompt < f.min_tokens)
    for (int i = threadIdx.x; i < f.num_stop; i += 256) ban(stops[i]);
  if (threadIdx.x == 0) {
    // Lists of bad words are short: one thread walks them.
    const int* word = stops + f.num_stop;
    const int* known = tokens + (size_t)row * max_len;
    for (int i = 0; i < f.num_bad_words; i++, word += word[0] + 1) {
      int before = word[0] - 1;
      bool matches = before <= f.num_computed;
      for (int j = 0; matches && j < before; j++) matches = known[f.num_computed - before + j] == word[1 + j];
      if (matches) ban(word[1 + before]);
    }
  }
}
