// Instructions of sm_80 and newer, emulated on a CPU for tests. A kernel runs unchanged: each thread of a CTA has a
// stack of its own, and the order of the threads changes from turn to turn. The CTAs of a cluster run together, and one
// may be far ahead. The emulator checks indices, layouts, masks and barriers; it cannot measure speed.
//
// It delays all effects as long as a GPU may: the destination of an asynchronous copy holds NaNs until the copy is
// waited for. Misaligned addresses, deadlocks and diverged warps are errors.
#pragma once
#undef _FORTIFY_SOURCE  // its longjmp mistakes a switch of stacks for an overflow
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
    if (valid) memcpy(to, from, valid);
  }
};

struct Thread {
  int index;
  jmp_buf context;
  ucontext_t start;
  bool started = false, done = false;
  const char* waiting = "";
  std::vector<Copy> uncommitted;         // since the last commit
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

// A collective operation of several threads: all arrive, and the last one performs it for all.
struct Rendezvous {
  int arrived = 0;
  unsigned rounds = 0;
  const char* purpose = "";
  std::vector<void*> given;
};

// State of the instructions of newer GPUs.
struct Extension {
  virtual ~Extension() = default;
  // Return a message about operations that were not waited for, or null.
  virtual const char* unfinished() const = 0;
};

struct Cluster;

struct Cta {
  Grid grid, index;
  int threads, smem_bytes;
  char* smem;
  Cluster* cluster;
  int rank;  // in the cluster
  std::unique_ptr<Extension> memory, tensor_cores;
  std::vector<std::unique_ptr<Thread>> thread_states;
  std::vector<Rendezvous> warps;
  Rendezvous everyone;
  std::function<void()> kernel;
  jmp_buf scheduler;
  unsigned long progress = 0;  // steps of all threads; a round without one is a deadlock
  std::string error;

