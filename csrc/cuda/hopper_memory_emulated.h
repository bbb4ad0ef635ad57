// Asynchronous memory and clusters of sm_90a, emulated on a CPU for tests, in addition to the instructions of
// emulated.h. Effects are as late as a GPU allows: the destination of a TMA load holds NaNs until its mbarrier's phase
// completes, at a random time. Errors are: an mbarrier without initialisation, bytes that no mbarrier expects, and
// shared memory of a CTA that has ended.
#pragma once
#include <cstdint>
#include <cstring>
#include <list>
#include <memory>
#include <stdexcept>
#include <tuple>

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

// TMA and mbarriers of a CTA.
struct Memory : Extension {
  std::list<TmaLoad> loads;
  bool inits_unfenced = false;  // mbarriers were initialised, and no fence followed
  const char* unfinished() const override {
    return loads.empty() ? nullptr : "TMA loads of a CTA were in flight when it ended";
  }
};

inline Memory& memory_of(Cta& owner) {
  if (!owner.memory) owner.memory = std::make_unique<Memory>();
  return static_cast<Memory&>(*owner.memory);
}

// Return the CTA of a rank of the cluster. Its shared memory may be used until it ends.
inline Cta& peer(int rank) {
  auto& ctas = cta->cluster->ctas;
  expect(rank >= 0 && rank < static_cast<int>(ctas.size()), "a rank outside of the cluster");
  expect(!ctas[rank].done(), "an access to the shared memory of a CTA that has ended");
  return ctas[rank];
}
// Return the address in another CTA's shared memory that corresponds to one in this CTA's.
template <class P>
P* at_peer(P* here, const Cta& owner) {
  return reinterpret_cast<P*>(owner.smem + smem_address(here));
}

inline MbarrierState& state_of(Mbarrier* mbarrier) {
  expect(reinterpret_cast<uintptr_t>(mbarrier) % 8 == 0, "an mbarrier at a misaligned address");
  auto& state = *reinterpret_cast<MbarrierState*>(mbarrier);
  expect(state.mark == MbarrierState::MARK, "an mbarrier that was never initialised");
  return state;
}

inline void complete(const Cta& owner, const TmaLoad& load) {
  const TmaTensor& tensor = load.tensor;
  uint32_t offset = static_cast<uint32_t>(load.to - owner.smem);
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
        memcpy(owner.smem + (offset ^ (offset >> 7 & 7) << 4), &element, 2);
      }
}

