// Fibers, their meetings, shared memory and copies: the part of the emulator that is the same for all kernels.
#include <algorithm>
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include <ucontext.h>

#include "emulator.h"

Place threadIdx, blockIdx, gridDim, blockDim;

namespace emulator {

constexpr int MOST_THREADS = 1024, MOST_WARPS = MOST_THREADS / 32, MOST_BLOCKS = 3;
constexpr size_t STACK = 128 << 10, SHARED = 232 << 10;

// The shared memory of the block at work. 0xff is the poison: NaN in every float format.
alignas(1024) char dynamic_shared[SHARED];

namespace {

enum State { READY, MEETS_WARP, MEETS_BLOCK, WAITS_AT_BARRIER, WAITS_FOR_PREVIOUS, GONE };
const char* const STATES[] = {"run", "meet their warp", "wait at __syncthreads", "wait at a barrier", "wait for the kernel before", "have left"};

struct Copy {
  char* to;
  const char* from;
  char bytes[16];
  int group;
};
struct Fiber {
  char* stack = nullptr;
  bool started = false;
  ucontext_t context;
  jmp_buf point;
  State state;
  const u64* barrier;
  int parity, groups;  // groups: ended
  std::vector<Copy> copies;
};
struct Warp {
  alignas(16) char slots[2][32 * 64];
  int meetings, waiting, ready;
  const char* what;  // the meeting that is under way
};
// Shared variables have one address, so those of a block that pauses lie aside.
struct Block {
  Fiber fibers[MOST_THREADS];
  Warp warps[MOST_WARPS];
  Place place;
  int alive, at_barrier, mood, favourite;
  bool busy = false, pauses;
  std::vector<char> dynamic, statics;
};
// What an mbarrier's 64 bits hold here.
struct Barrier {
  unsigned short arrivals, missing, phase, magic;
};
constexpr unsigned short MAGIC = 0xba55;

Block blocks[MOST_BLOCKS];
Block* here;  // the block at work
int me, threads, shared_bytes;
char *static_begin, *static_end;
bool previous_ended, failed;
char error[1000];
const char* name;
jmp_buf scheduler;
void (*work)(const Launch&);
const Launch* launched;
std::minstd_rand dice;

int roll(int sides) { return dice() / 16 % sides; }
Fiber& mine() { return here->fibers[me]; }
Warp& my_warp() { return here->warps[me / 32]; }

// From a fiber to the scheduler, until that comes back. setjmp and longjmp switch stacks without a system call; ucontext only starts.
void yield() {
  if (!_setjmp(mine().point)) _longjmp(scheduler, 1);
}
void sleep(State state) {
  mine().state = state;
  my_warp().ready--;
  while (mine().state != READY) yield();
}
void wake(Block& block, int thread) {
  block.fibers[thread].state = READY;
  block.warps[thread / 32].ready++;
}
template <typename Which>
void wake_all(Block& block, State state, Which which) {
  for (int i = 0; i < threads; i++)
    if (block.fibers[i].state == state && which(block.fibers[i])) wake(block, i);
}
bool anyone(const Fiber&) { return true; }
void open_block_barrier() {
  here->at_barrier = 0;
  wake_all(*here, MEETS_BLOCK, anyone);
}

void life() {
  for (;;) {
    work(*launched);
    if (!mine().copies.empty()) fail("thread %d ends while %d of its copies are under way", me, (int)mine().copies.size());
    here->alive--;
    mine().state = GONE;
    my_warp().ready--;
    if (here->alive && here->at_barrier == here->alive) open_block_barrier();  // the hardware counts only who is there
    yield();
  }
}

void resume(int thread) {
  me = thread;
  threadIdx = {(unsigned)thread, 0, 0};
  Fiber& fiber = mine();
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.point, 1);
  fiber.started = true;
  if (!fiber.stack) fiber.stack = static_cast<char*>(std::aligned_alloc(4096, STACK));
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = STACK;
  makecontext(&fiber.context, life, 0);
  setcontext(&fiber.context);
}

void report(const char* text) {
  std::snprintf(error, sizeof error, "%s: block (%u, %u) %s", name, blockIdx.x, blockIdx.y, text);
  failed = true;
}
void report_deadlock() {
  report("is in a deadlock");
  char* to = error + std::strlen(error);
  for (int w = 0; w < threads / 32; w++)
    for (int state = MEETS_WARP; state <= GONE; state++) {
      int count = 0;
      for (int i = 0; i < 32; i++) count += here->fibers[w * 32 + i].state == state;
      if (!count || error + sizeof error - to < 200) continue;
      to += std::sprintf(to, "; %d threads of warp %d %s", count, w, STATES[state]);
      if (state == MEETS_WARP) to += std::sprintf(to, " in %s", here->warps[w].what);
    }
}

// Another block goes to work.
void enter(Block& block) {
  if (here == &block) return;
  if (here && here->busy) {
    here->dynamic.assign(dynamic_shared, dynamic_shared + shared_bytes);
    here->statics.assign(static_begin, static_end);
  }
  here = &block, blockIdx = block.place;
  std::copy(block.dynamic.begin(), block.dynamic.end(), dynamic_shared);
  std::copy(block.statics.begin(), block.statics.end(), static_begin);
}

void start(Block& block, int number, int columns) {
  block.place = {(unsigned)(number % columns), (unsigned)(number / columns), 0};
  block.dynamic.assign(shared_bytes, '\xff');
  block.statics.assign(static_end - static_begin, '\xff');
  block.busy = true, block.pauses = false;
  block.alive = threads, block.at_barrier = 0;
  block.mood = roll(3), block.favourite = roll(threads / 32);
  for (int i = 0; i < threads; i++) {
    block.fibers[i].state = READY, block.fibers[i].groups = 0;
    block.fibers[i].copies.clear();
  }
  for (int w = 0; w < threads / 32; w++)
    block.warps[w].meetings = block.warps[w].waiting = 0, block.warps[w].ready = 32, block.warps[w].what = "";
}
void finish() {
  here->busy = false;
  for (size_t i = shared_bytes; i < SHARED && !failed; i++)
    if (dynamic_shared[i] != '\xff') report(("wrote byte " + std::to_string(i) + " of " + std::to_string(shared_bytes) + " of dynamic shared memory").c_str());
}

bool can_go_on(const Block& block) {
  int ready = 0;
  for (int w = 0; w < threads / 32; w++) ready += block.warps[w].ready;
  return block.busy && !block.pauses && ready > 0;
}

// One warp of the block at work, until all its lanes wait. A block has one of three moods: any warp at any time; one warp that gets a turn when
// no other can go on; one warp that goes on as long as it can.
void turn() {
  int candidates[MOST_WARPS], found = 0;
  for (int w = 0; w < threads / 32; w++)
    if (here->warps[w].ready) candidates[found++] = w;
  int warp = candidates[roll(found)];
  if (here->mood == 1 && warp == here->favourite && found > 1 && roll(64)) return;
  if (here->mood == 2 && here->warps[here->favourite].ready && roll(64)) warp = here->favourite;
  for (int i = 0, first = roll(32), step = roll(16) * 2 + 1; i < 32 && !failed && !here->pauses; i++) {
    int thread = warp * 32 + (first + i * step) % 32;
    if (here->fibers[thread].state == READY) resume(thread);
  }
  if (!roll(4096)) here->favourite = roll(threads / 32);
}

bool in_shared(const char* at, size_t bytes) {
  return (at >= dynamic_shared && at + bytes <= dynamic_shared + shared_bytes) || (at >= static_begin && at + bytes <= static_end);
}
Barrier& barrier_at(u64* at) {
  check_alignment(at, 8);
  if (!in_shared(reinterpret_cast<char*>(at), 8)) fail("a barrier does not lie in shared memory");
  return *reinterpret_cast<Barrier*>(at);
}

}  // namespace

