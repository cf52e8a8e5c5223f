// What kernels ask for: meetings of a warp and of a block, copies, barriers, and what is checked on the way.
#include <cstdio>

#include "blocks.h"

namespace emulator {
namespace {

// What an mbarrier's 64 bits hold here.
struct Barrier {
  unsigned short arrivals, missing, phase, magic;
};
constexpr unsigned short MAGIC = 0xba55;

bool in_shared(const char* at, size_t bytes) {
  return (at >= dynamic_shared && at + bytes <= dynamic_shared + shared_bytes) || (at >= static_begin && at + bytes <= static_end);
}
Barrier& barrier_at(u64* at) {
  check_alignment(at, 8);
  if (!in_shared(reinterpret_cast<char*>(at), 8)) fail("a barrier does not lie in shared memory");
  return *reinterpret_cast<Barrier*>(at);
}

}  // namespace

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

void open_block_barrier() {
  here->at_barrier = 0;
  wake_all(*here, MEETS_BLOCK, anyone);
}
void meet_block() {
  if (++here->at_barrier == here->alive) return open_block_barrier();
  sleep(MEETS_BLOCK);
}

void open_cluster_barrier() {
  Cluster& cluster = here->first->cluster;
  int alive = 0;
  for (int r = 0; r < cluster_size; r++) alive += here->first[r].alive;
  if (!alive || cluster.arrived < alive) return;
  cluster.arrived = 0, cluster.meetings++;
  for (int r = 0; r < cluster_size; r++) wake_all(here->first[r], MEETS_CLUSTER, anyone);
}
void cluster_arrive() {
  if (mine().arrived) fail("arrives twice at its cluster's barrier");
  mine().arrived = true, mine().meeting = here->first->cluster.meetings;
  here->first->cluster.arrived++;
  open_cluster_barrier();
}
void cluster_wait() {
  if (!mine().arrived) fail("waits for its cluster without having arrived");
  mine().arrived = false;
  if (mine().meeting == here->first->cluster.meetings) sleep(MEETS_CLUSTER);
}
void read_of_block(void* to, const void* from, size_t bytes, u32 rank) {
  const char* at = static_cast<const char*>(from);
  check_alignment(at, bytes);
  if (!in_shared(at, bytes)) fail("what it reads of another block does not lie in shared memory");
  if (rank >= (u32)cluster_size) fail("reads of block %d of a cluster of %d", (int)rank, cluster_size);
  if (!here->first->cluster.meetings) fail("reads of another block that may not have begun");
  if (!roll(16)) here->pauses = true, yield();  // others may go on in between
  Block& other = here->first[rank];
  if (!other.busy) fail("reads of block %d of its cluster, which has left", (int)rank);
  if (&other != here)
    at = at >= static_begin && at < static_end ? other.statics.data() + (at - static_begin) : other.dynamic.data() + (at - dynamic_shared);
  std::memcpy(to, at, bytes);
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
