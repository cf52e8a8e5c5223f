// What the device knows of a row: ROW_WORDS int32 words. kernels/row_layout.py writes the same layout; a test compares the two.
#pragma once
#include "common.cuh"

constexpr int ROW_WORDS = 32;

struct RowFields {
  int num_computed;   // tokens whose keys and values are in the cache; also the index of the token that is sampled next
  int num_prompt;
  u32 seed_low, seed_high;
  float temperature;  // 0: greedy
  int top_k;          // 0: all
  float top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  int min_tokens;
  u32 flags;
  int num_bias, num_stop, num_bad_words;
  u64 extras;         // device address: bias ids, bias values (float bits), stop ids, then bad words, each as length, ids...
  u64 allowed;        // device address: one bit a token; null: all
};
static_assert(sizeof(RowFields) <= ROW_WORDS * 4, "ROW_WORDS is too small");

constexpr u32 PROCESS = 1;    // bias, masks or penalties change the logits
constexpr u32 TRUNCATE = 2;   // top_k, top_p or min_p
constexpr u32 PENALTIES = 4;  // counts of this row's tokens are kept

__device__ __forceinline__ const RowFields& fields_of(const int* fields, int row) {
  return *reinterpret_cast<const RowFields*>(fields + (size_t)row * ROW_WORDS);
}
