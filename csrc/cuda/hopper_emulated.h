// Instructions of sm_90a, emulated on a CPU for tests: those of hopper_memory_emulated.h, and wgmma. It reads shared
// memory as late as possible, when it is waited for, and its accumulators are NaNs until then. Errors are: a descriptor
// that does not fit the layout, and accumulators that change while a wgmma is in flight.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "device.h"
#include "emulated.h"
#include "hopper_layouts.h"
#include "hopper_memory_emulated.h"
#include "numbers.h"

namespace fasthyper {

namespace emulated {

struct Wgmma {
  bool a_in_registers, add, a_transposed, b_transposed;
  int columns;
  uint64_t a_descriptor, b;
  float (*decode)(uint16_t);
  uint32_t a[WARPGROUP][4];
  float* d[WARPGROUP];
};

struct Warpgroup {
  Rendezvous rendezvous;
  std::vector<std::shared_ptr<Wgmma>> uncommitted;
  std::deque<std::vector<std::shared_ptr<Wgmma>>> groups;
  bool fenced = false;
  // By thread and register: the accumulators' values, while the registers hold NaNs.
  std::map<std::pair<int, float*>, std::vector<float>> accumulators;
};

struct TensorCores : Extension {
  std::vector<Warpgroup> warpgroups;
  const char* unfinished() const override {
    for (const auto& group : warpgroups)
      if (!group.uncommitted.empty() || !group.groups.empty()) return "wgmma of a CTA was never waited for";
    return nullptr;
  }
};

inline Warpgroup& warpgroup() {
  if (!cta->tensor_cores) {
    auto state = std::make_unique<TensorCores>();
    state->warpgroups.resize(cta->threads / WARPGROUP);
    cta->tensor_cores = std::move(state);
  }
  return static_cast<TensorCores&>(*cta->tensor_cores).warpgroups[self->index / WARPGROUP];
}

}  // namespace emulated

template <int REGISTERS>
void setmaxnreg_inc() {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256);
  emulated::in_warp("setmaxnreg", emulated::self, [](emulated::Thread**) {});
}
template <int REGISTERS>
void setmaxnreg_dec() {
  setmaxnreg_inc<REGISTERS>();
}

namespace emulated {

template <class Argument, class Action>
void in_warpgroup(const char* purpose, Argument* given, Action act) {
  auto& group = warpgroup();
  meet(group.rendezvous, WARPGROUP, self->index % WARPGROUP, purpose, given, [&](Argument** all) { act(group, all); });
}

// Read element (mn, k) of an operand by its descriptor.
inline uint16_t operand(uint64_t descriptor, bool transposed, int mn, int k) {
  const auto bytes = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = bytes(0), leading = bytes(16), stride = bytes(32);
  const uint32_t row = transposed ? k % 8 : mn % 8;
  const uint32_t linear = transposed ? start + mn / 64 * leading + k / 8 * stride + row * 128 + mn % 64 * 2
                                     : start + mn / 8 * stride + row * 128 + k * 2;
  const uint32_t address = linear ^ (linear & 0x380) >> 3;
  expect(address + 2 <= static_cast<uint32_t>(cta->smem_bytes), "an operand beyond shared memory");
  uint16_t element;
  memcpy(&element, cta->smem + address, 2);
  return element;
}

inline void check_descriptor(uint64_t descriptor, bool transposed) {
  expect(descriptor >> 62 == 1, "a descriptor of another swizzle than 128 bytes");
  expect((descriptor & 0x3fffc000c000c000ull) == 0, "a descriptor with reserved bits set");
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  expect((start & 0x380) == 0, "a descriptor that begins within a swizzle atom");
  expect((start & 0x7f) % (transposed ? 128 : 32) == 0, "a descriptor that begins within a k-step");
}

inline void run(Warpgroup& group, const Wgmma& wgmma) {
  const int columns = wgmma.columns;
  std::vector<float> a(64 * 16), b(16 * columns), sum(64 * columns);
  for (int t = 0; t < WARPGROUP && wgmma.a_in_registers; ++t)
    for (int q = 0; q < 4; ++q)
      for (int e = 0; e < 2; ++e)
        a[(t / 32 * 16 + t % 32 / 4 + q % 2 * 8) * 16 + t % 4 * 2 + e + q / 2 * 8] =
            wgmma.decode(static_cast<uint16_t>(wgmma.a[t][q] >> 16 * e));
  for (int m = 0; m < 64 && !wgmma.a_in_registers; ++m)
    for (int k = 0; k < 16; ++k) a[m * 16 + k] = wgmma.decode(operand(wgmma.a_descriptor, wgmma.a_transposed, m, k));
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < columns; ++n) b[k * columns + n] = wgmma.decode(operand(wgmma.b, wgmma.b_transposed, n, k));
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < columns; ++n) sum[m * columns + n] += a[m * 16 + k] * b[k * columns + n];
  for (int t = 0; t < WARPGROUP; ++t) {
    auto& d = group.accumulators.at({t, wgmma.d[t]});
    for (int r = 0; r < columns / 2; ++r) {
      const int m = t / 32 * 16 + t % 32 / 4 + r % 4 / 2 * 8, n = r / 4 * 8 + t % 4 * 2 + r % 2;
      d[r] = (wgmma.add ? d[r] : 0.f) + sum[m * columns + n];
    }
  }
}

