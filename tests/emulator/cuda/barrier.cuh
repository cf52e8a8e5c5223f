// Barriers in shared memory (mbarrier) in plain C++: so many arrivals end a phase; who waits names the parity of the phase.
#pragma once
#include "common.cuh"

inline void barrier_init(u64* barrier, int arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void barrier_arrive(u64* barrier) { emulator::barrier_arrive(barrier); }
inline void barrier_wait(u64* barrier, int parity) { emulator::barrier_wait(barrier, parity); }
