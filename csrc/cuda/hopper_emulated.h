// Instructions of sm_90a, emulated on a CPU for tests, in addition to those of emulated.h. Effects are as late as a GPU
// allows: the destination of a TMA load holds NaNs until its mbarrier's phase completes, at a random time; wgmma reads
// shared memory as late as possible, when it is waited for, and its accumulators are NaNs until then. Errors are: an
// mbarrier without initialisation, bytes that no mbarrier expects, a descriptor that does not fit the layout, and
// accumulators that change while a wgmma is in flight.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "emulated.h"
#include "hopper_layouts.h"
#include "numbers.h"

#define HOPPER_ONLY(...) __VA_ARGS__

namespace fasthyper {

struct TensorMap {
  TmaTensor tensor;
};

inline TensorMap tensor_map(const TmaTensor& tensor) {
  if (tensor.data)
    if (const char* why = tensor.unsupported()) throw std::runtime_error(why);
  return {tensor};
}

namespace emulated {

// The 64 bits of an mbarrier. Uninitialised shared memory does not have the mark.
struct MbarrierState {
  static constexpr uint8_t MARK = 0x5b;
  uint8_t mark, phase, arrivals, pending;
  int32_t bytes;  // expected, not yet arrived
};
static_assert(sizeof(MbarrierState) == sizeof(Mbarrier));

struct TmaLoad {
  Mbarrier* mbarrier;
  char* to;
  TmaTensor tensor;
  int64_t at[3];
};

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

// State of a CTA, in addition to that in emulated.h. An extra entry in thread_states marks a CTA that has this state.
struct HopperState {
  std::list<TmaLoad> loads;
  std::vector<Warpgroup> warpgroups;
  bool inits_unfenced = false;  // mbarriers were initialised, and no fence followed
  unsigned random = 1;
};

inline HopperState& hopper_state() {
  static thread_local HopperState state;
  return state;
}

// Return a message about operations that were not waited for, or null.
inline const char* unfinished() {
  if (!hopper_state().loads.empty()) return "TMA loads of a CTA were in flight when it ended";
  for (const auto& group : hopper_state().warpgroups)
    if (!group.uncommitted.empty() || !group.groups.empty()) return "wgmma of a CTA was never waited for";
  return nullptr;
}

inline HopperState& hopper() {
  auto& state = hopper_state();
  if (static_cast<int>(cta->thread_states.size()) == cta->threads) {
    if (const char* left = unfinished()) fail(left);
    const unsigned random = state.random;
    state = {};
    state.random = random;
    state.warpgroups.resize(cta->threads / WARPGROUP);
    cta->thread_states.push_back(std::make_unique<Thread>());
  }
  return state;
}

inline MbarrierState& state_of(Mbarrier* mbarrier) {
  expect(smem_address(mbarrier) % 8 == 0, "an mbarrier at a misaligned address");
  auto& state = *reinterpret_cast<MbarrierState*>(mbarrier);
  expect(state.mark == MbarrierState::MARK, "an mbarrier that was never initialised");
  return state;
}

inline void complete(const TmaLoad& load) {
  const TmaTensor& tensor = load.tensor;
  uint32_t offset = smem_address(load.to);
  for (int l = 0; l < tensor.box[2]; ++l)
    for (int k = 0; k < tensor.box[1]; ++k)
      for (int j = 0; j < tensor.box[0]; ++j, offset += 2) {
        const int64_t at[3] = {load.at[0] + j, load.at[1] + k, load.at[2] + l};
        bool inside = true;
        for (int axis = 0; axis < 3; ++axis) inside &= at[axis] >= 0 && at[axis] < tensor.dims[axis];
        uint16_t element = 0;
        if (inside)
          memcpy(
              &element,
              static_cast<const char*>(tensor.data) +
                  (at[0] + at[1] * tensor.strides[0] + at[2] * tensor.strides[1]) * 2,
              2);
        memcpy(cta->smem + (offset ^ (offset >> 7 & 7) << 4), &element, 2);
      }
}

// Complete an mbarrier's phase if all arrivals and bytes have come; with loads, only if `now` is true. Return true if
// only `now` is missing.
inline bool advance(Mbarrier* mbarrier, bool now) {
  auto& state = state_of(mbarrier);
  if (state.pending > 0) return false;
  auto& loads = hopper().loads;
  int bytes = 0;
  for (const auto& load : loads)
    if (load.mbarrier == mbarrier) bytes += load.tensor.box_bytes();
  expect(bytes <= state.bytes, "more bytes arrive than an mbarrier expects");
  if (bytes < state.bytes) return false;
  if (bytes > 0 && !now) return true;
  for (auto load = loads.begin(); load != loads.end();) {
    if (load->mbarrier == mbarrier) {
      complete(*load);
      load = loads.erase(load);
    } else {
      ++load;
    }
  }
  state.bytes = 0;
  state.pending = state.arrivals;
  state.phase ^= 1;
  return false;
}

}  // namespace emulated

inline uint32_t mul(uint32_t a, uint32_t b, float16) {
  uint32_t word = 0;
  for (int h = 0; h < 2; ++h)
    word |= static_cast<uint32_t>(static_cast<float16>(unpack(a, h, float16{}) * unpack(b, h, float16{})).x) << 16 * h;
  return word;
}

inline uint32_t shuffle(uint32_t v, int from) {
  struct Lane {
    uint32_t in, out;
    int from;
  } lane{v, 0, from};
  emulated::in_warp("a shuffle", &lane, [](Lane** lanes) {
    for (int l = 0; l < 32; ++l) lanes[l]->out = lanes[lanes[l]->from & 31]->in;
  });
  return lane.out;
}

inline void mbarrier_init(Mbarrier* mbarrier, int arrivals) {
  emulated::expect(smem_address(mbarrier) % 8 == 0, "an mbarrier at a misaligned address");
  emulated::expect(arrivals > 0 && arrivals < 256, "an mbarrier with no or too many arrivals");
  emulated::hopper().inits_unfenced = true;
  const auto count = static_cast<uint8_t>(arrivals);
  const emulated::MbarrierState state{emulated::MbarrierState::MARK, 0, count, count, 0};
  memcpy(mbarrier, &state, sizeof state);
}
inline void fence_mbarrier_init() { emulated::hopper().inits_unfenced = false; }

inline void mbarrier_arrive_expect_tx(Mbarrier* mbarrier, int bytes) {
  auto& state = emulated::state_of(mbarrier);
  emulated::expect(state.pending > 0, "more arrivals than an mbarrier expects");
  state.bytes += bytes;
  --state.pending;
  ++emulated::cta->progress;
  emulated::advance(mbarrier, false);
}
inline void mbarrier_arrive(Mbarrier* mbarrier) { mbarrier_arrive_expect_tx(mbarrier, 0); }

inline void mbarrier_wait(Mbarrier* mbarrier, int parity) {
  emulated::expect(parity == 0 || parity == 1, "a parity that is neither 0 nor 1");
  emulated::wait_until(
      [&] {
        auto& random = emulated::hopper().random;
        random = random * 1664525u + 1013904223u;
        const bool late = random >> 30 == 0;
        if (emulated::advance(mbarrier, !late)) ++emulated::cta->progress;  // a delayed phase is not a deadlock
        return emulated::state_of(mbarrier).phase != parity;
      },
      "an mbarrier's phase");
}

inline void sync_warp() {
  emulated::in_warp("a warp's barrier", emulated::self, [](emulated::Thread**) {});
}

inline void prefetch_tensormap(const TensorMap&) {}

inline void tma_load(void* to, const TensorMap& map, int j, int k, int l, Mbarrier* mbarrier) {
  auto& hopper = emulated::hopper();
  emulated::expect(!hopper.inits_unfenced, "a TMA load before fence_mbarrier_init");
  emulated::state_of(mbarrier);
  emulated::expect(map.tensor.data != nullptr, "a TMA load of no tensor");
  emulated::expect(
      smem_address(to) % SWIZZLE_ATOM_BYTES == 0, "a TMA load to an address that is not aligned to a swizzle atom");
  emulated::expect(
      smem_address(to) + map.tensor.box_bytes() <= static_cast<uint32_t>(emulated::cta->smem_bytes),
      "a TMA load beyond shared memory");
  memset(to, 0xff, map.tensor.box_bytes());
  hopper.loads.push_back({mbarrier, static_cast<char*>(to), map.tensor, {j, k, l}});
  ++emulated::cta->progress;
}

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
  auto& group = hopper().warpgroups[self->index / WARPGROUP];
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
  static_assert(COUNT == 32 || COUNT == 64);
  emulated::Issue lane{d, a, 0, b};
  emulated::issue(&lane, {true, true, false, B_TRANSPOSED, 2 * COUNT, 0, 0, &emulated::decode<T>, {}, {}});
}
template <bool ADD, bool A_TRANSPOSED, bool B_TRANSPOSED, int COUNT, class T>
void wgmma(float (&d)[COUNT], uint64_t a, uint64_t b, T) {
  static_assert(COUNT == 32 || COUNT == 64);
  emulated::Issue lane{d, nullptr, a, b};
  emulated::issue(&lane, {false, ADD, A_TRANSPOSED, B_TRANSPOSED, 2 * COUNT, 0, 0, &emulated::decode<T>, {}, {}});
}

inline int sm_count() { return 2; }  // few, so that a CTA computes several tiles

template <class... Parameters, class... Arguments>
void launch_sm90a(
    void (*kernel)(Parameters...), Grid grid, int threads, int smem_bytes, Stream stream, const Arguments&... given) {
  emulated::hopper_state() = {};  // a failed launch may have left state behind
  launch(kernel, grid, threads, smem_bytes, stream, given...);
  if (const char* left = emulated::unfinished()) throw std::runtime_error(std::string("emulated kernel: ") + left);
}

}  // namespace fasthyper
