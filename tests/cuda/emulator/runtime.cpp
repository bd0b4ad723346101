#include "runtime.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer follows stack switches through swapcontext only, and needs more stack.
constexpr bool kSwitchByContext = true;
constexpr std::size_t kStack = 256 << 10;
#else
constexpr bool kSwitchByContext = false;
constexpr std::size_t kStack = 64 << 10;
#endif

namespace emulator {
namespace {

enum class Wait { nothing, block, warp, over };

struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool started = false;
  Wait wait = Wait::nothing;
  Accessor accessor{};
  Position position;
  std::uint32_t mask = 0;
  bool orders_memory = false;
  std::uint64_t given = 0, received[kWarp] = {};
  const char* barrier_file = nullptr;
  int barrier_line = 0;
  std::unique_ptr<char[]> stack{new char[kStack]};
};

struct Grid {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::size_t threads = 0;
  Fiber* current = nullptr;
  ucontext_t scheduler_context;
  jmp_buf scheduler_place;
  const std::function<void()>* body = nullptr;
  std::string error;

  alignas(16) unsigned char shared[kMaxShared];
  std::size_t shared_used = 0, dynamic_bytes = 0;
  std::unordered_map<const void*, std::size_t> shared_offsets;

  unsigned schedule = 0, launches = 0;
  int multiprocessors = 3;
  std::mt19937 random;
};

Grid& grid() {
  static Grid instance;
  return instance;
}

// ---- switching -------------------------------------------------------------------------------------------------

void to_scheduler() {
  Fiber& fiber = *grid().current;
  if (kSwitchByContext) {
    swapcontext(&fiber.context, &grid().scheduler_context);
  } else if (_setjmp(fiber.place) == 0) {
    _longjmp(grid().scheduler_place, 1);
  }
}

// A fiber lives as long as the process and runs one thread after another: making one costs system calls.
void fiber_main() {
  for (;;) {
    (*grid().body)();
    grid().current->wait = Wait::over;
    to_scheduler();
  }
}

void resume(Fiber& fiber) {
  Grid& g = grid();
  g.current = &fiber;
  const bool first = !fiber.started;
  if (first) {
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  if (kSwitchByContext) {
    swapcontext(&g.scheduler_context, &fiber.context);
  } else if (_setjmp(g.scheduler_place) == 0) {
    if (first) setcontext(&fiber.context);
    _longjmp(fiber.place, 1);
  }
  g.current = nullptr;
}

void wait_as(Wait wait) {
  grid().current->wait = wait;
  to_scheduler();
}

// ---- one block -------------------------------------------------------------------------------------------------

std::string describe(const Fiber& fiber) {
  const Dim3 &t = fiber.position.thread, &b = fiber.position.block;
  auto text = [](const Dim3& d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  return "block " + text(b) + " thread " + text(t);
}

// Lets those warp operations end whose lanes are all there; lanes that have ended are not waited for.
bool release_warps() {
  Grid& g = grid();
  bool any = false;
  for (std::size_t first = 0; first < g.threads; first += kWarp) {
    const std::size_t lanes = std::min<std::size_t>(kWarp, g.threads - first);
    for (std::size_t l = 0; l < lanes; ++l) {
      Fiber& leader = *g.fibers[first + l];
      if (leader.wait != Wait::warp) continue;
      const std::uint32_t mask = leader.mask;
      std::uint64_t values[kWarp] = {};
      std::vector<Fiber*> group;
      bool complete = true;
      for (std::size_t k = 0; k < lanes; ++k) {
        Fiber& fiber = *g.fibers[first + k];
        if (!(mask >> k & 1) || fiber.wait == Wait::over) continue;
        complete = complete && fiber.wait == Wait::warp && fiber.mask == mask;
        values[k] = fiber.given;
        group.push_back(&fiber);
      }
      if (!complete) continue;
      for (Fiber* fiber : group) {
        std::memcpy(fiber->received, values, sizeof values);
        fiber->accessor.warp_barriers += fiber->orders_memory;
        fiber->wait = Wait::nothing;
      }
      any = true;
    }
  }
  return any;
}

// Lets the block's barrier end if all threads that have not ended wait at one.
bool release_block() {
  Grid& g = grid();
  const Fiber* first = nullptr;
  for (std::size_t i = 0; i < g.threads; ++i) {
    const Fiber& fiber = *g.fibers[i];
    if (fiber.wait == Wait::over) continue;
    if (fiber.wait != Wait::block) {
      g.error = "deadlock: " + describe(fiber) + " waits in a warp operation for lanes that do not come (divergent barrier or wrong mask)";
      return false;
    }
    if (first && (first->barrier_file != fiber.barrier_file || first->barrier_line != fiber.barrier_line)) {
      g.error = "divergent barrier: " + describe(*first) + " is at line " + std::to_string(first->barrier_line) + ", " +
                describe(fiber) + " at line " + std::to_string(fiber.barrier_line);
      return false;
    }
    if (!first) first = &fiber;
  }
  if (!first) return false;
  for (std::size_t i = 0; i < g.threads; ++i) {
    Fiber& fiber = *g.fibers[i];
    if (fiber.wait != Wait::block) continue;
    fiber.accessor.barriers += 1;
    fiber.wait = Wait::nothing;
  }
  return true;
}

void run_block(Dim3 block, Dim3 size, Dim3 grid_size, std::uint32_t number) {
  Grid& g = grid();
  // 0xFF: floats read NaN and integers -1 where a thread reads what nobody has written.
  std::memset(g.shared, 0xFF, sizeof g.shared);
  shared_memory_is_fresh(g.shared, sizeof g.shared, g.shared_used);
  g.shared_offsets.clear();
  g.shared_used = (g.dynamic_bytes + 15) / 16 * 16;

  for (unsigned i = 0; i < g.threads; ++i) {
    Fiber& fiber = *g.fibers[i];
    fiber.wait = Wait::nothing;
    fiber.accessor = {g.launches, number, i, 0, 0};
    fiber.position = {Dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y)), block, size, grid_size};
  }
  std::vector<std::size_t> order(g.threads);
  std::iota(order.begin(), order.end(), std::size_t{0});
  if (g.schedule == 1) std::reverse(order.begin(), order.end());
  for (;;) {
    if (g.schedule > 1) std::shuffle(order.begin(), order.end(), g.random);
    bool ran = false;
    for (std::size_t i : order) {
      if (g.fibers[i]->wait != Wait::nothing) continue;
      resume(*g.fibers[i]);
      if (!g.error.empty()) return;
      ran = true;
    }
    if (!ran && !release_warps() && !release_block()) return;  // all have ended, or an error
  }
}

}  // namespace