  bool done() const {
    return std::all_of(thread_states.begin(), thread_states.end(), [](const auto& thread) { return thread->done; });
  }
};

struct Cluster {
  std::vector<Cta> ctas;
  Rendezvous everyone;
  unsigned long progress() const {
    unsigned long sum = 0;
    for (const auto& each : ctas) sum += each.progress;
    return sum;
  }
};

inline thread_local Cta* cta = nullptr;
inline thread_local Thread* self = nullptr;

[[noreturn]] inline void fail(const std::string& what) {
  if (cta->error.empty())
    cta->error = what + " (thread " + std::to_string(self->index) + " of CTA " + std::to_string(cta->index.x) + ", " +
                 std::to_string(cta->index.y) + ", " + std::to_string(cta->index.z) + ")";
  _longjmp(cta->scheduler, 1);
}

inline void expect(bool right, const char* what) {
  if (!right) fail(what);
}

// Run other threads until the condition holds.
template <class Condition>
void wait_until(Condition condition, const char* what) {
  while (!condition()) {
    self->waiting = what;
    if (!_setjmp(self->context)) _longjmp(cta->scheduler, 1);
  }
  ++cta->progress;
}

template <class Argument, class Action>
void meet(Rendezvous& rendezvous, int size, int lane, const char* purpose, Argument* given, Action act) {
  if (rendezvous.arrived == 0) {
    rendezvous.purpose = purpose;
    rendezvous.given.assign(size, nullptr);
  }
  expect(rendezvous.purpose == purpose || !strcmp(rendezvous.purpose, purpose), "threads of a warp have diverged");
  rendezvous.given[lane] = given;
  const unsigned before = rendezvous.rounds;
  ++cta->progress;
  if (++rendezvous.arrived == size) {
    act(reinterpret_cast<Argument**>(rendezvous.given.data()));
    rendezvous.arrived = 0;
    ++rendezvous.rounds;
  } else {
    wait_until([&] { return rendezvous.rounds != before; }, purpose);
  }
}

template <class Argument, class Action>
void in_warp(const char* purpose, Argument* given, Action act) {
  meet(cta->warps[self->index / 32], 32, self->index % 32, purpose, given, act);
}

inline void enter() {
  cta->kernel();
  self->done = true;
  ++cta->progress;
  _longjmp(cta->scheduler, 1);
}

// Run the threads in turn, each round in another order, until all are done. For eight rounds at a time, only one CTA of
// a cluster may run. Return the error of a CTA, or an empty string.
inline std::string run_cluster(Cluster& cluster) {
  static thread_local volatile unsigned random = 1;
  const int ctas = static_cast<int>(cluster.ctas.size()), per_cta = cluster.ctas[0].threads, n = ctas * per_cta;
  volatile int only = ctas;  // the CTA that runs; all if it is no rank
  volatile unsigned round = 0;
  for (volatile int left = n; left > 0;) {
    const volatile unsigned long before = cluster.progress();
    random = random * 1664525u + 1013904223u;
    const volatile unsigned first = (random >> 8) % n, backwards = random >> 31;
    if (round % 8 == 0) only = (random >> 16) % (ctas + 1);
    round = round + 1;
    for (volatile int turn = 0; turn < n;) {
      const unsigned k = (first + (backwards ? n - 1 - turn : turn)) % n;
      turn = turn + 1;
      cta = &cluster.ctas[k / per_cta];
      self = cta->thread_states[k % per_cta].get();
      if (self->done || (ctas > 1 && only < ctas && only != cta->rank)) continue;
      if (!_setjmp(cta->scheduler)) {
        if (self->started) _longjmp(self->context, 1);
        self->started = true;
        setcontext(&self->start);
      }
      if (!cta->error.empty()) return cta->error;
      if (self->done) left = left - 1;
    }
    const bool all_ran = ctas == 1 || only == ctas;
    if (left > 0 && all_ran && cluster.progress() == before) {
      for (const auto& each : cluster.ctas)
        for (const auto& thread : each.thread_states)
          if (!thread->done) return std::string("deadlock: a thread waits for ") + thread->waiting;
    }
  }
  for (const auto& each : cluster.ctas)
    for (const auto* state : {each.memory.get(), each.tensor_cores.get()})
      if (const char* what = state ? state->unfinished() : nullptr) return what;
  return {};
}

inline char* stacks(int threads, size_t size) {
  static thread_local std::vector<char> memory;
  if (memory.size() < threads * size) memory.resize(threads * size);
  return memory.data();
}

inline void run(Grid grid, int cluster_size, int threads, int smem_bytes, const std::function<void()>& kernel) {
  constexpr size_t stack = 64 << 10;
  if (smem_bytes > MOST_SHARED_MEMORY) throw std::runtime_error("emulated kernel: more shared memory than any GPU has");
  if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error("emulated kernel: a grid larger than any GPU takes");
  if (grid.x % cluster_size) throw std::runtime_error("emulated kernel: a grid of no whole number of clusters");
  const size_t smem_size = (smem_bytes + 1023) / 1024 * 1024;
  char* const stack_memory = stacks(cluster_size * threads, stack);
  std::vector<char> smem(cluster_size * smem_size + 1024);
  char* const smem_memory =
      reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(smem.data()) + 1023) & ~uintptr_t(1023));
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += cluster_size) {
        memset(smem.data(), 0xff, smem.size());  // NaNs: shared memory is not initialised
        Cluster cluster;
        cluster.ctas.resize(cluster_size);
        for (int rank = 0; rank < cluster_size; ++rank) {
          Cta& current = cluster.ctas[rank];
          current.grid = grid, current.index = {x + rank, y, z};
          current.threads = threads, current.smem_bytes = smem_bytes;
          current.smem = smem_memory + rank * smem_size;
          current.cluster = &cluster, current.rank = rank;
          current.kernel = kernel;
          current.warps.resize(threads / 32);
          for (int t = 0; t < threads; ++t) {
            auto& thread = *current.thread_states.emplace_back(std::make_unique<Thread>());
            thread.index = t;
            getcontext(&thread.start);
            thread.start.uc_stack.ss_sp = stack_memory + (rank * threads + t) * stack;
            thread.start.uc_stack.ss_size = stack;
            thread.start.uc_link = nullptr;
            makecontext(&thread.start, enter, 0);
          }
        }
        const std::string error = run_cluster(cluster);
        cta = nullptr;
        if (!error.empty()) throw std::runtime_error("emulated kernel: " + error);
      }
}

}  // namespace emulated

inline int thread() { return emulated::self->index; }
inline int cta_x() { return emulated::cta->index.x; }
inline int cta_y() { return emulated::cta->index.y; }
inline int cta_z() { return emulated::cta->index.z; }
inline int grid_x() { return emulated::cta->grid.x; }
inline int opaque(int v) { return v; }
inline char* smem_base() { return emulated::cta->smem; }

inline uint32_t smem_address(const void* p) {
  const auto address = static_cast<const char*>(p) - emulated::cta->smem;
  emulated::expect(address >= 0 && address < emulated::cta->smem_bytes, "an address outside of shared memory");
  return static_cast<uint32_t>(address);
}

