// A pretended GPU: tensors on cuda:0 whose memory is the host's. torch may be one for CPUs or one for GPUs.
//
// Each operator runs its CPU kernel on the same memory. What torch decides by the device of a tensor, such as dispatch,
// autograd's thread and its streams, is torch's own.
#include <ATen/ATen.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <vector>

namespace pretended {

using at::Tensor;
using c10::Device;
using c10::DispatchKey;
using c10::IValue;
using c10::Stream;

std::atomic<int64_t> devices_set{0};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static Device here() { return Device(c10::kCUDA, 0); }
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device exchangeDevice(Device) const override { return here(); }
  Device getDevice() const override { return here(); }
  void setDevice(Device) const override { ++devices_set; }
  void uncheckedSetDevice(Device) const noexcept override { ++devices_set; }
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, here()); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, here()); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return Stream(Stream::DEFAULT, here()); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, here()); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, here()); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = nullptr;
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override { ++devices_set; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
};

// A storage on the GPU owns the storage of the host that has the memory.
c10::Storage& owned(const c10::Storage& on_gpu) { return *static_cast<c10::Storage*>(on_gpu.data_ptr().get_context()); }

c10::Storage on_gpu(const c10::Storage& host) {
  auto* owner = new c10::Storage(host);
  c10::DataPtr memory(
      host.data_ptr().get(), owner, [](void* p) { delete static_cast<c10::Storage*>(p); }, Guard::here());
  return c10::Storage(c10::Storage::use_byte_size_t(), host.nbytes(), std::move(memory), nullptr, false);
}

Tensor tensor_of(c10::Storage storage, DispatchKey key, const Tensor& like) {
  auto keys = c10::DispatchKeySet(key);
  if (like._is_zerotensor()) keys = keys.add(DispatchKey::ZeroTensor);  // it has no memory
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) impl->_set_conj(true);
  if (like.is_neg()) impl->_set_neg(true);
  return made;
}

struct Call {
  std::vector<std::pair<Tensor, Tensor>> given;  // on the GPU, and the same memory on the host

  Tensor to_host(const Tensor& t) {
    if (!t.defined() || !t.is_cuda()) return t;
    for (const auto& [gpu, host] : given)
      if (gpu.is_same(t)) return host;
    given.emplace_back(t, tensor_of(owned(t.storage()), DispatchKey::CPU, t));
    return given.back().second;
  }

  Tensor to_gpu(const Tensor& t) {
    if (!t.defined() || t.is_cuda()) return t;
    for (const auto& [gpu, host] : given)
      if (host.is_same(t)) return gpu;
    for (const auto& [gpu, host] : given)
      if (host.storage().is_alias_of(t.storage())) return tensor_of(gpu.storage(), DispatchKey::CUDA, t);
    return tensor_of(on_gpu(t.storage()), DispatchKey::CUDA, t);
  }

  // An operator may have resized a tensor.
  void update() {
    for (const auto& [gpu, host] : given) {
      auto* impl = gpu.unsafeGetTensorImpl();
      if (host.sizes() != gpu.sizes() || host.strides() != gpu.strides() ||
          host.storage_offset() != gpu.storage_offset())
        impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
      if (host.storage().data() != gpu.storage().data() || host.storage().nbytes() != gpu.storage().nbytes())
        impl->set_storage_keep_dtype(on_gpu(host.storage()));
    }
  }

  template <class Convert>
  void each(IValue& value, const Convert& convert) {
    if (value.isTensor()) {
      value = convert(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(convert(t));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& t : value.toOptionalTensorVector())
        list.push_back(t ? std::optional<Tensor>(convert(*t)) : std::nullopt);
      value = list;
    }
  }
};

// Whether the operators of csrc/cuda do nothing, so that the time of a call is that of all around them.
std::atomic<bool> skips_kernels{false};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto arguments = op.schema().arguments().size();
  if (skips_kernels && op.schema().name().rfind("fasthyper_cuda", 0) == 0) {
    torch::jit::drop(*stack, arguments);
    for (size_t i = 0; i < op.schema().returns().size(); ++i) stack->emplace_back(int64_t(0));
    return;
  }
  Call call;
  auto first = stack->end() - std::ptrdiff_t(arguments);
  for (auto value = first; value != stack->end(); ++value) {
    call.each(*value, [&](const Tensor& t) { return call.to_host(t); });
    if (value->isDevice() && value->toDevice().is_cuda()) *value = Device(c10::kCPU);
  }
  op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack);
  call.update();
  const auto results = op.schema().returns().size();
  for (auto value = stack->end() - std::ptrdiff_t(results); value != stack->end(); ++value)
    call.each(*value, [&](const Tensor& t) { return call.to_gpu(t); });
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

// Operators whose kernel for all devices looks for one for the device.
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  for (const char* name : {"copy_"}) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

// Operators that torch has for GPUs alone.
void define_for_gpus(torch::Library& m) {
  m.impl("mm.dtype", [](const Tensor& a, const Tensor& b, at::ScalarType dtype) {
    return at::mm(a.to(dtype), b.to(dtype));
  });
  m.impl("bmm.dtype", [](const Tensor& a, const Tensor& b, at::ScalarType dtype) {
    return at::bmm(a.to(dtype), b.to(dtype));
  });
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) { define_for_gpus(m); }

// A torch with CUDA registers its own guard and kernels, when it is imported: these take their places.
void replace_cuda() {
  static Guard guard;
  static auto& kept = *new std::vector<c10::RegistrationHandleRAII>();  // never undone, as other threads may run then
  c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::kCUDA)].store(&guard);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getRegistrationsForDispatchKey(DispatchKey::CUDA)) {
    const auto op = dispatcher.findSchema(name);
    if (!op || name.name.rfind("aten::", 0) != 0) continue;
    kept.push_back(dispatcher.registerImpl(
        name, DispatchKey::CUDA, c10::KernelFunction::makeFromBoxedFunction<&run_on_host>(), std::nullopt, nullptr,
        "gpu.cpp"));
  }
  define_for_gpus(*new torch::Library(torch::Library::IMPL, "aten", DispatchKey::CUDA, __FILE__, __LINE__));
}

TORCH_LIBRARY(fasthyper_pretended, m) {
  m.def("replace_cuda() -> ()", &replace_cuda);
  m.def("devices_set() -> int", [] { return devices_set.load(); });
  m.def("skip_kernels(bool skip) -> ()", [](bool skip) { skips_kernels = skip; });
}

}  // namespace pretended

namespace at {
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, pretended::Hooks)
}
