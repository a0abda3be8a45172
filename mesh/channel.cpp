// A ring of messages from one process to another of the same host. `channel.py` sets it up and calls.
//
// A message is eight bytes of length, then its bytes, up to a multiple of eight; it may go on at the ring's beginning.
// One process puts, another takes. Who takes and finds nothing says that it is asleep, looks once more, and waits for
// a bell, which is not this file's; who puts rings it if the other is asleep.

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

namespace {

using Position = std::atomic<uint64_t>;
static_assert(Position::is_always_lock_free && sizeof(Position) == 8);

int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000L + time.tv_nsec;
}

int64_t padded(int64_t bytes) { return (bytes + 7) / 8 * 8; }

}  // namespace

struct Ring {
  alignas(64) Position put;  // bytes, since ever
  alignas(64) Position taken;
  alignas(64) std::atomic<uint32_t> asleep;  // who takes
  alignas(64) char data[];

  void copy_in(uint64_t at, const char* bytes, int64_t count, int64_t capacity) {
    int64_t first = at % capacity, straight = std::min(count, capacity - first);
    std::memcpy(data + first, bytes, straight);
    std::memcpy(data, bytes + straight, count - straight);
  }
  void copy_out(uint64_t at, char* bytes, int64_t count, int64_t capacity) {
    int64_t first = at % capacity, straight = std::min(count, capacity - first);
    std::memcpy(bytes, data + first, straight);
    std::memcpy(bytes + straight, data, count - straight);
  }
};

// Capacities are multiples of eight.
extern "C" {

long ring_bytes(long capacity) { return (sizeof(Ring) + capacity + 4095) / 4096 * 4096; }

// 0; 1 if the bell is to be rung; -1 if there is no room. bytes: -1 for a message of no bytes that says something.
long ring_put(Ring* ring, const char* message, long bytes, long capacity) {
  uint64_t at = ring->put.load(std::memory_order_relaxed);
  int64_t size = 8 + padded(std::max(0L, bytes));
  if (at + size - ring->taken.load(std::memory_order_acquire) > uint64_t(capacity)) return -1;
  ring->copy_in(at, reinterpret_cast<const char*>(&bytes), 8, capacity);
  if (bytes > 0) ring->copy_in(at + 8, message, bytes, capacity);
  ring->put.store(at + size);
  return ring->asleep.load() && ring->asleep.exchange(0);
}

// The length of the next message, for which it waits so long at most; -2 if there is none. A wait yields: whoever is
// to put something may need this core.
long ring_next(Ring* ring, long capacity, long patience_ns) {
  uint64_t at = ring->taken.load(std::memory_order_relaxed);
  if (ring->put.load() == at) {
    int64_t deadline = patience_ns ? now_ns() + patience_ns : 0;
    while (ring->put.load() == at) {
      if (!patience_ns || now_ns() >= deadline) return -2;
      sched_yield();
    }
  }
  long bytes;
  ring->copy_out(at, reinterpret_cast<char*>(&bytes), 8, capacity);
  return bytes;
}

// Takes the next message, of so many bytes.
void ring_take(Ring* ring, char* message, long bytes, long capacity) {
  uint64_t at = ring->taken.load(std::memory_order_relaxed);
  if (bytes > 0) ring->copy_out(at + 8, message, bytes, capacity);
  ring->taken.store(at + 8 + padded(std::max(0L, bytes)), std::memory_order_release);
}

// Says that who takes is about to wait for the bell, unless `ring_next` has something now.
void ring_sleep(Ring* ring) { ring->asleep.store(1); }

}
