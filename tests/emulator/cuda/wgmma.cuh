// The functions of kernels/wgmma.cuh in plain C++ (products.cpp). Until they are waited for, sums are garbage and operands must stay.
#pragma once
#include "barrier.cuh"

#define __CUDA_ARCH_FEAT_SM90_ALL

inline int panel_place(int row, int chunk) { return row * 8 + (chunk ^ (row & 7)); }

// As far as kernels calculate with it the hardware's: where it begins in shared memory and how far the next panel is, in 16 bytes.
inline u64 operand(const void* panel, int next_panel = 16) { return emulator::shared_offset(panel) >> 4 | (u64)(next_panel >> 4) << 16; }

inline void products_begin() { emulator::products_begin(); }
inline void products_commit() { emulator::products_commit(); }
template <int PENDING>
void products_wait() { emulator::products_wait(PENDING); }

inline float element_of(unsigned short bits) { return element(bits, 0); }
template <int COUNT>
void multiply_rows(float (&c)[COUNT], u64 a, u64 b, bool add) { emulator::multiply({c, COUNT, a, nullptr, b, false, add, element_of}); }
template <int COUNT>
void multiply_columns(float (&c)[COUNT], const u32 (&a)[4], u64 b) { emulator::multiply({c, COUNT, 0, a, b, true, true, element_of}); }

inline void publish_to_products() {}
template <int COUNT>
void settled(float (&)[COUNT]) {}
inline void meet_at(int barrier, int threads) { emulator::arrive_at(barrier, threads, true); }
inline void arrive_at(int barrier, int threads) { emulator::arrive_at(barrier, threads, false); }

template <int REGISTERS>
void take_registers() {}
template <int REGISTERS>
void give_registers() {}
