// Fibers, their meetings, shared memory and copies: the part of the emulator that is the same for all kernels.
#include <algorithm>
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include <ucontext.h>

#include "emulator.h"

Place threadIdx, blockIdx, gridDim, blockDim;

namespace emulator {

constexpr int MOST_THREADS = 1024, MOST_WARPS = MOST_THREADS / 32;
constexpr size_t STACK = 128 << 10, SHARED = 232 << 10;

// 0xff is the poison: NaN in every float format.
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
  jmp_buf here;
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
// What an mbarrier's 64 bits hold here.
struct Barrier {
  unsigned short arrivals, missing, phase, magic;
};
constexpr unsigned short MAGIC = 0xba55;

Fiber fibers[MOST_THREADS];
Warp warps[MOST_WARPS];
int me, threads, alive, at_block_barrier, shared_bytes;
char *static_begin, *static_end;
bool previous_ended, failed;
char error[1000];
const char* name;
jmp_buf scheduler;
ucontext_t scheduler_context;
void (*work)(const Launch&);
const Launch* launched;
std::minstd_rand dice;

int roll(int sides) { return dice() / 16 % sides; }

// From a fiber to the scheduler, until that comes back. setjmp and longjmp switch stacks without a system call; ucontext only starts.
void yield() {
  if (!_setjmp(fibers[me].here)) _longjmp(scheduler, 1);
}
void sleep(State state) {
  fibers[me].state = state;
  warps[me / 32].ready--;
  while (fibers[me].state != READY) yield();
}
void wake(int thread) {
  fibers[thread].state = READY;
  warps[thread / 32].ready++;
}
template <typename Which>
void wake_all(State state, Which which) {
  for (int i = 0; i < threads; i++)
    if (fibers[i].state == state && which(fibers[i])) wake(i);
}
void open_block_barrier() {
  at_block_barrier = 0;
  wake_all(MEETS_BLOCK, [](const Fiber&) { return true; });
}

void life() {
  for (;;) {
    work(*launched);
    Fiber& mine = fibers[me];
    if (!mine.copies.empty()) fail("thread %d ends while %d of its copies are under way", me, (int)mine.copies.size());
    alive--;
    mine.state = GONE;
    warps[me / 32].ready--;
    if (alive && at_block_barrier == alive) open_block_barrier();  // the hardware counts only who is there
    yield();
  }
}

void resume(int thread) {
  Fiber& fiber = fibers[thread];
  me = thread;
  threadIdx = {(unsigned)thread, 0, 0};
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  if (!fiber.stack) fiber.stack = static_cast<char*>(std::aligned_alloc(4096, STACK));
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = STACK;
  makecontext(&fiber.context, life, 0);
  setcontext(&fiber.context);
}

void describe_deadlock() {
  char* to = error + std::snprintf(error, sizeof error, "%s: deadlock in block (%u, %u)", name, blockIdx.x, blockIdx.y);
  for (int w = 0; w < threads / 32; w++)
    for (int state = MEETS_WARP; state <= GONE; state++) {
      int count = 0;
      for (int i = 0; i < 32; i++) count += fibers[w * 32 + i].state == state;
      if (!count || error + sizeof error - to < 200) continue;
      to += std::sprintf(to, "; %d threads of warp %d %s", count, w, STATES[state]);
      if (state == MEETS_WARP) to += std::sprintf(to, " in %s", warps[w].what);
    }
  failed = true;
}

// Until all threads are gone. One of three moods a block: any warp at any time; one warp that gets a turn when no other can go on; one warp
// that goes on as long as it can.
void run_block(const Launch& launch) {
  int count = threads / 32, mood = roll(3), favourite = roll(count);
  alive = threads, at_block_barrier = 0, previous_ended = !launch.previous;
  if (launch.previous) launch.previous(0);
  for (int i = 0; i < threads; i++) {
    fibers[i].state = READY, fibers[i].groups = 0;
    fibers[i].copies.clear();
  }
  for (int w = 0; w < count; w++) warps[w].meetings = warps[w].waiting = 0, warps[w].ready = 32, warps[w].what = "";
  while (alive && !failed) {
    int candidates[MOST_WARPS], found = 0;
    for (int w = 0; w < count; w++)
      if (warps[w].ready) candidates[found++] = w;
    if (!found && !previous_ended) {
      previous_ended = true;
      launch.previous(1);
      wake_all(WAITS_FOR_PREVIOUS, [](const Fiber&) { return true; });
      continue;
    }
    if (!found) return describe_deadlock();
    int warp = candidates[roll(found)];
    if (mood == 1 && warp == favourite && found > 1 && roll(64)) continue;
    if (mood == 2 && warps[favourite].ready && roll(64)) warp = favourite;
    for (int i = 0, first = roll(32), step = roll(16) * 2 + 1; i < 32 && !failed; i++) {
      int thread = warp * 32 + (first + i * step) % 32;
      if (fibers[thread].state == READY) resume(thread);
    }
    if (!roll(4096)) favourite = roll(count);
  }
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
void* open_meeting() { return warps[me / 32].slots[warps[me / 32].meetings % 2]; }
bool last_to_meet(const char* what) {
  Warp& warp = warps[me / 32];
  if (warp.waiting && std::strcmp(warp.what, what)) fail("lanes of warp %d meet in %s while others do in %s", me / 32, what, warp.what);
  warp.what = what;
  if (++warp.waiting == 32) return true;
  sleep(MEETS_WARP);
  return false;
}
void close_meeting() {
  Warp& warp = warps[me / 32];
  warp.waiting = 0, warp.meetings++;
  for (int i = me / 32 * 32; i < me / 32 * 32 + 32; i++)
    if (fibers[i].state == MEETS_WARP) wake(i);
}

void meet_block() {
  if (++at_block_barrier == alive) return open_block_barrier();
  sleep(MEETS_BLOCK);
}

void wait_for_previous() {
  if (!previous_ended) sleep(WAITS_FOR_PREVIOUS);
}

void copy(void* to, const void* from) {
  Copy copy{static_cast<char*>(to), static_cast<const char*>(from), {}, fibers[me].groups};
  check_alignment(to, 16);
  check_alignment(from, 16);
  if (!in_shared(copy.to, 16)) fail("a copy's target does not lie in shared memory");
  if (from) std::memcpy(copy.bytes, from, 16);
  std::memset(to, 0xff, 16);
  fibers[me].copies.push_back(copy);
}
void end_group() { fibers[me].groups++; }
void wait_for_copies(int pending) {
  Fiber& mine = fibers[me];
  size_t done = 0;
  for (; done < mine.copies.size() && mine.copies[done].group < mine.groups - pending; done++) {
    Copy& copy = mine.copies[done];
    if (copy.from && std::memcmp(copy.bytes, copy.from, 16)) fail("the source of a copy has changed while it was under way");
    std::memcpy(copy.to, copy.bytes, 16);
  }
  mine.copies.erase(mine.copies.begin(), mine.copies.begin() + done);
}

void barrier_init(u64* at, int arrivals) {
  barrier_at(at) = {(unsigned short)arrivals, (unsigned short)arrivals, 0, MAGIC};
}
void barrier_arrive(u64* at) {
  Barrier& barrier = barrier_at(at);
  if (barrier.magic != MAGIC) fail("arrives at a barrier that was not initialised");
  if (--barrier.missing) return;
  barrier.phase++, barrier.missing = barrier.arrivals;
  wake_all(WAITS_AT_BARRIER, [&](const Fiber& fiber) { return fiber.barrier == at && fiber.parity != barrier.phase % 2; });
}
void barrier_wait(u64* at, int parity) {
  Barrier& barrier = barrier_at(at);
  if (barrier.magic != MAGIC) fail("waits at a barrier that was not initialised");
  if (barrier.phase % 2 != parity) return;
  fibers[me].barrier = at, fibers[me].parity = parity;
  sleep(WAITS_AT_BARRIER);
}

const char* run(const char* kernel, const Launch& launch, void (*body)(const Launch&), char* statics, size_t static_bytes) {
  name = kernel, work = body, launched = &launch, failed = false;
  threads = launch.threads, shared_bytes = launch.shared_bytes;
  static_begin = statics, static_end = statics + static_bytes;
  dice.seed(launch.seed + 1);
  gridDim = {(unsigned)launch.grid[0], (unsigned)launch.grid[1], (unsigned)launch.grid[2]};
  blockDim = {(unsigned)threads, 1, 1};
  std::vector<int> order(launch.grid[0] * launch.grid[1]);
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  std::shuffle(order.begin(), order.end(), dice);
  for (int block : order) {
    blockIdx = {(unsigned)(block % launch.grid[0]), (unsigned)(block / launch.grid[0]), 0};
    std::memset(dynamic_shared, 0xff, SHARED);
    std::memset(statics, 0xff, static_bytes);
    run_block(launch);
    for (size_t i = shared_bytes; i < SHARED && !failed; i++)
      if (dynamic_shared[i] != '\xff') {
        std::snprintf(error, sizeof error, "%s: block (%u, %u) wrote byte %d of %d bytes of dynamic shared memory", kernel, blockIdx.x, blockIdx.y, (int)i, shared_bytes);
        failed = true;
      }
    if (!failed) continue;
    for (Fiber& fiber : fibers) fiber.started = false;  // they stand somewhere in the kernel, never to come back
    return error;
  }
  return nullptr;
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