void launch(Dim3 grid_size, Dim3 block_size, std::size_t dynamic_shared, const std::function<void()>& body) {
  Grid& g = grid();
  if (grid_size.count() == 0 || block_size.count() == 0) throw std::runtime_error("launch: an empty grid or block");
  if (grid_size.y > 65535 || grid_size.z > 65535) throw std::runtime_error("launch: grid y and z must be at most 65535");
  if (block_size.count() > kMaxThreads) throw std::runtime_error("launch: a block has at most 1024 threads");
  if (dynamic_shared > kMaxShared) throw std::runtime_error("launch: more than 48 KiB of shared memory");
  g.threads = block_size.count();
  while (g.fibers.size() < g.threads) g.fibers.push_back(std::make_unique<Fiber>());
  g.body = &body;
  g.dynamic_bytes = dynamic_shared;
  g.launches += 1;
  g.random.seed(g.schedule);

  std::vector<std::uint32_t> blocks(grid_size.count());
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (g.schedule == 1) std::reverse(blocks.begin(), blocks.end());
  if (g.schedule > 1) std::shuffle(blocks.begin(), blocks.end(), g.random);
  for (std::uint32_t b : blocks) {
    const Dim3 block(b % grid_size.x, b / grid_size.x % grid_size.y, b / (grid_size.x * grid_size.y));
    run_block(block, block_size, grid_size, b);
    if (g.error.empty()) continue;
    g.fibers.clear();  // some are in the middle of a thread
    throw std::runtime_error(std::exchange(g.error, {}));
  }
}

const Position& position() { return grid().current->position; }
unsigned lane() { return grid().current->accessor.thread % kWarp; }

void wait_for_block(const char* file, int line) {
  grid().current->barrier_file = file;
  grid().current->barrier_line = line;
  wait_as(Wait::block);
}

const std::uint64_t* exchange(std::uint32_t mask, std::uint64_t value) {
  if (!(mask >> lane() & 1)) fail("a warp operation whose mask leaves out the calling lane");
  Fiber& fiber = *grid().current;
  fiber.mask = mask;
  fiber.given = value;
  wait_as(Wait::warp);
  return fiber.received;
}

void wait_for_warp(std::uint32_t mask) {
  grid().current->orders_memory = true;
  exchange(mask, 0);
  grid().current->orders_memory = false;
}

void* shared_array(const void* key, std::size_t bytes) {
  Grid& g = grid();
  const auto [entry, is_new] = g.shared_offsets.try_emplace(key, g.shared_used);
  if (is_new) g.shared_used += (bytes + 15) / 16 * 16;
  if (g.shared_used > kMaxShared) fail("more than 48 KiB of shared memory");
  return g.shared + entry->second;
}

void* dynamic_shared() { return grid().shared; }

void atomic_access(const void* address, std::size_t bytes) {
  maybe_preempt();
  checked_atomic(address, bytes);
}

void set_schedule(unsigned schedule) { grid().schedule = schedule; }
void set_multiprocessors(int count) { grid().multiprocessors = count; }
int multiprocessors() { return grid().multiprocessors; }

const Accessor* running() { return grid().current ? &grid().current->accessor : nullptr; }

bool on_running_stack(const void* address) {
  const char* stack = grid().current->stack.get();
  return address >= stack && address < stack + kStack;
}

void fail(const std::string& what) {
  // No exception: the compiler takes the hooks that call this for functions that cannot throw. The fiber is left as
  // it is and never resumed.
  grid().error = what + ", at " + describe(*grid().current);
  grid().current->wait = Wait::over;
  to_scheduler();
  __builtin_unreachable();
}

void maybe_preempt() {
  Grid& g = grid();
  if (g.schedule > 1 && g.random() % 8 == 0) to_scheduler();
}

}  // namespace emulator
