// Collectives between the ranks of one host, through memory that they share. `shared_memory.py` sets it up and calls.
//
// The memory of a group:
//
//     Rank[size]            how far each rank is
//     Mailbox[size][size]   what is under way from one rank to another
//     slots                 for each rank two: what it brings to this collective, and what it brought to the last
//     results               two, of a large sum
//     letters               the bytes of each mailbox
//
// A rank that begins its collective number k writes to its slot k % 2 and counts `progress` up; nobody else writes
// there. Whoever has seen all ranks arrive at k knows that all are done with k - 1, so that slot (k + 1) % 2 is free.
//
// A wait spins for a while, yields for a while, then sleeps (futex) until who is waited for wakes it, and looks
// now and then whether that one still lives. Pages that nothing is written to take no memory.

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kLetters = 64;  // under way from one rank to another
constexpr int kMostRanks = 256;
constexpr long kNapNs = 50'000'000;  // how long a sleeper sleeps before it looks after its peer
constexpr int kYields = 16;

enum Status { kDone, kTimedOut, kGone, kMismatch };

using Word = std::atomic<uint32_t>;
static_assert(Word::is_always_lock_free && sizeof(Word) == 4);

// A count that others wait for.
struct alignas(64) Count {
  Word value;
  Word sleepers;
};

struct alignas(64) Rank {
  Count progress;
  int64_t bytes[2];  // of what it brings to each of its slots
  Word gone;         // it has left, or failed
};

struct Letter {
  int64_t offset, bytes;
};

struct alignas(64) Mailbox {
  Count sent, received;
  Letter letters[kLetters];
};

int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000L + time.tv_nsec;
}

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

bool has_reached(const Count& count, uint32_t target) {
  return static_cast<int32_t>(count.value.load(std::memory_order_acquire) - target) >= 0;
}

