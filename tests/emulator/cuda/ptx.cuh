// The functions of kernels/ptx.cuh in plain C++. Whatever an instruction leaves open, the worst is done: a copy's target holds garbage from
// the moment it is asked for, and its bytes only when they have been waited for.
#pragma once

inline void copy16(void* to, const void* from, bool valid) { emulator::copy(to, valid ? from : nullptr); }
inline void copy16(void* to, const void* from) { emulator::copy(to, from); }
inline void copy16_streaming(void* to, const void* from) { emulator::copy(to, from); }
inline void end_group() { emulator::end_group(); }
template <int PENDING>
void copies_done() { emulator::wait_for_copies(PENDING); }

inline void load_word(u32& word, const void* from) { word = *static_cast<const u32*>(from); }
inline void arrived_in(u32) {}

inline float exp2_fast(float x) { return exp2f(x); }

inline void let_next_start() {}
inline void wait_for_previous() { emulator::wait_for_previous(); }

inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }
template <typename T>
T load_of_block(const T* mine, u32 rank) {
  static_assert(std::is_same<T, u32>::value || std::is_same<T, u64>::value, "as kernels/ptx.cuh has it");
  T there;
  emulator::read_of_block(&there, mine, sizeof there, rank);
  return there;
}

// Element `high` (0 or 1) of a register.
inline float element(u32 word, int high) {
  elem x;
  unsigned short bits = word >> 16 * high;
  memcpy(&x, &bits, 2);
#ifdef FLOAT16
  return __half2float(x);
#else
  return __bfloat162float(x);
#endif
}

// The PTX ISA's layout of m16n8k16, for 16-bit elements: lane 4 g + t holds
//   a: register r, element e: row g + 8 (r % 2), column 2 t + e + 8 (r / 2)
//   b: register r, element e: row 2 t + e + 8 r, column g
//   c: register i: row g + 8 (i / 2), column 2 t + i % 2
struct Operands {
  u32 a[4], b[2];
  float c[4];
};
inline void mma(float (&c)[4], uint4 a, u32 b0, u32 b1) {
  Operands mine{{a.x, a.y, a.z, a.w}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  mine = emulator::meet("mma", mine, [](Operands* lanes) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; lane++)
      for (int e = 0, g = lane / 4, t = lane % 4; e < 2; e++) {
        for (int r = 0; r < 4; r++) left[g + r % 2 * 8][2 * t + e + r / 2 * 8] = element(lanes[lane].a[r], e);
        for (int r = 0; r < 2; r++) right[2 * t + e + r * 8][g] = element(lanes[lane].b[r], e);
      }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        double sum = 0;
        for (int k = 0; k < 16; k++) sum += (double)left[lane / 4 + i / 2 * 8][k] * right[k][lane % 4 * 2 + i % 2];
        lanes[lane].c[i] += (float)sum;
      }
  });
  memcpy(c, mine.c, sizeof c);
}

// ldmatrix: lane i names row i % 8 of matrix i / 8. Lane 4 g + t gets elements 2 t and 2 t + 1 of row g of each matrix; transposed, of column g.
struct Matrices {
  const unsigned short* row;
  u32 words[4];
};
template <bool TRANSPOSED>
uint4 load_four(const uint4* at) {
  Matrices mine{reinterpret_cast<const unsigned short*>(at), {}};
  emulator::check_alignment(at, 16);
  mine = emulator::meet("ldmatrix", mine, [](Matrices* lanes) {
    for (int lane = 0; lane < 32; lane++)
      for (int m = 0, g = lane / 4, t = lane % 4; m < 4; m++) {
        auto at = [&](int e) -> u32 { return TRANSPOSED ? lanes[m * 8 + 2 * t + e].row[g] : lanes[m * 8 + g].row[2 * t + e]; };
        lanes[lane].words[m] = at(0) | at(1) << 16;
      }
  });
  return make_uint4(mine.words[0], mine.words[1], mine.words[2], mine.words[3]);
}
inline uint4 load_matrices(const uint4* at) { return load_four<false>(at); }
inline uint4 load_matrices_transposed(const uint4* at) { return load_four<true>(at); }
