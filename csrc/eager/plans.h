// The plans that Python made, by problem, and the check that a call has the shapes of its problem.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <mutex>
#include <unordered_map>

#include "calls.h"

namespace fasthyper_eager {

// A problem of the planner in Python. Its plans are stored here.
struct Problem {
  int64_t B, N, R, I, O, dtype, needs, device, threads;  // device: its number, or -1 for the CPU
  bool shared_x, forced;                                 // forced: whether the caller has named the backend

  auto all() const { return std::tie(B, N, R, I, O, dtype, needs, device, threads, shared_x, forced); }
  bool operator==(const Problem& other) const { return all() == other.all(); }
};

struct Hash {
  size_t operator()(const Problem& p) const {
    return std::apply([](const auto&... field) { return c10::get_hash(field...); }, p.all());
  }
};

struct Plan {
  std::string schedule, schedule_of_weight;
  int64_t workspace;
  bool native;
};

// On a GPU there are plans for the CUDA kernels alone, which have one schedule.
struct PlanOnGpu {
  int64_t workspace;
  bool emulated;
};

template <class Plan>
class Plans {
 public:
  std::optional<Plan> find(const Problem& problem) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(problem);
    return found == plans_.end() ? std::nullopt : std::optional<Plan>(found->second);
  }

  void remember(const Problem& problem, Plan plan) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (plans_.size() >= 4096) plans_.clear();
    plans_[problem] = std::move(plan);
  }

  void forget() {
    const std::lock_guard<std::mutex> lock(mutex_);
    plans_.clear();
  }

 private:
  std::mutex mutex_;
  std::unordered_map<Problem, Plan, Hash> plans_;
};

inline Plans<Plan> plans;
inline Plans<PlanOnGpu> plans_on_gpu;

constexpr int64_t FORWARD = 0;  // for `needs`; a backward has a bit for each gradient

inline Problem problem_of(const Tensor& x, int64_t R, int64_t O, int64_t needs, bool forced = false) {
  const bool reads_x = needs != 1;  // not if dx alone is requested
  const bool shared = reads_x && x.size(0) > 1 && x.stride(0) == 0;
  const auto dtype = int64_t(x.scalar_type()), threads = int64_t(x.is_cpu() ? at::get_num_threads() : 0);
  return {x.size(0), x.size(1), R, x.size(2), O, dtype, needs, x.get_device(), threads, shared, forced};
}

inline int64_t needs_of(const Mask& mask) { return mask[0] | mask[1] << 1 | mask[2] << 2; }

// The letters of the axes of each argument, from the table in fasthyper/ops/shapes.py, in the order of the arguments.
struct Axes {
  static constexpr const char* FORWARD[] = {"x", "z", "weight", "bias", "base_weight", "base_bias"};
  static constexpr const char* BACKWARD[] = {"x", "z", "weight", "bias", "base_weight", "g"};
  std::array<std::string, 6> forward, backward;
  bool declared = false;
};

inline Axes axes;

inline void declare_axes(const std::vector<std::string>& names, const std::vector<std::string>& letters) {
  const auto of = [&](const char* name) {
    for (size_t i = 0; i < names.size(); ++i)
      if (names[i] == name) return letters.at(i);
    TORCH_CHECK(false, "no axes are declared for ", name);
  };
  for (size_t i = 0; i < 6; ++i) axes.forward[i] = of(Axes::FORWARD[i]), axes.backward[i] = of(Axes::BACKWARD[i]);
  axes.declared = true;
}

inline const Tensor* given(const Tensor& t) { return &t; }

inline const Tensor* given(const Maybe& t) { return t ? &*t : nullptr; }

// Whether the tensors have one dtype, are on one device, and have sizes that agree. Some may be absent.
template <class... Tensors>
inline bool agree(const std::array<std::string, 6>& letters, const Tensor& x, const Tensors&... others) {
  if (!axes.declared || !x.defined()) return false;
  std::array<int64_t, 26> size;
  size.fill(-1);
  size_t argument = 0;
  for (const Tensor* t : {&x, given(others)...}) {
    const std::string& of = letters[argument++];
    if (t == nullptr) continue;
    if (!t->defined()) return false;  // None where a tensor is required: Python says so
    if (t->scalar_type() != x.scalar_type() || t->device() != x.device() || t->dim() != int64_t(of.size()))
      return false;
    const auto sizes = t->sizes();
    for (size_t k = 0; k < of.size(); ++k) {
      int64_t& known = size[of[k] - 'A'];
      if (known < 0) known = sizes[k];
      if (known != sizes[k]) return false;
    }
  }
  return true;
}

}  // namespace fasthyper_eager
