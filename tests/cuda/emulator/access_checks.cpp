// The hooks that a compiler with -fsanitize=thread calls at loads and stores, and what they check (`watch` in runtime.h).
#include <algorithm>
#include <sstream>
#include <vector>

#include "runtime.h"

namespace emulator {
namespace {

// Who touched a byte last. `thread` may stand for several readers.
struct Stamp {
  Accessor by{};
  bool there = false, atomic = false;
};

constexpr std::uint32_t kManyInWarp = 1u << 16;   // with the warp's number in the low bits
constexpr std::uint32_t kManyInBlock = 1u << 17;
constexpr std::uint32_t kManyBlocks = ~0u;

struct Byte {
  Stamp write, read;
};

struct Region {
  std::uintptr_t begin, end, guard;
  bool shared;
  std::vector<Byte> bytes;
};

std::vector<Region> regions;  // a handful: searched one by one

std::uint32_t warp_of(std::uint32_t thread) { return thread & kManyInWarp ? thread & ~kManyInWarp : thread / kWarp; }

// Does everything `before` did happen before what `now` does?
bool ordered(const Stamp& before, const Accessor& now) {
  if (!before.there || before.by.launch != now.launch) return true;  // launches follow each other
  if (before.by.block != now.block) return false;
  if (before.by.thread == now.thread || before.by.barriers < now.barriers) return true;
  if (before.by.thread == kManyInBlock || warp_of(before.by.thread) != now.thread / kWarp) return false;
  return before.by.warp_barriers < now.warp_barriers;
}

// The stamp of `now` joined to readers that it is not ordered after.
void add_reader(Stamp& readers, const Accessor& now, bool atomic) {
  const bool joined = !ordered(readers, now);
  const Accessor before = readers.by;
  readers = {now, true, joined ? readers.atomic && atomic : atomic};
  if (!joined) return;
  if (before.block != now.block) {
    readers.by.block = kManyBlocks;
  } else if (before.thread == kManyInBlock || warp_of(before.thread) != now.thread / kWarp) {
    readers.by.thread = kManyInBlock;
  } else {
    readers.by.thread = kManyInWarp | now.thread / kWarp;
  }
}

[[noreturn]] void report(const char* what, std::uintptr_t address, std::size_t size, const Region& region) {
  std::ostringstream text;
  text << what << " of " << size << " bytes at byte " << static_cast<std::intptr_t>(address - region.begin) << " of "
       << (region.shared ? "shared" : "global") << " memory of " << region.end - region.begin << " bytes";
  fail(text.str());
}

void check(const void* pointer, std::size_t size, bool writes, bool atomic, bool aligned) {
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  for (Region& region : regions) {
    if (address + size <= region.begin - region.guard || address >= region.end + region.guard) continue;
    if (address < region.begin || address + size > region.end) {
      report(writes ? "out-of-bounds write" : "out-of-bounds read", address, size, region);
    }
    if (aligned && address % size != 0) report("misaligned access", address, size, region);
    const Accessor& now = *running();
    for (std::size_t i = 0; i < size; ++i) {
      Byte& byte = region.bytes[address - region.begin + i];
      if (region.shared && !writes && !byte.write.there) report("read of unwritten", address, size, region);
      if (!ordered(byte.write, now) && !(atomic && byte.write.atomic)) {
        report(writes ? "race: unordered writes" : "race: read beside an unordered write", address, size, region);
      }
      if (writes && !ordered(byte.read, now) && !(atomic && byte.read.atomic)) {
        report("race: write beside an unordered read", address, size, region);
      }
      if (writes) byte.write = {now, true, atomic};
      if (!writes || atomic) add_reader(byte.read, now, atomic);
    }
    return;
  }
}

}  // namespace

void watch(const void* address, std::size_t bytes, std::size_t guard) {
  const auto begin = reinterpret_cast<std::uintptr_t>(address);
  regions.push_back({begin, begin + bytes, guard, false, std::vector<Byte>(bytes)});
}

void forget_watched() { regions.clear(); }

void shared_memory_is_fresh(const void* arena, std::size_t bytes, std::size_t used) {
  if (regions.empty()) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(arena);
  const auto at = std::find_if(regions.begin(), regions.end(), [](const Region& region) { return region.shared; });
  if (at == regions.end()) {
    regions.push_back({begin, begin + bytes, 0, true, std::vector<Byte>(bytes)});
  } else {
    std::fill_n(at->bytes.begin(), used, Byte{});
  }
}

void checked_atomic(const void* address, std::size_t bytes) {
  if (!regions.empty()) check(address, bytes, true, true, true);
}

}  // namespace emulator

namespace {

void access(const void* address, std::size_t size, bool writes, bool aligned) {
  if (!emulator::running() || emulator::on_running_stack(address)) return;
  emulator::maybe_preempt();
  if (!emulator::regions.empty()) emulator::check(address, size, writes, false, aligned);
}

}  // namespace

#define ACCESS_HOOKS(size)                                                                 \
  void __tsan_read##size(void* p) { access(p, size, false, true); }                        \
  void __tsan_write##size(void* p) { access(p, size, true, true); }                        \
  void __tsan_unaligned_read##size(void* p) { access(p, size, false, false); }             \
  void __tsan_unaligned_write##size(void* p) { access(p, size, true, false); }             \
  void __tsan_volatile_read##size(void* p) { access(p, size, false, true); }               \
  void __tsan_volatile_write##size(void* p) { access(p, size, true, true); }

extern "C" {
ACCESS_HOOKS(1)
ACCESS_HOOKS(2)
ACCESS_HOOKS(4)
ACCESS_HOOKS(8)
ACCESS_HOOKS(16)
void __tsan_read_range(void* p, unsigned long size) { access(p, size, false, false); }
void __tsan_write_range(void* p, unsigned long size) { access(p, size, true, false); }
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