void advance(Count& count) {
  count.value.fetch_add(1);
  if (count.sleepers.load()) syscall(SYS_futex, &count.value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

int64_t rounded(int64_t bytes) { return (bytes + 4095) / 4096 * 4096; }

}  // namespace

// One rank's view of its group.
struct Group {
  char* base;
  int rank, size;
  int64_t slot_bytes, box_bytes;
  int64_t spin_ns;
  int descriptors[kMostRanks];  // pidfd of each rank, or -1
  uint32_t progress;            // collectives begun, and the second halves of large sums
  uint32_t parity;
  int64_t next[kMostRanks];  // where the next letter to each rank goes
  Status failed;             // why the last wait was in vain; nothing can be done together after it
  int failed_at;             // which rank it was for

  Rank& at(int peer) { return reinterpret_cast<Rank*>(base)[peer]; }
  char* after_ranks() { return base + rounded(sizeof(Rank) * size); }
  Mailbox& box(int src, int dst) { return reinterpret_cast<Mailbox*>(after_ranks())[src * size + dst]; }
  char* slots() { return after_ranks() + rounded(sizeof(Mailbox) * size * size); }
  char* slot(int peer) { return slots() + (2 * peer + parity) * slot_bytes; }
  char* result() { return slots() + (2 * size + parity) * slot_bytes; }
  char* letters(int src, int dst) { return slots() + 2 * (size + 1) * slot_bytes + (src * size + dst) * box_bytes; }

  Status fail(Status status, int peer) {
    failed_at = peer;
    return failed = status;
  }

  bool is_gone(int peer) {
    if (at(peer).gone.load()) return true;
    pollfd process{descriptors[peer], POLLIN, 0};
    return descriptors[peer] >= 0 && poll(&process, 1, 0) > 0;
  }

  Status wait(Count& count, uint32_t target, int peer, int64_t timeout_ns) {
    if (has_reached(count, target)) return kDone;
    int64_t began = now_ns();
    while (now_ns() - began < spin_ns)
      for (int i = 0; i < 32; ++i) {
        if (has_reached(count, target)) return kDone;
        pause_briefly();
      }
    for (int i = 0; i < kYields; ++i) {
      sched_yield();
      if (has_reached(count, target)) return kDone;
    }
    while (true) {
      count.sleepers.fetch_add(1);
      uint32_t value = count.value.load();
      if (static_cast<int32_t>(value - target) < 0) {
        timespec nap{0, kNapNs};
        syscall(SYS_futex, &count.value, FUTEX_WAIT, value, &nap, nullptr, 0);
      }
      count.sleepers.fetch_sub(1);
      if (has_reached(count, target)) return kDone;
      bool gone = is_gone(peer);
      if (has_reached(count, target)) return kDone;  // the last that it did
      if (gone) return fail(kGone, peer);
      if (now_ns() - began > timeout_ns) return fail(kTimedOut, peer);
    }
  }

  // Says that this rank has come so far, and waits for the others.
  Status meet(int64_t timeout_ns) {
    advance(at(rank).progress);
    ++progress;
    for (int peer = 0; peer < size; ++peer)
      if (Status status = peer == rank ? kDone : wait(at(peer).progress, progress, peer, timeout_ns)) return status;
    return kDone;
  }

  // Begins a collective to which each rank brings so many bytes, or this one none of them (null); kMismatch if they
  // do not agree on how many.
  Status exchange(const void* data, int64_t bytes, int64_t timeout_ns) {
    parity ^= 1;
    if (data) std::memcpy(slot(rank), data, bytes);
    at(rank).bytes[parity] = bytes;
    if (Status status = meet(timeout_ns)) return status;
    for (int peer = 0; peer < size; ++peer)
      if (at(peer).bytes[parity] != bytes) return fail(kMismatch, peer);
    return kDone;
  }
};

namespace {

struct Bfloat16 {
  uint16_t bits;
};

float widened(float x) { return x; }
double widened(double x) { return x; }
int64_t widened(int64_t x) { return x; }
int32_t widened(int32_t x) { return x; }
float widened(Bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

template <typename T, typename Wide>
void store(T& out, Wide x) {
  out = static_cast<T>(x);
}
void store(Bfloat16& out, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  uint32_t even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = is_nan ? 0x7fc0 : even;
}

#ifdef __FLT16_MAX__
float widened(_Float16 x) { return x; }
#endif

template <int op, typename Wide>
Wide combined(Wide a, Wide b) {
  if constexpr (op == 0) return a + b;
  if constexpr (op == 1) return (b > a || b != b) ? b : a;  // not a number wins, as in torch
  return (b < a || b != b) ? b : a;
}

// Elements begin..end of all slots, by position, to `out`: rounded once, alike on every rank.
template <typename T, int op>
void reduce(Group& group, int64_t begin, int64_t end, T* out) {
  using Wide = decltype(widened(T()));
  constexpr int64_t kBlock = 512;
  Wide sum[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    int64_t count = std::min(kBlock, end - first);
    const T* part = reinterpret_cast<const T*>(group.slot(0)) + first;
    for (int64_t i = 0; i < count; ++i) sum[i] = widened(part[i]);
    for (int peer = 1; peer < group.size; ++peer) {
      part = reinterpret_cast<const T*>(group.slot(peer)) + first;
      for (int64_t i = 0; i < count; ++i) sum[i] = combined<op>(sum[i], widened(part[i]));
    }
    for (int64_t i = 0; i < count; ++i) store(out[first + i], sum[i]);
  }
}

template <typename T, int op>
Status all_reduce(Group& group, T* data, int64_t count, int64_t timeout_ns) {
  // With more than two ranks each sums a part of what is large, for all: fewer reads, one more meeting.
  constexpr int64_t kLargeBytes = 16384;
  int64_t most = group.slot_bytes / static_cast<int64_t>(sizeof(T));
  for (int64_t first = 0; first < count; first += most) {
    int64_t now = std::min(most, count - first), bytes = now * sizeof(T);
    T* chunk = data + first;
    if (Status status = group.exchange(chunk, bytes, timeout_ns)) return status;
    if (group.size == 2 || bytes < kLargeBytes) {
      reduce<T, op>(group, 0, now, chunk);
    } else {
      T* result = reinterpret_cast<T*>(group.result());
      reduce<T, op>(group, now * group.rank / group.size, now * (group.rank + 1) / group.size, result);
      if (Status status = group.meet(timeout_ns)) return status;
      std::memcpy(chunk, result, bytes);
    }
  }
  return kDone;
}

template <typename T>
Status all_reduce(Group& group, int op, void* data, int64_t count, int64_t timeout_ns) {
  T* elements = static_cast<T*>(data);
  if (op == 0) return all_reduce<T, 0>(group, elements, count, timeout_ns);
  if (op == 1) return all_reduce<T, 1>(group, elements, count, timeout_ns);
  return all_reduce<T, 2>(group, elements, count, timeout_ns);
}

}  // namespace

// Each gives a Status; `shm_failed_at` then tells which rank it was about. Data are contiguous.
extern "C" {

long shm_group_bytes() { return sizeof(Group); }

long shm_total_bytes(int size, long slot_bytes, long box_bytes) {
  Group group{nullptr, 0, size, slot_bytes, box_bytes};
  return group.letters(size, 0) - group.base;
}

void shm_open(Group* group, void* base, int rank, int size, long slot_bytes, long box_bytes, const int* descriptors,
              long spin_ns) {
  *group = Group{static_cast<char*>(base), rank, size, slot_bytes, box_bytes, spin_ns};
  std::copy(descriptors, descriptors + size, group->descriptors);
}

// Whoever waits for this rank, now or later, waits in vain.
void shm_leave(Group* group) {
  Rank& own = group->at(group->rank);
  own.gone.store(1);
  syscall(SYS_futex, &own.progress.value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  for (int peer = 0; peer < group->size; ++peer) {
    syscall(SYS_futex, &group->box(group->rank, peer).sent.value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    syscall(SYS_futex, &group->box(peer, group->rank).received.value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }
}

int shm_failed_at(Group* group) { return group->failed_at; }

int shm_has_half() {
#ifdef __FLT16_MAX__
  return 1;
#else
  return 0;
#endif
}

int shm_all_reduce(Group* group, int dtype, int op, void* data, long count, long timeout_ns) {
  switch (dtype) {
    case 0: return all_reduce<float>(*group, op, data, count, timeout_ns);
    case 1: return all_reduce<Bfloat16>(*group, op, data, count, timeout_ns);
#ifdef __FLT16_MAX__
    case 2: return all_reduce<_Float16>(*group, op, data, count, timeout_ns);
#endif
    case 3: return all_reduce<double>(*group, op, data, count, timeout_ns);
    case 4: return all_reduce<int64_t>(*group, op, data, count, timeout_ns);
    case 5: return all_reduce<int32_t>(*group, op, data, count, timeout_ns);
  }
  return kMismatch;
}

// The same by arguments that lie in memory, eight bytes each.
int shm_all_reduce_call(const int64_t* a) {
  if (Status status = reinterpret_cast<Group*>(a[0])->failed) return status;
  return shm_all_reduce(reinterpret_cast<Group*>(a[0]), a[1], a[2], reinterpret_cast<void*>(a[3]), a[4], a[5]);
}

// `bytes` of each rank to gathered[rank].
int shm_all_gather(Group* group, const char* data, char* gathered, long bytes, long timeout_ns) {
  for (int64_t first = 0; first < bytes; first += group->slot_bytes) {
    int64_t now = std::min(group->slot_bytes, bytes - first);
    if (Status status = group->exchange(data + first, now, timeout_ns)) return status;
    for (int peer = 0; peer < group->size; ++peer) std::memcpy(gathered + peer * bytes + first, group->slot(peer), now);
  }
  return kDone;
}

int shm_broadcast(Group* group, char* data, long bytes, int src, long timeout_ns) {
  for (int64_t first = 0; first < bytes; first += group->slot_bytes) {
    int64_t now = std::min(group->slot_bytes, bytes - first);
    const char* brought = group->rank == src ? data + first : nullptr;
    if (Status status = group->exchange(brought, now, timeout_ns)) return status;
    if (group->rank != src) std::memcpy(data + first, group->slot(src), now);
  }
  return kDone;
}

int shm_barrier(Group* group, long timeout_ns) { return group->exchange(nullptr, 0, timeout_ns); }

// Moves `next` to where a letter of `size` bytes goes, in one piece, once there is room: behind the last, or at the beginning
// where it does not fit before the end. Those under way lie from the oldest to `next`, around the end where that is not above.
static Status find_room(Group* group, Mailbox& box, int64_t size, int dst, long timeout_ns) {
  int64_t& next = group->next[dst];
  for (uint32_t received, sent = box.sent.value.load(); (received = box.received.value.load()) != sent;) {
    const int64_t oldest = box.letters[received % kLetters].offset;
    if (next + size <= (next > oldest ? group->box_bytes : oldest)) return kDone;
    if (next > oldest && size <= oldest) break;
    if (Status status = group->wait(box.received, received + 1, dst, timeout_ns)) return status;
  }
  next = 0;
  return kDone;
}

// Returns when the bytes are in the mailbox, which takes what is sent until it is full.
int shm_send(Group* group, const char* data, long bytes, int dst, long timeout_ns) {
  Mailbox& box = group->box(group->rank, dst);
  do {
    int64_t now = std::min(group->box_bytes, bytes);
    uint32_t sent = box.sent.value.load();
    if (Status status = group->wait(box.received, sent - kLetters + 1, dst, timeout_ns)) return status;
    const int64_t size = std::max<int64_t>(64, (now + 63) / 64 * 64);
    if (Status status = find_room(group, box, size, dst, timeout_ns)) return status;
    int64_t& offset = group->next[dst];
    std::memcpy(group->letters(group->rank, dst) + offset, data, now);
    box.letters[sent % kLetters] = {offset, now};
    offset += size;
    advance(box.sent);
    data += now;
    bytes -= now;
  } while (bytes);
  return kDone;
}

int shm_receive(Group* group, char* data, long bytes, int src, long timeout_ns) {
  Mailbox& box = group->box(src, group->rank);
  do {
    int64_t now = std::min(group->box_bytes, bytes);
    uint32_t received = box.received.value.load();
    if (Status status = group->wait(box.sent, received + 1, src, timeout_ns)) return status;
    const Letter& letter = box.letters[received % kLetters];
    if (letter.bytes != now) return group->fail(kMismatch, src);
    std::memcpy(data, group->letters(src, group->rank) + letter.offset, now);
    advance(box.received);
    data += now;
    bytes -= now;
  } while (bytes);
  return kDone;
}

}
