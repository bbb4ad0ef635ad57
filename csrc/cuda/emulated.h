// A GPU's instructions on a CPU: kernels run as they are written, every thread of a block on a stack of its own, in an
// order that changes from turn to turn. For tests: what it shows of a kernel is its indices, layouts, masks and
// barriers; what it cannot show is how fast it is.
//
// It is unkind where a GPU may be: memory that a copy is on its way to holds NaNs until somebody waits for it, and
// misaligned addresses, deadlocks and warps that part are errors.
#pragma once
#undef _FORTIFY_SOURCE  // its longjmp takes a switch of stacks for an overflow
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "device.h"
#include "numbers.h"

namespace fasthyper {

struct Stream {};

namespace emulated {

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
  void run() const {
    memset(to, 0, bytes);
    memcpy(to, from, valid);
  }
};

struct Thread {
  int index;
  jmp_buf context;
  ucontext_t start;
  bool started = false, done = false;
  const char* waiting = "";
  std::vector<Copy> open;                // copies since the last commit
  std::deque<std::vector<Copy>> groups;  // committed ones, oldest first
};

// Threads that do something together: all arrive, the last one does it for all.
struct Meeting {
  int arrived = 0;
  unsigned times = 0;
  const char* purpose = "";
  std::vector<void*> given;
};

struct Block {
  Grid grid, at;
  int threads, shared_bytes;
  char* shared;
  std::vector<std::unique_ptr<Thread>> all;
  std::vector<Meeting> warps;
  Meeting everyone;
  std::function<void()> kernel;
  jmp_buf scheduler;
  unsigned long steps = 0;  // of any thread: none in a round means that all wait for each other
  std::string error;
};

inline thread_local Block* block = nullptr;
inline thread_local Thread* self = nullptr;

[[noreturn]] inline void fail(const std::string& what) {
  if (block->error.empty())
    block->error = what + " (thread " + std::to_string(self->index) + " of block " + std::to_string(block->at.x) +
                   ", " + std::to_string(block->at.y) + ", " + std::to_string(block->at.z) + ")";
  _longjmp(block->scheduler, 1);
}

inline void expect(bool right, const char* what) {
  if (!right) fail(what);
}

// Let others run until something is so.
template <class Condition>
void until(Condition is_so, const char* what) {
  while (!is_so()) {
    self->waiting = what;
    if (!_setjmp(self->context)) _longjmp(block->scheduler, 1);
  }
  ++block->steps;
}

template <class Argument, class Action>
void together(Meeting& meeting, int size, int lane, const char* purpose, Argument* given, Action act) {
  if (meeting.arrived == 0) {
    meeting.purpose = purpose;
    meeting.given.assign(size, nullptr);
  }
  expect(meeting.purpose == purpose || !strcmp(meeting.purpose, purpose), "threads of a warp have parted");
  meeting.given[lane] = given;
  const unsigned before = meeting.times;
  ++block->steps;
  if (++meeting.arrived == size) {
    act(reinterpret_cast<Argument**>(meeting.given.data()));
    meeting.arrived = 0;
    ++meeting.times;
  } else {
    until([&] { return meeting.times != before; }, purpose);
  }
}

template <class Argument, class Action>
void in_warp(const char* purpose, Argument* given, Action act) {
  together(block->warps[self->index / 32], 32, self->index % 32, purpose, given, act);
}

inline void enter() {
  block->kernel();
  self->done = true;
  ++block->steps;
  _longjmp(block->scheduler, 1);
}

// Run what can run, turn by turn, each turn in another order, until all threads are done.
inline void run_block() {
  static thread_local volatile unsigned random = 1;
  const int n = block->threads;
  for (volatile int left = n; left > 0;) {
    const volatile unsigned long before = block->steps;
    random = random * 1664525u + 1013904223u;
    const volatile unsigned first = (random >> 8) % n, backwards = random >> 31;
    for (volatile int turn = 0; turn < n;) {
      const unsigned k = backwards ? n - 1 - turn : turn;
      self = block->all[(first + k) % n].get();
      turn = turn + 1;
      if (self->done) continue;
      if (!_setjmp(block->scheduler)) {
        if (self->started) _longjmp(self->context, 1);
        self->started = true;
        setcontext(&self->start);
      }
      if (!block->error.empty()) return;
      if (self->done) left = left - 1;
    }
    if (left > 0 && block->steps == before) {
      block->error = std::string("deadlock: a thread waits for ") + self->waiting;
      return;
    }
  }
}

inline char* stacks(int threads, size_t size) {
  static thread_local std::vector<char> memory;
  if (memory.size() < threads * size) memory.resize(threads * size);
  return memory.data();
}

inline void run(Grid grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
  constexpr size_t stack = 64 << 10;
  if (shared_bytes > 227 << 10) throw std::runtime_error("emulated kernel: more shared memory than any part has");
  char* const memory = stacks(threads, stack);
  std::vector<char> shared(shared_bytes + 1024);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        Block one{grid, {x, y, z}, threads, shared_bytes};
        memset(shared.data(), 0xff, shared.size());  // NaNs: nothing is there before it is written
        one.shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared.data()) + 1023) & ~uintptr_t(1023));
        one.kernel = kernel;
        one.warps.resize(threads / 32);
        for (int t = 0; t < threads; ++t) {
          auto& thread = *one.all.emplace_back(std::make_unique<Thread>());
          thread.index = t;
          getcontext(&thread.start);
          thread.start.uc_stack.ss_sp = memory + t * stack;
          thread.start.uc_stack.ss_size = stack;
          thread.start.uc_link = nullptr;
          makecontext(&thread.start, enter, 0);
        }
        block = &one;
        run_block();
        block = nullptr;
        if (!one.error.empty()) throw std::runtime_error("emulated kernel: " + one.error);
      }
}

}  // namespace emulated