void fail(const char* format, ...) {
  int length = std::snprintf(error, sizeof error, "%s: block (%u, %u) thread %d: ", name, blockIdx.x, blockIdx.y, me);
  va_list values;
  va_start(values, format);
  std::vsnprintf(error + length, sizeof error - length, format, values);
  va_end(values);
  failed = true;
  _longjmp(scheduler, 1);
}

void check_alignment(const void* at, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(at) % bytes) fail("an access of %d bytes is not aligned to them", (int)bytes);
}

int lane() { return me % 32; }

// Two sets of slots in turn: who is late still reads the last meeting's while others fill the next one's.
void* open_meeting() { return my_warp().slots[my_warp().meetings % 2]; }
bool last_to_meet(const char* what) {
  Warp& warp = my_warp();
  if (warp.waiting && std::strcmp(warp.what, what)) fail("lanes of warp %d meet in %s while others do in %s", me / 32, what, warp.what);
  warp.what = what;
  if (++warp.waiting == 32) return true;
  sleep(MEETS_WARP);
  return false;
}
void close_meeting() {
  my_warp().waiting = 0, my_warp().meetings++;
  for (int i = me / 32 * 32; i < me / 32 * 32 + 32; i++)
    if (here->fibers[i].state == MEETS_WARP) wake(*here, i);
}

void meet_block() {
  if (++here->at_barrier == here->alive) return open_block_barrier();
  sleep(MEETS_BLOCK);
}

void wait_for_previous() {
  if (!previous_ended) sleep(WAITS_FOR_PREVIOUS);
}

void after_atomic(const void* at) {
  if (in_shared(static_cast<const char*>(at), 4) || roll(4)) return;
  here->pauses = true;
  yield();
}

