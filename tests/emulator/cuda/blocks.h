// Blocks, warps and fibers: what runtime.cpp, which lets them run, and device.cpp, which is what they ask for, have in common.
#pragma once
#include <csetjmp>
#include <vector>

#include <ucontext.h>

#include "emulator.h"

namespace emulator {

constexpr int MOST_THREADS = 1024, MOST_WARPS = MOST_THREADS / 32, MOST_BLOCKS = 16, MOST_APART = 3;  // blocks at once; without clusters

constexpr int MOST_NUMBERED = 16;  // barriers of the hardware

enum State { READY, MEETS_WARP, MEETS_BLOCK, WAITS_AT_BARRIER, WAITS_AT_NUMBER, WAITS_FOR_PREVIOUS, MEETS_CLUSTER, GONE };

struct Copy {
  char* to;
  const char* from;
  char bytes[16];
  int group;
};
// What a thread has asked for and not waited for: products, and the sums that they add to, which hold garbage meanwhile.
struct Asked {
  Product product;
  int group;
  unsigned short rows[2][16];  // of an operand that stands in registers
  u32 registers[4];
  std::vector<float> done;     // if the operands have been read already
};
struct Sums {
  float* at;
  std::vector<float> values;
  int asked;
};
struct Fetch {
  char* to;
  Tensor tensor;
  u64* barrier;
  int at[5];
};
struct Fiber {
  char* stack = nullptr;
  bool started = false;
  ucontext_t context;
  jmp_buf point;
  State state;
  const u64* barrier;
  int parity, groups;  // groups: ended
  bool arrived;        // at its cluster's barrier, without having waited
  int meeting;         // of its cluster, at which it arrived
  std::vector<Copy> copies;
  std::vector<Asked> products;
  std::vector<Sums> sums;
  int product_groups;
  bool may_multiply;   // products_begin since it last waited
};
struct Warp {
  alignas(16) char slots[2][32 * 64];
  int meetings, waiting, ready;
  const char* what;  // the meeting that is under way
};
struct Numbered {
  int threads, arrived;
};
struct Cluster {
  int arrived, meetings;
};
// Shared variables have one address, so those of a block that pauses lie aside.
struct Block {
  Fiber fibers[MOST_THREADS];
  Warp warps[MOST_WARPS];
  Place place;
  Block* first;  // of its cluster
  Cluster cluster;  // the first one's
  int alive, at_barrier, mood, favourite;
  bool busy = false, pauses;
  std::vector<char> dynamic, statics;
  std::vector<Fetch> fetches;
  Numbered numbered[MOST_NUMBERED];
};

extern Block* here;                       // the block at work,
extern int me;                            // and its thread
extern int threads, shared_bytes;         // of a block
extern int cluster_size;                  // in blocks
extern char *static_begin, *static_end;   // where __shared__ variables lie
extern bool previous_ended;

int roll(int sides);  // 0 to sides - 1, at random
inline Fiber& mine() { return here->fibers[me]; }
inline Warp& my_warp() { return here->warps[me / 32]; }

void yield();             // from a fiber to the scheduler, until that comes back
void sleep(State state);  // until someone wakes it
inline void wake(Block& block, int thread) {
  block.fibers[thread].state = READY;
  block.warps[thread / 32].ready++;
}
template <typename Which>
void wake_all(Block& block, State state, Which which) {
  for (int i = 0; i < threads; i++)
    if (block.fibers[i].state == state && which(block.fibers[i])) wake(block, i);
}
void bring_a_tile();  // one that the block has asked for, whichever
bool in_shared(const char* at, size_t bytes);
inline bool anyone(const Fiber&) { return true; }
void open_block_barrier();
void open_cluster_barrier();  // if everyone has arrived

}  // namespace emulator