inline int thread() { return emulated::self->index; }
inline int block_x() { return emulated::block->at.x; }
inline int block_y() { return emulated::block->at.y; }
inline int block_z() { return emulated::block->at.z; }
inline int blocks_x() { return emulated::block->grid.x; }
inline int anew(int v) { return v; }
inline char* shared_memory() { return emulated::block->shared; }

inline uint32_t shared_address(const void* p) {
  const auto at = static_cast<const char*>(p) - emulated::block->shared;
  emulated::expect(at >= 0 && at < emulated::block->shared_bytes, "an address outside of shared memory");
  return static_cast<uint32_t>(at);
}

inline void sync() {
  emulated::together(
      emulated::block->everyone, emulated::block->threads, thread(), "the block's barrier", emulated::self,
      [](emulated::Thread**) {});
}

inline float shuffle_xor(float v, int mask) {
  struct Lane {
    float in, out;
    int mask;
  } lane{v, 0, mask};
  emulated::in_warp("a shuffle", &lane, [](Lane** lanes) {
    for (int l = 0; l < 32; ++l) lanes[l]->out = lanes[l ^ lanes[l]->mask]->in;
  });
  return lane.out;
}

inline uint32_t to_tf32(float v) {
  const uint32_t word = bits(v);
  return std::isfinite(v) ? (word + 0x1000u) & 0xffffe000u : word;
}

inline uint32_t times(uint32_t a, uint32_t b, bfloat16) {
  const auto product = [&](int high) { return bfloat16(half_of(a, high, bfloat16{}) * half_of(b, high, bfloat16{})); };
  return pair(product(0), product(1));
}
inline uint32_t times(uint32_t a, uint32_t b, float) { return bits(number(a) * number(b)); }