inline bool in_use(const Warpgroup& group, int t, const float* d) {
  for (const auto& committed : group.groups)
    for (const auto& wgmma : committed)
      if (wgmma->d[t] == d) return true;
  for (const auto& wgmma : group.uncommitted)
    if (wgmma->d[t] == d) return true;
  return false;
}

struct Issue {
  float* d;
  const uint32_t* a;
  uint64_t a_descriptor, b;
};

template <class T>
float decode(uint16_t bits) {
  return unpack(bits, 0, T{});
}

inline void issue(Issue* lane, Wgmma wgmma) {
  in_warpgroup("wgmma", lane, [&](Warpgroup& group, Issue** all) {
    expect(group.fenced, "wgmma without wgmma.fence");
    wgmma.a_descriptor = all[0]->a_descriptor, wgmma.b = all[0]->b;
    check_descriptor(wgmma.b, wgmma.b_transposed);
    if (!wgmma.a_in_registers) check_descriptor(wgmma.a_descriptor, wgmma.a_transposed);
    for (int t = 0; t < WARPGROUP; ++t) {
      expect(
          all[t]->b == wgmma.b && all[t]->a_descriptor == wgmma.a_descriptor,
          "descriptors that differ within a warpgroup");
      wgmma.d[t] = all[t]->d;
      if (wgmma.a_in_registers) memcpy(wgmma.a[t], all[t]->a, sizeof wgmma.a[t]);
      auto& accumulators = group.accumulators[{t, all[t]->d}];
      if (accumulators.empty()) {
        accumulators.assign(all[t]->d, all[t]->d + wgmma.columns / 2);
        std::fill_n(all[t]->d, wgmma.columns / 2, NAN);
      }
    }
    group.uncommitted.push_back(std::make_shared<Wgmma>(wgmma));
  });
}

}  // namespace emulated

inline void wgmma_fence() {
  emulated::in_warpgroup(
      "wgmma.fence", emulated::self, [](emulated::Warpgroup& group, emulated::Thread**) { group.fenced = true; });
}
inline void wgmma_commit_group() {
  emulated::in_warpgroup("wgmma.commit_group", emulated::self, [](emulated::Warpgroup& group, emulated::Thread**) {
    group.groups.push_back(std::move(group.uncommitted));
    group.uncommitted.clear();
    group.fenced = false;
  });
}
template <int IN_FLIGHT>
void wgmma_wait_group() {
  emulated::in_warpgroup("wgmma.wait_group", emulated::self, [](emulated::Warpgroup& group, emulated::Thread**) {
    while (group.groups.size() > IN_FLIGHT) {
      for (const auto& wgmma : group.groups.front()) emulated::run(group, *wgmma);
      group.groups.pop_front();
    }
    for (auto at = group.accumulators.begin(); at != group.accumulators.end();) {
      float* const d = at->first.second;
      if (emulated::in_use(group, at->first.first, d)) {
        ++at;
        continue;
      }
      for (size_t r = 0; r < at->second.size(); ++r) {
        emulated::expect(d[r] != d[r], "accumulators changed while a wgmma was in flight");
        d[r] = at->second[r];
      }
      at = group.accumulators.erase(at);
    }
  });
}
template <int COUNT>
void fence_accumulator(float (&)[COUNT]) {}

template <bool B_TRANSPOSED, int COUNT, class T>
void wgmma(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, T) {
  static_assert(COUNT == 24 || COUNT == 32 || COUNT == 48 || COUNT == 64);
  emulated::Issue lane{d, a, 0, b};
  emulated::issue(&lane, {true, true, false, B_TRANSPOSED, 2 * COUNT, 0, 0, &emulated::decode<T>, {}, {}});
}
template <bool ADD, bool A_TRANSPOSED, bool B_TRANSPOSED, int COUNT, class T>
void wgmma(float (&d)[COUNT], uint64_t a, uint64_t b, T) {
  static_assert(COUNT == 24 || COUNT == 32 || COUNT == 48 || COUNT == 64);
  emulated::Issue lane{d, nullptr, a, b};
  emulated::issue(&lane, {false, ADD, A_TRANSPOSED, B_TRANSPOSED, 2 * COUNT, 0, 0, &emulated::decode<T>, {}, {}});
}

}  // namespace fasthyper
