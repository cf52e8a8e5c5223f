// Lets the threads of blocks run as fibers, one at a time, in random order.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "blocks.h"

Place threadIdx, blockIdx, gridDim, blockDim;

namespace emulator {

constexpr size_t STACK = 128 << 10, SHARED = 232 << 10;

// The shared memory of the block at work. 0xff is the poison: NaN in every float format.
alignas(1024) char dynamic_shared[SHARED];

Block* here;
int me, threads, shared_bytes, cluster_size;
char *static_begin, *static_end;
bool previous_ended;

namespace {

const char* const STATES[] = {"run", "meet their warp", "wait at __syncthreads", "wait at a barrier", "wait at a numbered barrier", "wait for the kernel before", "wait for their cluster", "have left"};

Block blocks[MOST_BLOCKS];
bool failed;
char error[1000];
const char* name;
jmp_buf scheduler;
void (*work)(const Launch&);
const Launch* launched;
std::minstd_rand dice;

void life() {
  for (;;) {
    work(*launched);
    if (!mine().copies.empty()) fail("thread %d ends while %d of its copies are under way", me, (int)mine().copies.size());
    if (!mine().products.empty()) fail("thread %d ends while %d of its products are under way", me, (int)mine().products.size());
    if (mine().arrived) fail("thread %d ends without having waited for its cluster, where it arrived", me);
    here->alive--;
    mine().state = GONE;
    my_warp().ready--;
    if (here->alive && here->at_barrier == here->alive) open_block_barrier();  // the hardware counts only who is there
    open_cluster_barrier();
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

void start(Block& block, Block& first, unsigned number) {
  block.first = &first, block.cluster = {0, 0};
  block.place = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
  block.dynamic.assign(shared_bytes, '\xff');
  block.statics.assign(static_end - static_begin, '\xff');
  block.busy = true, block.pauses = false;
  block.alive = threads, block.at_barrier = 0;
  block.mood = roll(3), block.favourite = roll(threads / 32);
  for (int i = 0; i < threads; i++) {
    block.fibers[i].state = READY, block.fibers[i].groups = 0, block.fibers[i].arrived = false;
    block.fibers[i].copies.clear(), block.fibers[i].products.clear(), block.fibers[i].sums.clear();
    block.fibers[i].product_groups = 0, block.fibers[i].may_multiply = false;
  }
  block.fetches.clear();
  for (Numbered& barrier : block.numbered) barrier = {0, 0};
  for (int w = 0; w < threads / 32; w++)
    block.warps[w].meetings = block.warps[w].waiting = 0, block.warps[w].ready = 32, block.warps[w].what = "";
}
void finish() {
  here->busy = false;
  if (!here->fetches.empty() && !failed) report(("ends while " + std::to_string(here->fetches.size()) + " of its tiles are on their way").c_str());
  for (size_t i = shared_bytes; i < SHARED && !failed; i++)
    if (dynamic_shared[i] != '\xff') report(("wrote byte " + std::to_string(i) + " of " + std::to_string(shared_bytes) + " of dynamic shared memory").c_str());
}

bool can_go_on(const Block& block) {
  int ready = 0;
  for (int w = 0; w < threads / 32; w++) ready += block.warps[w].ready;
  return block.busy && !block.pauses && block.alive && (ready > 0 || !block.fetches.empty());
}

// One warp of the block at work, until all its lanes wait. A block has one of three moods: any warp at any time; one warp that gets a turn when
// no other can go on; one warp that goes on as long as it can.
void turn() {
  int candidates[MOST_WARPS], found = 0;
  for (int w = 0; w < threads / 32; w++)
    if (here->warps[w].ready) candidates[found++] = w;
  if (!here->fetches.empty() && (!found || !roll(8))) return bring_a_tile();
  int warp = candidates[roll(found)];
  if (here->mood == 1 && warp == here->favourite && found > 1 && roll(64)) return;
  if (here->mood == 2 && here->warps[here->favourite].ready && roll(64)) warp = here->favourite;
  for (int i = 0, first = roll(32), step = roll(16) * 2 + 1; i < 32 && !failed && !here->pauses; i++) {
    int thread = warp * 32 + (first + i * step) % 32;
    if (here->fibers[thread].state == READY) resume(thread);
  }
  if (!roll(4096)) here->favourite = roll(threads / 32);
}

}  // namespace

int roll(int sides) { return dice() / 16 % sides; }

// setjmp and longjmp switch stacks without a system call; ucontext only starts.
void yield() {
  if (!_setjmp(mine().point)) _longjmp(scheduler, 1);
}
void sleep(State state) {
  mine().state = state;
  my_warp().ready--;
  while (mine().state != READY) yield();
}

void fail(const char* format, ...) {
  int length = std::snprintf(error, sizeof error, "%s: block (%u, %u) thread %d: ", name, blockIdx.x, blockIdx.y, me);
  va_list values;
  va_start(values, format);
  std::vsnprintf(error + length, sizeof error - length, format, values);
  va_end(values);
  failed = true;
  _longjmp(scheduler, 1);
}

// Up to three blocks at once, or up to two clusters, at times only one. Then each begins before the end of the kernel before; else only the
// first ones do.
const char* run(const char* kernel, const Launch& launch, int cluster, void (*body)(const Launch&), char* statics, char* statics_end) {
  name = kernel, work = body, launched = &launch, failed = false, here = nullptr;
  threads = launch.threads, shared_bytes = launch.shared_bytes, cluster_size = cluster;
  static_begin = statics, static_end = statics_end;
  dice.seed(launch.seed + 1);
  gridDim = {(unsigned)launch.grid[0], (unsigned)launch.grid[1], (unsigned)launch.grid[2]};
  blockDim = {(unsigned)threads, 1, 1};
  std::memset(dynamic_shared, 0xff, SHARED);
  if (launch.grid[0] % cluster) return "the grid is not whole clusters";
  std::vector<int> order(launch.grid[0] * launch.grid[1] * launch.grid[2] / cluster);  // of clusters
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  std::shuffle(order.begin(), order.end(), dice);
  int most = 1 + roll(cluster > 1 ? MOST_BLOCKS / cluster : MOST_APART);
  auto previous = [&](bool ended) {
    previous_ended = ended || !launch.previous;
    if (launch.previous) launch.previous(ended);
  };
  previous(false);
  for (size_t next = 0; !failed;) {
    std::vector<Block*> busy, able;
    for (Block* first = blocks; first < blocks + most * cluster; first += cluster) {
      Block* end = first + cluster;
      if (next < order.size() && std::none_of(first, end, [](const Block& block) { return block.busy; })) {
        if (most == 1 && next) previous(false);
        for (Block* block = first; block < end; block++) start(*block, *first, order[next] * cluster + (block - first));
        next++;
        if (here >= first && here < end) here = nullptr;
      }
      for (Block* block = first; block < end; block++) {
        if (!roll(16)) block->pauses = false;
        if (block->busy) busy.push_back(block);
        if (can_go_on(*block)) able.push_back(block);
      }
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
