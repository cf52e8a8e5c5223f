// The functions of kernels/tma.cuh in plain C++: a tile comes some time later, in any order with others.
#pragma once
#include "wgmma.cuh"

struct alignas(64) TensorMap {
  u64 words[16];  // emulator::Tensor
};

inline void barrier_expect(u64* barrier, int bytes) { emulator::barrier_expect(barrier, bytes); }
inline void load_tile(void* to, const TensorMap& map, u64* barrier, int column, int row) {
  int at[] = {column, row};
  emulator::fetch(to, map.words, barrier, at, 2);
}
inline void load_tile_4d(void* to, const TensorMap& map, u64* barrier, int column, int group) {
  int at[] = {column, 0, 0, group};
  emulator::fetch(to, map.words, barrier, at, 4);
}