// Complete the phase of an mbarrier of a CTA if all arrivals and bytes have come; with loads, only if `now` is true.
// Return true if only `now` is missing.
inline bool advance(Cta& owner, Mbarrier* mbarrier, bool now) {
  auto& state = state_of(mbarrier);
  if (state.pending > 0) return false;
  auto& loads = memory_of(owner).loads;
  int bytes = 0;
  for (const auto& load : loads)
    if (load.mbarrier == mbarrier) bytes += load.tensor.box_bytes();
  expect(bytes <= state.bytes, "more bytes arrive than an mbarrier expects");
  if (bytes < state.bytes) return false;
  if (bytes > 0 && !now) return true;
  for (auto load = loads.begin(); load != loads.end();) {
    if (load->mbarrier == mbarrier) {
      complete(owner, *load);
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

inline void arrive(Cta& owner, Mbarrier* mbarrier, int bytes) {
  auto& state = state_of(mbarrier);
  expect(state.pending > 0, "more arrivals than an mbarrier expects");
  state.bytes += bytes;
  --state.pending;
  ++cta->progress;
  advance(owner, mbarrier, false);
}

inline void load(Cta& owner, void* to, const TensorMap& map, int j, int k, int l, Mbarrier* mbarrier) {
  auto& memory = memory_of(owner);
  expect(!memory.inits_unfenced, "a TMA load before fence_mbarrier_init");
  expect(smem_address(to) % SWIZZLE_ATOM_BYTES == 0, "a TMA load to an address that is not aligned to a swizzle atom");
  expect(
      smem_address(to) + map.tensor.box_bytes() <= static_cast<uint32_t>(cta->smem_bytes),
      "a TMA load beyond shared memory");
  expect(map.tensor.data != nullptr, "a TMA load of no tensor");
  state_of(at_peer(mbarrier, owner));
  char* const there = at_peer(static_cast<char*>(to), owner);
  memset(there, 0xff, map.tensor.box_bytes());
  memory.loads.push_back({at_peer(mbarrier, owner), there, map.tensor, {j, k, l}});
  ++cta->progress;
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
  emulated::memory_of(*emulated::cta).inits_unfenced = true;
  const auto count = static_cast<uint8_t>(arrivals);
  const emulated::MbarrierState state{emulated::MbarrierState::MARK, 0, count, count, 0};
  memcpy(mbarrier, &state, sizeof state);
}
inline void fence_mbarrier_init() { emulated::memory_of(*emulated::cta).inits_unfenced = false; }

inline void mbarrier_arrive_expect_tx(Mbarrier* mbarrier, int bytes) {
  smem_address(mbarrier);
  emulated::arrive(*emulated::cta, mbarrier, bytes);
}
inline void mbarrier_arrive(Mbarrier* mbarrier) { mbarrier_arrive_expect_tx(mbarrier, 0); }
inline void mbarrier_arrive_at(Mbarrier* mbarrier, int rank) {
  auto& owner = emulated::peer(rank);
  emulated::arrive(owner, emulated::at_peer(mbarrier, owner), 0);
}

inline void mbarrier_wait(Mbarrier* mbarrier, int parity) {
  static thread_local unsigned random = 1;
  smem_address(mbarrier);
  emulated::expect(parity == 0 || parity == 1, "a parity that is neither 0 nor 1");
  emulated::wait_until(
      [&] {
        random = random * 1664525u + 1013904223u;
        const bool late = random >> 30 == 0;
        // A delayed phase is not a deadlock.
        if (emulated::advance(*emulated::cta, mbarrier, !late)) ++emulated::cta->progress;
        return emulated::state_of(mbarrier).phase != parity;
      },
      "an mbarrier's phase");
}

inline int cluster_size() { return static_cast<int>(emulated::cta->cluster->ctas.size()); }
inline int cluster_rank() { return emulated::cta->rank; }
inline void sync_cluster() {
  auto& cta = *emulated::cta;
  emulated::meet(
      cta.cluster->everyone, cluster_size() * cta.threads, cta.rank * cta.threads + thread(), "the cluster's barrier",
      emulated::self, [](emulated::Thread**) {});
}

inline void sync_warp() {
  emulated::in_warp("a warp's barrier", emulated::self, [](emulated::Thread**) {});
}

inline void prefetch_tensormap(const TensorMap&) {}

inline void tma_load(void* to, const TensorMap& map, int j, int k, int l, Mbarrier* mbarrier) {
  emulated::load(*emulated::cta, to, map, j, k, l, mbarrier);
}
inline void tma_load_multicast(
    void* to, const TensorMap& map, int j, int k, int l, Mbarrier* mbarrier, unsigned ranks) {
  for (int rank = 0; ranks >> rank; ++rank)
    if (ranks >> rank & 1) emulated::load(emulated::peer(rank), to, map, j, k, l, mbarrier);
}

inline int sm_count() { return 2; }  // few, so that a CTA computes several tiles

template <class... Parameters, class... Arguments>
void launch_sm90a(
    void (*kernel)(Parameters...), Grid grid, int cluster, int threads, int smem_bytes, Stream,
    const Arguments&... given) {
  const std::tuple<Parameters...> arguments{given...};
  emulated::run(grid, cluster, threads, smem_bytes, [&] { std::apply(kernel, arguments); });
}

}  // namespace fasthyper
