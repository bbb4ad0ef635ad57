// The instructions of sm_90a on a CPU, as emulated.h has those of older parts. Unkind, too: a box is NaNs until
// somebody has waited for its barrier's phase, at a time of chance; products read shared memory as late as they may,
// when they are waited for, and their sums are NaNs till then; barriers never initialised, bytes not expected,
// descriptors that do not fit the layout, registers changed under a product: all errors.
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
#include "hopper_layouts.h"
#include "emulated.h"
#include "numbers.h"

#define HOPPER_ONLY(...) __VA_ARGS__

namespace fasthyper {

struct TensorMap {
  Field field;
};

inline TensorMap tensor_map(const Field& field) {
  if (field.base)
    if (const char* wrong = field.wrong()) throw std::runtime_error(wrong);
  return {field};
}

namespace emulated {

// A barrier's 64 bits; shared memory as it is at first has not the mark.
struct BarrierState {
  static constexpr uint8_t MARK = 0x5b;
  uint8_t mark, phase, arrivals, pending;
  int32_t bytes;  // expected and not yet come
};
static_assert(sizeof(BarrierState) == sizeof(Barrier));

struct Box {
  Barrier* barrier;
  char* to;
  Field field;
  int64_t at[3];
};

struct WgProduct {
  bool a_in_registers, add, a_transposed, b_transposed;
  int columns;
  uint64_t a_descriptor, b;
  float (*number)(uint16_t);
  uint32_t a[WARPGROUP][4];
  float* d[WARPGROUP];
};

struct Warpgroup {
  Meeting meeting;
  std::vector<std::shared_ptr<WgProduct>> open;
  std::deque<std::vector<std::shared_ptr<WgProduct>>> groups;
  bool begun = false;
  // What sums really are while their registers hold NaNs; of thread and register.
  std::map<std::pair<int, float*>, std::vector<float>> sums;
};

// What a block has beside what emulated.h knows of. A thread more than run marks the block that it is of.
struct Hopper {
  std::list<Box> boxes;
  std::vector<Warpgroup> warpgroups;
  bool unready = false;  // barriers initialised, and no fence since
  unsigned random = 1;
};

inline Hopper& hopper_state() {
  static thread_local Hopper state;
  return state;
}

// What a block should not end with, or null.
inline const char* left_over() {
  if (!hopper_state().boxes.empty()) return "boxes of a block were still on their way when it ended";
  for (const auto& group : hopper_state().warpgroups)
    if (!group.open.empty() || !group.groups.empty()) return "products of a block were never waited for";
  return nullptr;
}

inline Hopper& hopper() {
  auto& state = hopper_state();
  if (static_cast<int>(block->all.size()) == block->threads) {
    if (const char* left = left_over()) fail(left);
    const unsigned random = state.random;
    state = {};
    state.random = random;
    state.warpgroups.resize(block->threads / WARPGROUP);
    block->all.push_back(std::make_unique<Thread>());
  }
  return state;
}

inline BarrierState& state_of(Barrier* barrier) {
  expect(shared_address(barrier) % 8 == 0, "a barrier at a misaligned address");
  auto& state = *reinterpret_cast<BarrierState*>(barrier);
  expect(state.mark == BarrierState::MARK, "a barrier that was never initialised");
  return state;
}

inline void land(const Box& box) {
  const Field& f = box.field;
  uint32_t offset = shared_address(box.to);
  for (int l = 0; l < f.box[2]; ++l)
    for (int k = 0; k < f.box[1]; ++k)
      for (int j = 0; j < f.box[0]; ++j, offset += 2) {
        const int64_t at[3] = {box.at[0] + j, box.at[1] + k, box.at[2] + l};
        bool inside = true;
        for (int axis = 0; axis < 3; ++axis) inside &= at[axis] >= 0 && at[axis] < f.counts[axis];
        uint16_t number = 0;
        if (inside)
          memcpy(
              &number, static_cast<const char*>(f.base) + (at[0] + at[1] * f.strides[0] + at[2] * f.strides[1]) * 2, 2);
        memcpy(block->shared + (offset ^ (offset >> 7 & 7) << 4), &number, 2);
      }
}

// End a barrier's phase if all arrivals and bytes have come; returns whether it could be over, but for `now`.
inline bool advance(Barrier* barrier, bool now) {
  auto& state = state_of(barrier);
  if (state.pending > 0) return false;
  auto& boxes = hopper().boxes;
  int bytes = 0;
  for (const auto& box : boxes)
    if (box.barrier == barrier) bytes += box.field.box_bytes();
  expect(bytes <= state.bytes, "more bytes come than a barrier expects");
  if (bytes < state.bytes) return false;
  if (bytes > 0 && !now) return true;
  for (auto box = boxes.begin(); box != boxes.end();) {
    if (box->barrier == barrier) {
      land(*box);
      box = boxes.erase(box);
    } else {
      ++box;
    }
  }
  state.bytes = 0;
  state.pending = state.arrivals;
  state.phase ^= 1;
  return false;
}

}  // namespace emulated

inline uint32_t times(uint32_t a, uint32_t b, float16) {
  uint32_t word = 0;
  for (int h = 0; h < 2; ++h)
    word |= static_cast<uint32_t>(static_cast<float16>(half_of(a, h, float16{}) * half_of(b, h, float16{})).x)
            << 16 * h;
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

inline void barrier_init(Barrier* barrier, int arrivals) {
  emulated::expect(shared_address(barrier) % 8 == 0, "a barrier at a misaligned address");
  emulated::expect(arrivals > 0 && arrivals < 256, "a barrier of no or too many arrivals");
  emulated::hopper().unready = true;
  const auto count = static_cast<uint8_t>(arrivals);
  const emulated::BarrierState state{emulated::BarrierState::MARK, 0, count, count, 0};
  memcpy(barrier, &state, sizeof state);
}
inline void barriers_ready() { emulated::hopper().unready = false; }

inline void barrier_arrive_expecting(Barrier* barrier, int bytes) {
  auto& state = emulated::state_of(barrier);
  emulated::expect(state.pending > 0, "more arrivals than a barrier expects");
  state.bytes += bytes;
  --state.pending;
  ++emulated::block->steps;
  emulated::advance(barrier, false);
}
inline void barrier_arrive(Barrier* barrier) { barrier_arrive_expecting(barrier, 0); }

inline void barrier_wait(Barrier* barrier, int parity) {
  emulated::expect(parity == 0 || parity == 1, "a parity that is none");
  emulated::until(
      [&] {
        auto& random = emulated::hopper().random;
        random = random * 1664525u + 1013904223u;
        const bool late = random >> 30 == 0;
        if (emulated::advance(barrier, !late)) ++emulated::block->steps;  // it moves, if slowly
        return emulated::state_of(barrier).phase != parity;
      },
      "a barrier's phase");
}

inline void sync_warp() {
  emulated::in_warp("a warp's barrier", emulated::self, [](emulated::Thread**) {});
}

inline void prefetch(const TensorMap&) {}

inline void load_box(void* to, const TensorMap& map, int j, int k, int l, Barrier* barrier) {
  auto& hopper = emulated::hopper();
  emulated::expect(!hopper.unready, "a box is sent for before barriers are ready");
  emulated::state_of(barrier);
  emulated::expect(map.field.base != nullptr, "a box of no tensor");
  emulated::expect(shared_address(to) % PATTERN == 0, "a box to where no pattern begins");
  emulated::expect(
      shared_address(to) + map.field.box_bytes() <= static_cast<uint32_t>(emulated::block->shared_bytes),
      "a box beyond shared memory");
  memset(to, 0xff, map.field.box_bytes());
  hopper.boxes.push_back({barrier, static_cast<char*>(to), map.field, {j, k, l}});
  ++emulated::block->steps;
}

template <int REGISTERS>
void take_registers() {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256);
  emulated::in_warp("setmaxnreg", emulated::self, [](emulated::Thread**) {});
}
template <int REGISTERS>
void give_registers() {
  take_registers<REGISTERS>();
}

namespace emulated {

template <class Argument, class Action>
void in_warpgroup(const char* purpose, Argument* given, Action act) {
  auto& group = hopper().warpgroups[self->index / WARPGROUP];
  together(group.meeting, WARPGROUP, self->index % WARPGROUP, purpose, given, [&](Argument** all) { act(group, all); });
}

// An operand's number (mn, k), by its descriptor.
inline uint16_t operand(uint64_t descriptor, bool transposed, int mn, int k) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const uint32_t row = transposed ? k % 8 : mn % 8;
  const uint32_t linear = transposed ? start + mn / 64 * leading + k / 8 * stride + row * 128 + mn % 64 * 2
                                     : start + mn / 8 * stride + row * 128 + k * 2;
  const uint32_t address = linear ^ (linear & 0x380) >> 3;
  expect(address + 2 <= static_cast<uint32_t>(block->shared_bytes), "an operand beyond shared memory");
  uint16_t number;
  memcpy(&number, block->shared + address, 2);
  return number;
}

inline void check_descriptor(uint64_t descriptor, bool transposed) {
  expect(descriptor >> 62 == 1, "a descriptor of another swizzle than 128 bytes");
  expect((descriptor & 0x3fffc000c000c000ull) == 0, "a descriptor with bits where none belong");
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  expect((start & 0x380) == 0, "a descriptor that begins within a pattern");
  expect((start & 0x7f) % (transposed ? 128 : 32) == 0, "a descriptor that begins within a step");
}

inline void run(Warpgroup& group, const WgProduct& product) {
  const int columns = product.columns;
  std::vector<float> a(64 * 16), b(16 * columns), sum(64 * columns);
  for (int t = 0; t < WARPGROUP && product.a_in_registers; ++t)
    for (int q = 0; q < 4; ++q)
      for (int e = 0; e < 2; ++e)
        a[(t / 32 * 16 + t % 32 / 4 + q % 2 * 8) * 16 + t % 4 * 2 + e + q / 2 * 8] =
            product.number(static_cast<uint16_t>(product.a[t][q] >> 16 * e));
  for (int m = 0; m < 64 && !product.a_in_registers; ++m)
    for (int k = 0; k < 16; ++k)
      a[m * 16 + k] = product.number(operand(product.a_descriptor, product.a_transposed, m, k));
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < columns; ++n)
      b[k * columns + n] = product.number(operand(product.b, product.b_transposed, n, k));
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < columns; ++n) sum[m * columns + n] += a[m * 16 + k] * b[k * columns + n];
  for (int t = 0; t < WARPGROUP; ++t) {
    auto& d = group.sums.at({t, product.d[t]});
    for (int r = 0; r < columns / 2; ++r) {
      const int m = t / 32 * 16 + t % 32 / 4 + r % 4 / 2 * 8, n = r / 4 * 8 + t % 4 * 2 + r % 2;
      d[r] = (product.add ? d[r] : 0.f) + sum[m * columns + n];
    }
  }
}