void copy(void* to, const void* from) {
  Copy copy{static_cast<char*>(to), static_cast<const char*>(from), {}, mine().groups};
  check_alignment(to, 16);
  check_alignment(from, 16);
  if (!in_shared(copy.to, 16)) fail("a copy's target does not lie in shared memory");
  if (from) std::memcpy(copy.bytes, from, 16);
  std::memset(to, 0xff, 16);
  mine().copies.push_back(copy);
}
void end_group() { mine().groups++; }
void wait_for_copies(int pending) {
  std::vector<Copy>& copies = mine().copies;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < mine().groups - pending; done++) {
    Copy& copy = copies[done];
    if (copy.from && std::memcmp(copy.bytes, copy.from, 16)) fail("the source of a copy has changed while it was under way");
    std::memcpy(copy.to, copy.bytes, 16);
  }
  copies.erase(copies.begin(), copies.begin() + done);
}

void barrier_init(u64* at, int arrivals) {
  barrier_at(at) = {(unsigned short)arrivals, (unsigned short)arrivals, 0, MAGIC};
}
void barrier_arrive(u64* at) {
  Barrier& barrier = barrier_at(at);
  if (barrier.magic != MAGIC) fail("arrives at a barrier that was not initialised");
  if (--barrier.missing) return;
  barrier.phase++, barrier.missing = barrier.arrivals;
  wake_all(*here, WAITS_AT_BARRIER, [&](const Fiber& fiber) { return fiber.barrier == at && fiber.parity != barrier.phase % 2; });
}
void barrier_wait(u64* at, int parity) {
  Barrier& barrier = barrier_at(at);
  if (barrier.magic != MAGIC) fail("waits at a barrier that was not initialised");
  if (barrier.phase % 2 != parity) return;
  mine().barrier = at, mine().parity = parity;
  sleep(WAITS_AT_BARRIER);
}

// Up to three blocks at once, at times only one. Then each begins before the end of the kernel before; else only the first ones do.
const char* run(const char* kernel, const Launch& launch, void (*body)(const Launch&), char* statics, char* statics_end) {
  name = kernel, work = body, launched = &launch, failed = false, here = nullptr;
  threads = launch.threads, shared_bytes = launch.shared_bytes;
  static_begin = statics, static_end = statics_end;
  dice.seed(launch.seed + 1);
  gridDim = {(unsigned)launch.grid[0], (unsigned)launch.grid[1], (unsigned)launch.grid[2]};
  blockDim = {(unsigned)threads, 1, 1};
  std::memset(dynamic_shared, 0xff, SHARED);
  std::vector<int> order(launch.grid[0] * launch.grid[1]);
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  std::shuffle(order.begin(), order.end(), dice);
  int most = 1 + roll(MOST_BLOCKS);
  auto previous = [&](bool ended) {
    previous_ended = ended || !launch.previous;
    if (launch.previous) launch.previous(ended);
  };
  previous(false);
  for (size_t next = 0; !failed;) {
    std::vector<Block*> busy, able;
    for (int i = 0; i < most; i++) {
      if (!blocks[i].busy && next < order.size()) {
        if (most == 1 && next) previous(false);
        start(blocks[i], order[next++], launch.grid[0]);
        if (here == &blocks[i]) here = nullptr;
      }
      if (!roll(16)) blocks[i].pauses = false;
      if (blocks[i].busy) busy.push_back(&blocks[i]);
      if (can_go_on(blocks[i])) able.push_back(&blocks[i]);
    }
    if (busy.empty()) return nullptr;
    if (able.empty())
      for (Block* block : busy)
        if (block->pauses) block->pauses = false, able.push_back(block);
    enter(able.empty() ? *busy[0] : *able[roll(able.size())]);
    if (able.empty() && previous_ended) {
      report_deadlock();
    } else if (able.empty()) {
      previous(true);
      for (Block* block : busy) wake_all(*block, WAITS_FOR_PREVIOUS, anyone);
    } else {
      for (int turns = 1 + roll(100); turns && !failed && can_go_on(*here); turns--) turn();
      if (!failed && !here->alive) finish();
    }
  }
  for (Block& block : blocks) {
    block.busy = false;
    for (Fiber& fiber : block.fibers) fiber.started = false;  // they stand somewhere in the kernel, never to come back
  }
  return error;
}

}  // namespace emulator

// What g++'s and clang's -fsanitize=alignment,bounds call; both pass first where it happened.
struct Source {
  const char* file;
  unsigned line, column;
};
static const char* base_name(const char* file) {
  const char* slash = std::strrchr(file, '/');
  return slash ? slash + 1 : file;
}
extern "C" void __ubsan_handle_type_mismatch_v1(const Source* at, uintptr_t) {
  emulator::fail("a misaligned access at %s:%u", base_name(at->file), at->line);
}
extern "C" void __ubsan_handle_out_of_bounds(const Source* at, uintptr_t) {
  emulator::fail("an index beyond its array at %s:%u", base_name(at->file), at->line);
}
