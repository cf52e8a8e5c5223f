// What kernels ask for: meetings of a warp and of a block, copies, barriers, and what is checked on the way.
#include <cstdio>

#include "blocks.h"

namespace emulator {
namespace {

// What an mbarrier's 64 bits hold here.
struct Barrier {
  u64 arrivals : 11, missing : 11, phase : 4, magic : 16;
  long long bytes : 22;  // that must come
};
constexpr u64 MAGIC = 0xba55;

}  // namespace

bool in_shared(const char* at, size_t bytes) {
  return (at >= dynamic_shared && at + bytes <= dynamic_shared + shared_bytes) || (at >= static_begin && at + bytes <= static_end);
}

namespace {

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
  barrier_at(at) = {(u64)arrivals, (u64)arrivals, 0, MAGIC, 0};
}
static void end_phase(u64* at) {
  Barrier& barrier = barrier_at(at);
  if (barrier.missing || barrier.bytes) return;
  barrier.phase++, barrier.missing = barrier.arrivals;
  wake_all(*here, WAITS_AT_BARRIER, [&](const Fiber& fiber) { return fiber.barrier == at && fiber.parity != barrier.phase % 2; });
}
static void arrive(u64* at, int bytes) {
  Barrier& barrier = barrier_at(at);
  if (barrier.magic != MAGIC) fail("arrives at a barrier that was not initialised");
  if (!barrier.missing) fail("arrives at a barrier at which nobody is missing");
  barrier.missing--, barrier.bytes += bytes;
  end_phase(at);
}
void barrier_arrive(u64* at) { arrive(at, 0); }
void barrier_expect(u64* at, int bytes) { arrive(at, bytes); }
void barrier_wait(u64* at, int parity) {
  Barrier& barrier = barrier_at(at);
  if (barrier.magic != MAGIC) fail("waits at a barrier that was not initialised");
  if (barrier.phase % 2 != parity) return;
  mine().barrier = at, mine().parity = parity;
  sleep(WAITS_AT_BARRIER);
}

void arrive_at(int number, int count, bool waits) {
  if (number < 0 || number >= MOST_NUMBERED) fail("there is no barrier %d", number);
  Numbered& barrier = here->numbered[number];
  if (barrier.arrived && barrier.threads != count) fail("barrier %d is for %d threads and for %d", number, barrier.threads, count);
  barrier.threads = count;
  mine().parity = number;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    return wake_all(*here, WAITS_AT_NUMBER, [&](const Fiber& fiber) { return fiber.parity == number; });
  }
  if (waits) sleep(WAITS_AT_NUMBER);
}

// A tile's rows of 64 elements lie one behind another, their 16-byte pieces exchanged by bits 7 to 9 of the address (the 128-byte swizzle).
constexpr int ROW_BYTES = 128;
static int rows_of(const Tensor& tensor) {
  int rows = 1;
  for (int d = 1; d < tensor.rank; d++) rows *= tensor.box[d];
  return rows;
}
void fetch(void* to, const void* map, u64* barrier, const int* at, int rank) {
  Fetch fetch{static_cast<char*>(to), {}, barrier, {}};
  std::memcpy(&fetch.tensor, map, sizeof fetch.tensor);
  if (fetch.tensor.rank != rank) fail("a tile of %d dimensions of a tensor of %d", rank, fetch.tensor.rank);
  if (fetch.tensor.box[0] * 2 != ROW_BYTES) fail("a tile's rows have %d elements", fetch.tensor.box[0]);
  std::memcpy(fetch.at, at, rank * sizeof *at);
  check_alignment(to, ROW_BYTES);
  int bytes = rows_of(fetch.tensor) * ROW_BYTES;
  if (!in_shared(fetch.to, bytes)) fail("a tile's target does not lie in shared memory");
  std::memset(to, 0xff, bytes);
  here->fetches.push_back(fetch);
}
void bring_a_tile() {
  std::vector<Fetch>& fetches = here->fetches;
  std::swap(fetches[roll(fetches.size())], fetches.back());
  Fetch fetch = fetches.back();
  fetches.pop_back();
  const Tensor& tensor = fetch.tensor;
  int rows = rows_of(tensor);
  for (int row = 0; row < rows; row++) {
    const char* from = tensor.begin;
    bool inside = true;
    for (int d = 1, rest = row; d < tensor.rank; rest /= tensor.box[d++]) {
      long long place = fetch.at[d] + rest % tensor.box[d];
      inside = inside && place >= 0 && place < (long long)tensor.sizes[d];
      from += place * (long long)tensor.strides[d] * 2;
    }
    for (int piece = 0; piece < 8; piece++) {
      char* to = fetch.to + row * ROW_BYTES + 16 * (piece ^ (shared_offset(fetch.to + row * ROW_BYTES) >> 7 & 7));
      for (int e = 0; e < 8; e++) {
        long long column = fetch.at[0] + piece * 8 + e;
        bool there = inside && column >= 0 && column < (long long)tensor.sizes[0];
        std::memset(to + 2 * e, 0, 2);
        if (there) std::memcpy(to + 2 * e, from + column * 2, 2);
      }
    }
  }
  Barrier& barrier = barrier_at(fetch.barrier);
  if (barrier.bytes < rows * ROW_BYTES) fail("more bytes of tiles come than a barrier expects");
  barrier.bytes -= rows * ROW_BYTES;
  end_phase(fetch.barrier);
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