template <int BYTES>
void copy_async(void* to, const void* from, int valid) {
  emulated::expect(shared_address(to) % BYTES == 0, "a copy to a misaligned address");
  emulated::expect(valid == 0 || reinterpret_cast<uintptr_t>(from) % BYTES == 0, "a copy from a misaligned address");
  memset(to, 0xff, BYTES);
  emulated::self->open.push_back({to, from, BYTES, valid});
}
inline void copy_commit() {
  emulated::self->groups.push_back(std::move(emulated::self->open));
  emulated::self->open.clear();
}
template <int IN_FLIGHT>
void copy_wait() {
  auto& groups = emulated::self->groups;
  for (; groups.size() > IN_FLIGHT; groups.pop_front())
    for (const auto& copy : groups.front()) copy.run();
}

namespace emulated {

struct Matrices {
  uint32_t* r;
  const char* row;
};

inline const char* checked_row(const void* row) {
  expect(shared_address(row) % 16 == 0, "a row of a matrix at a misaligned address");
  return static_cast<const char*>(row);
}

// One m16n8 product of K numbers, from the words of 32 lanes.
struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// Matrix units round sums towards zero.
inline float cut_off(double sum) {
  const float nearest = static_cast<float>(sum);
  return std::isfinite(nearest) && std::fabs(nearest) > std::fabs(sum) ? std::nextafterf(nearest, 0.f) : nearest;
}

template <int K, class Number>
void multiply(Product** lanes, Number number) {
  constexpr int per = K / 8;  // numbers in a word
  float a[16][K], b[K][8];
  for (int l = 0; l < 32; ++l)
    for (int e = 0; e < per; ++e) {
      const int row = l / 4, k = l % 4 * per + e;
      for (int q = 0; q < 4; ++q) a[row + 8 * (q & 1)][k + K / 2 * (q >> 1)] = number(lanes[l]->a[q], e);
      for (int q = 0; q < 2; ++q) b[k + K / 2 * q][row] = number(lanes[l]->b[q], e);
    }
  for (int l = 0; l < 32; ++l)
    for (int q = 0; q < 4; ++q) {
      const int row = l / 4 + 8 * (q >> 1), column = l % 4 * 2 + (q & 1);
      double sum = lanes[l]->d[q];
      for (int k = 0; k < K; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      lanes[l]->d[q] = cut_off(sum);
    }
}

}  // namespace emulated

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  emulated::Matrices lane{r, emulated::checked_row(row)};
  emulated::in_warp("load_matrices", &lane, [](emulated::Matrices** lanes) {
    for (int l = 0; l < 32; ++l)
      for (int q = 0; q < 4; ++q) memcpy(&lanes[l]->r[q], lanes[8 * q + l / 4]->row + l % 4 * 4, 4);
  });
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulated::Matrices lane{r, emulated::checked_row(row)};
  emulated::in_warp("load_matrices_transposed", &lane, [](emulated::Matrices** lanes) {
    for (int l = 0; l < 32; ++l)
      for (int q = 0; q < 4; ++q) {
        uint16_t half[2];
        for (int e = 0; e < 2; ++e) memcpy(&half[e], lanes[8 * q + l % 4 * 2 + e]->row + l / 4 * 2, 2);
        lanes[l]->r[q] = half[0] | static_cast<uint32_t>(half[1]) << 16;
      }
  });
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  emulated::Product lane{d, a, {b0, b1}};
  emulated::in_warp("mma", &lane, [](emulated::Product** lanes) {
    emulated::multiply<per_step<T>>(lanes, [](uint32_t word, int high) {
      if constexpr (sizeof(T) == 4) return number(word & 0xffffe000u);  // TF32
      else return half_of(word, high, T{});
    });
  });
}

template <class... Parameters, class... Arguments>
void launch(
    void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes, Stream, const Arguments&... given) {
  const std::tuple<Parameters...> arguments{given...};
  emulated::run(grid, threads, shared_bytes, [&] { std::apply(kernel, arguments); });
}

}  // namespace fasthyper