inline void sync_threads() {
  emulated::meet(
      emulated::cta->everyone, emulated::cta->threads, thread(), "the CTA's barrier", emulated::self,
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
  const uint32_t word = as_uint(v);
  return std::isfinite(v) ? (word + 0x1000u) & 0xffffe000u : word;
}

inline uint32_t mul(uint32_t a, uint32_t b, bfloat16) {
  const auto product = [&](int high) { return bfloat16(unpack(a, high, bfloat16{}) * unpack(b, high, bfloat16{})); };
  return pack(product(0), product(1));
}
inline uint32_t mul(uint32_t a, uint32_t b, float) { return as_uint(as_float(a) * as_float(b)); }

template <int BYTES>
void cp_async(void* to, const void* from, int valid) {
  emulated::expect(smem_address(to) % BYTES == 0, "a copy to a misaligned address");
  emulated::expect(valid == 0 || reinterpret_cast<uintptr_t>(from) % BYTES == 0, "a copy from a misaligned address");
  memset(to, 0xff, BYTES);
  emulated::self->uncommitted.push_back({to, from, BYTES, valid});
}
inline void cp_async_commit_group() {
  emulated::self->groups.push_back(std::move(emulated::self->uncommitted));
  emulated::self->uncommitted.clear();
}
template <int IN_FLIGHT>
void cp_async_wait_group() {
  auto& groups = emulated::self->groups;
  for (; groups.size() > IN_FLIGHT; groups.pop_front())
    for (const auto& copy : groups.front()) copy.run();
}

namespace emulated {

struct LdmatrixLane {
  uint32_t* r;
  const char* row;
};

inline const char* checked_row(const void* row) {
  expect(smem_address(row) % 16 == 0, "a row of a matrix at a misaligned address");
  return static_cast<const char*>(row);
}

// The operands of one lane in an m16n8 mma.
struct MmaLane {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// Tensor cores round sums towards zero.
inline float truncate(double sum) {
  const float nearest = static_cast<float>(sum);
  return std::isfinite(nearest) && std::fabs(nearest) > std::fabs(sum) ? std::nextafterf(nearest, 0.f) : nearest;
}

template <int K, class Decode>
void multiply(MmaLane** lanes, Decode decode) {
  constexpr int per_register = K / 8;  // elements per register
  float a[16][K], b[K][8];
  for (int l = 0; l < 32; ++l)
    for (int e = 0; e < per_register; ++e) {
      const int row = l / 4, k = l % 4 * per_register + e;
      for (int q = 0; q < 4; ++q) a[row + 8 * (q & 1)][k + K / 2 * (q >> 1)] = decode(lanes[l]->a[q], e);
      for (int q = 0; q < 2; ++q) b[k + K / 2 * q][row] = decode(lanes[l]->b[q], e);
    }
  for (int l = 0; l < 32; ++l)
    for (int q = 0; q < 4; ++q) {
      const int row = l / 4 + 8 * (q >> 1), column = l % 4 * 2 + (q & 1);
      double sum = lanes[l]->d[q];
      for (int k = 0; k < K; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      lanes[l]->d[q] = truncate(sum);
    }
}

}  // namespace emulated

inline void ldmatrix(uint32_t (&r)[4], const void* row) {
  emulated::LdmatrixLane lane{r, emulated::checked_row(row)};
  emulated::in_warp("load_matrices", &lane, [](emulated::LdmatrixLane** lanes) {
    for (int l = 0; l < 32; ++l)
      for (int q = 0; q < 4; ++q) memcpy(&lanes[l]->r[q], lanes[8 * q + l / 4]->row + l % 4 * 4, 4);
  });
}

inline void ldmatrix_trans(uint32_t (&r)[4], const void* row) {
  emulated::LdmatrixLane lane{r, emulated::checked_row(row)};
  emulated::in_warp("load_matrices_transposed", &lane, [](emulated::LdmatrixLane** lanes) {
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
  emulated::MmaLane lane{d, a, {b0, b1}};
  emulated::in_warp("mma", &lane, [](emulated::MmaLane** lanes) {
    emulated::multiply<per_step<T>>(lanes, [](uint32_t word, int high) {
      if constexpr (sizeof(T) == 4) return as_float(word & 0xffffe000u);  // TF32
      else return unpack(word, high, T{});
    });
  });
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, int threads, int smem_bytes, Stream, const Arguments&... given) {
  const std::tuple<Parameters...> arguments{given...};
  emulated::run(grid, 1, threads, smem_bytes, [&] { std::apply(kernel, arguments); });
}

}  // namespace fasthyper
