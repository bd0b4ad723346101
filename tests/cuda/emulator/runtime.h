// Runs CUDA kernels on the CPU, for tests: the part of the emulator that the kernels do not see (that is
// grid_emulator.h).
//
// One OS thread runs one block at a time; every CUDA thread is a fiber with a stack of its own. A fiber runs until it
// waits (at a barrier, in a warp operation), ends, or is taken off at a memory access. What runs next is the
// *schedule*: 0 in order, 1 in reverse, 2 and above shuffled by that seed, blocks included, and, in a library built
// with -fsanitize=thread, switching at random memory accesses as well.
//
// Such a library calls the __tsan_* hooks at every load and store. No part of ThreadSanitizer's own library is linked:
// the hooks are ours (access_checks.cpp) and check each access as compute-sanitizer does on a device. See `watch`.
//
// What no schedule here shows: weak memory ordering (a store is seen by everybody at once), the precision of the
// device's approximate functions, occupancy, bank conflicts, speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace emulator {

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  std::size_t count() const { return std::size_t{x} * y * z; }
};

struct Position {
  Dim3 thread, block, block_size, grid_size;
};

inline constexpr unsigned kWarp = 32;
inline constexpr std::size_t kMaxThreads = 1024;
inline constexpr std::size_t kMaxShared = 48 << 10;  // what a kernel gets without opting in to more

// Runs `body` once for every thread of the grid. Throws std::runtime_error, naming block and thread, for whatever the
// checks find, and for a deadlock.
void launch(Dim3 grid, Dim3 block, std::size_t dynamic_shared, const std::function<void()>& body);

// ---- for the thread that is running ----------------------------------------------------------------------------

const Position& position();
unsigned lane();
void wait_for_block(const char* file, int line);
// Publishes `value` to the lanes of `mask` and returns what each of the 32 published, once all have arrived.
const std::uint64_t* exchange(std::uint32_t mask, std::uint64_t value);
// As `exchange`, and orders the memory accesses of those lanes.
void wait_for_warp(std::uint32_t mask);
// The block's shared array that belongs to `key` (one key for each declaration).
void* shared_array(const void* key, std::size_t bytes);
void* dynamic_shared();
// To be called before an atomic operation on [address, address + bytes).
void atomic_access(const void* address, std::size_t bytes);

// ---- settings, from tests --------------------------------------------------------------------------------------

void set_schedule(unsigned schedule);
void set_multiprocessors(int count);
int multiprocessors();

// Global memory that the next launches may use: [address, address + bytes). With any memory watched, and a library
// built for it, these are errors:
//   - an access within `guard` bytes before or after a watched range,
//   - an access that is not aligned to its size, which a GPU refuses,
//   - two threads that touch the same byte, one of them writing, with no barrier between them and not both atomically
//     (threads of different blocks are never ordered within a launch),
//   - a read of shared memory that no thread of the block has written.
void watch(const void* address, std::size_t bytes, std::size_t guard);
void forget_watched();

// ---- between the runtime and the access checks -----------------------------------------------------------------

struct Accessor {
  std::uint32_t launch, block, thread;
  std::uint32_t barriers, warp_barriers;  // how many of each the thread has passed
};

const Accessor* running();  // nullptr outside a kernel
bool on_running_stack(const void* address);
[[noreturn]] void fail(const std::string& what);  // ends the launch with an error at the running thread
void maybe_preempt();
// A block begins; the one before used the first `used` bytes.
void shared_memory_is_fresh(const void* arena, std::size_t bytes, std::size_t used);
void checked_atomic(const void* address, std::size_t bytes);

}  // namespace emulator