inline bool in_use(const Warpgroup& group, int t, const float* d) {
  for (const auto& committed : group.groups)
    for (const auto& product : committed)
      if (product->d[t] == d) return true;
  for (const auto& product : group.open)
    if (product->d[t] == d) return true;
  return false;
}

struct Issue {
  float* d;
  const uint32_t* a;
  uint64_t a_descriptor, b;
};

template <class T>
float number_of(uint16_t bits) {
  return half_of(bits, 0, T{});
}

inline void issue(Issue* lane, WgProduct product) {
  in_warpgroup("a product", lane, [&](Warpgroup& group, Issue** all) {
    expect(group.begun, "products that were not begun");
    product.a_descriptor = all[0]->a_descriptor, product.b = all[0]->b;
    check_descriptor(product.b, product.b_transposed);
    if (!product.a_in_registers) check_descriptor(product.a_descriptor, product.a_transposed);
    for (int t = 0; t < WARPGROUP; ++t) {
      expect(all[t]->b == product.b && all[t]->a_descriptor == product.a_descriptor, "descriptors that differ");
      product.d[t] = all[t]->d;
      if (product.a_in_registers) memcpy(product.a[t], all[t]->a, sizeof product.a[t]);
      auto& sums = group.sums[{t, all[t]->d}];
      if (sums.empty()) {
        sums.assign(all[t]->d, all[t]->d + product.columns / 2);
        std::fill_n(all[t]->d, product.columns / 2, NAN);
      }
    }
    group.open.push_back(std::make_shared<WgProduct>(product));
  });
}

}  // namespace emulated

