// The emulator's settings for Python (ctypes).
#include "runtime.h"

extern "C" {
void emulator_set_schedule(unsigned schedule) { emulator::set_schedule(schedule); }
void emulator_set_multiprocessors(int count) { emulator::set_multiprocessors(count); }
void emulator_watch(const void* address, unsigned long bytes, unsigned long guard) { emulator::watch(address, bytes, guard); }
void emulator_forget_watched() { emulator::forget_watched(); }
}
