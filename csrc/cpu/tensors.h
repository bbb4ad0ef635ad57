// Checks of tensors that a caller passes.
#pragma once

#include <ATen/core/Tensor.h>

namespace fasthyper {

// Whether a tensor's data is aligned for its dtype; a view of bytes may not be aligned.
inline bool aligned(const at::Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % t.element_size() == 0;
}

inline bool aligned(const std::optional<at::Tensor>& t) { return !t || aligned(*t); }

inline at::Tensor realigned(const at::Tensor& t) { return aligned(t) ? t : t.clone(); }

inline std::optional<at::Tensor> realigned(const std::optional<at::Tensor>& t) {
  return t ? std::optional<at::Tensor>(realigned(*t)) : std::nullopt;
}

}  // namespace fasthyper