inline void products_begin() {
  emulated::in_warpgroup(
      "wgmma.fence", emulated::self, [](emulated::Warpgroup& group, emulated::Thread**) { group.begun = true; });
}
inline void products_commit() {
  emulated::in_warpgroup("wgmma.commit_group", emulated::self, [](emulated::Warpgroup& group, emulated::Thread**) {
    group.groups.push_back(std::move(group.open));
    group.open.clear();
    group.begun = false;
  });
}
template <int IN_FLIGHT>
void products_wait() {
  emulated::in_warpgroup("wgmma.wait_group", emulated::self, [](emulated::Warpgroup& group, emulated::Thread**) {
    while (group.groups.size() > IN_FLIGHT) {
      for (const auto& product : group.groups.front()) emulated::run(group, *product);
      group.groups.pop_front();
    }
    for (auto at = group.sums.begin(); at != group.sums.end();) {
      float* const d = at->first.second;
      if (emulated::in_use(group, at->first.first, d)) {
        ++at;
        continue;
      }
      for (size_t r = 0; r < at->second.size(); ++r) {
        emulated::expect(d[r] != d[r], "sums were changed under a product");
        d[r] = at->second[r];
      }
      at = group.sums.erase(at);
    }
  });
}
template <int COUNT>
void settled(float (&)[COUNT]) {}

template <bool B_TRANSPOSED, int COUNT, class T>
void product(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, T) {
  static_assert(COUNT == 32 || COUNT == 64);
  emulated::Issue lane{d, a, 0, b};
  emulated::issue(&lane, {true, true, false, B_TRANSPOSED, 2 * COUNT, 0, 0, &emulated::number_of<T>, {}, {}});
}
template <bool ADD, bool A_TRANSPOSED, bool B_TRANSPOSED, int COUNT, class T>
void product(float (&d)[COUNT], uint64_t a, uint64_t b, T) {
  static_assert(COUNT == 32 || COUNT == 64);
  emulated::Issue lane{d, nullptr, a, b};
  emulated::issue(&lane, {false, ADD, A_TRANSPOSED, B_TRANSPOSED, 2 * COUNT, 0, 0, &emulated::number_of<T>, {}, {}});
}

inline int multiprocessors() { return 2; }  // so that blocks have more than one tile

template <class... Parameters, class... Arguments>
void launch_hopper(
    void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes, Stream stream, const Arguments&... given) {
  emulated::hopper_state() = {};  // an error may have left something
  launch(kernel, grid, threads, shared_bytes, stream, given...);
  if (const char* left = emulated::left_over()) throw std::runtime_error(std::string("emulated kernel: ") + left);
}

}  // namespace fasthyper
