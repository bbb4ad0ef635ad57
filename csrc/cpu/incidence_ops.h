// The operators of torch.ops.fasthyper_cpu for incidence sums. Python has checked dtypes and sizes; values of indices
// are checked here, on every call, because a caller may change an index at any time.
#pragma once

#include <ATen/ops/zeros.h>

#include "incidence_rows.h"
#include "incidence_weight_grad.h"
#include "ops.h"

namespace fasthyper {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

// The numbers of an index, contiguous and checked to be at least 0 and less than `bound`; null if there is none.
class CheckedIndex {
 public:
  CheckedIndex(const char* name, const MaybeTensor& index, int64_t E, int64_t bound) {
    if (!index) {
      TORCH_CHECK_VALUE(
          E == bound, name, " is missing, so it must have a row for each of the ", E, " terms, but has ", bound);
      return;
    }
    TORCH_CHECK_TYPE(index->scalar_type() == at::kLong, name, " must be int64, got ", index->scalar_type());
    TORCH_CHECK_VALUE(
        index->dim() == 1 && index->size(0) == E, name, " must have shape (", E, "), got ", index->sizes());
    held_ = realigned(*index).contiguous();
    data_ = held_.const_data_ptr<int64_t>();
    int64_t least = 0, most = -1;
    for (int64_t e = 0; e < E; ++e) least = std::min(least, data_[e]), most = std::max(most, data_[e]);
    TORCH_CHECK_VALUE(
        least >= 0 && most < bound, name, " has the value ", least < 0 ? least : most,
        ", but must be at least 0 and less than ", bound);
  }

  const int64_t* data() const { return data_; }

 private:
  at::Tensor held_;
  const int64_t* data_ = nullptr;
};

// Checks that `order` names each term once, so that terms can be computed in any order.
inline void check_order(const int64_t* order, int64_t E) {
  const Scratch<uint64_t> seen(ceil_div(E, 64));
  seen.span().fill(0);
  for (int64_t k = 0; k < E; ++k) *seen.at(order[k] / 64, 1) |= uint64_t(1) << (order[k] % 64);
  int64_t count = 0;
  for (int64_t k = 0; k < seen.span().size(); ++k) count += std::popcount(*seen.at(k, 1));
  TORCH_CHECK_VALUE(count == E, "order must name each of the ", E, " terms once, but names ", count);
}

// `ptr`, which must rise from 0 to E.
class CheckedPtr {
 public:
  CheckedPtr(const MaybeTensor& ptr, int64_t nodes, int64_t E) {
    if (!ptr) {
      TORCH_CHECK_VALUE(
          nodes == E, "ptr is missing, so each of the ", nodes, " rows must have one term, not ", E, " in all");
      return;
    }
    TORCH_CHECK_TYPE(ptr->scalar_type() == at::kLong, "ptr must be int64, got ", ptr->scalar_type());
    TORCH_CHECK_VALUE(
        ptr->dim() == 1 && ptr->size(0) == nodes + 1, "ptr must have shape (", nodes + 1, "), got ", ptr->sizes());
    held_ = realigned(*ptr).contiguous();
    data_ = held_.const_data_ptr<int64_t>();
    bool rises = data_[0] == 0 && data_[nodes] == E;
    for (int64_t k = 0; k < nodes; ++k) rises &= data_[k] <= data_[k + 1];
    TORCH_CHECK_VALUE(rises, "ptr must rise from 0 to the number of terms, ", E);
  }

  const int64_t* data() const { return data_; }

 private:
  at::Tensor held_;
  const int64_t* data_ = nullptr;
};

enum Factor { X, Z, G };

// The factor that has the rows of a schedule.
Factor factor_of(c10::string_view schedule) {
  if (schedule == "project") return X;
  if (schedule == "generate") return Z;
  TORCH_CHECK_VALUE(
      schedule == "aggregate" || schedule == "fold", "schedule must be fold, generate, project or aggregate, got ",
      schedule);
  return G;
}

// The operands of a call. x is there always.
struct IncidenceArguments {
  at::Tensor x, z, weight, g;
  MaybeTensor source, cond, target, order, ptr;
  int64_t conds, targets, O, R;
  c10::string_view schedule;
  int64_t workspace;

  bool fold() const { return schedule == "fold"; }
  int64_t N() const { return x.size(1); }
  int64_t I() const { return x.size(2); }
  int64_t E() const {
    for (const auto* index : {&source, &cond, &target})
      if (*index) return (*index)->numel();
    return x.size(0);
  }
  int64_t instances(Factor f) const { return f == X ? x.size(0) : f == Z ? conds : targets; }

  // Python has checked the sizes with better messages.
  void check() const {
    const auto has = [](const at::Tensor& t, at::IntArrayRef shape) { return !t.defined() || t.sizes() == shape; };
    TORCH_CHECK_VALUE(
        targets >= 0 && conds >= 0 && has(z, {conds, R}) && has(weight, {O, I(), R}) && has(g, {targets, N(), O}),
        "x, z, weight and g do not agree in their sizes");
  }
};

// A call in the dtype S, with checked indices.
template <class S>
class IncidenceCall {
 public:
  explicit IncidenceCall(const IncidenceArguments& a)
      : a_(a),
        source_("source", a.source, a.E(), a.x.size(0)),
        cond_("cond", a.cond, a.E(), a.conds),
        target_("target", a.target, a.E(), a.targets),
        order_("order", a.order, a.E(), a.E()),
        ptr_(a.fold() ? std::nullopt : a.ptr, a.fold() ? a.E() : a.instances(factor_of(a.schedule)), a.E()),
        w_(factor_of(a.schedule)),
        place_{{source_.data(), true}, {cond_.data(), false}, {target_.data(), true}},
        size_{a.I(), a.R, a.O} {
    if (order_.data() && !a.fold()) check_order(order_.data(), a.E());
    const int64_t N = a.N();
    if (a.x.defined()) rows_[X] = rows<S>(a.x);
    if (a.z.defined()) rows_[Z] = {a.z.const_data_ptr<S>(), a.z.stride(0), 0, a.z.stride(1), 1, a.R};
    if (a.g.defined()) rows_[G] = rows<S>(a.g);
    terms_ = {a.E(), N, a.fold() ? a.E() : a.instances(w_), w_ == Z, a.fold() ? nullptr : order_.data(), ptr_.data()};
    terms_.w = {a.fold() ? target_.data() : nullptr, w_ != Z};
  }

  Factor w() const { return w_; }
  const Place& place(Factor f) const { return place_[f]; }
  bool empty() const { return terms_.count() == 0 || size_[X] == 0 || size_[Z] == 0 || size_[G] == 0; }

  // The other factors, in order.
  Factor first() const { return w_ == X ? Z : X; }
  Factor second() const { return w_ == G ? Z : G; }

  // A factor is v if it wastes less of a register, or if it alone is wanted, or if its axis of H is the last one.
  Factor choose_v(bool wants_first, bool wants_second) const {
    const auto waste = [&](Factor f) { return double(whole_registers(size_[f])) / size_[f]; };
    const Factor a = first(), b = second();
    if (waste(a) > 1.1 * waste(b)) return b;
    if (waste(b) > 1.1 * waste(a)) return a;
    if (wants_first != wants_second) return wants_first ? a : b;
    return a == Z ? a : b == Z ? b : X;
  }

  // The sum with factor v; `weight` has the strides of H, and its data if the sum reads H.
  IncidenceSum<S> sum(Factor v, const at::Tensor& weight) const {
    const Factor u = v == first() ? second() : first();
    IncidenceSum<S> sum{terms_, rows_[w_], rows_[u], rows_[v], {}};
    sum.terms.u = place_[u], sum.terms.v = place_[v];
    sum.h = {weight.const_data_ptr<S>(), size_[w_],         size_[u],         size_[v],
             stride(weight, w_),         stride(weight, u), stride(weight, v)};
    return sum;
  }

  static int64_t stride(const at::Tensor& weight, Factor f) { return weight.stride(f == G ? 0 : f == X ? 1 : 2); }

  // An empty result for a factor: zeros if it is a sum of several terms.
  at::Tensor result(Factor f) const {
    const int64_t rows = a_.instances(f);
    const bool sums = empty() || f == w_ || !one_term_each(place_[f], a_.N());
    const std::vector<int64_t> shape =
        f == Z ? std::vector<int64_t>{rows, size_[f]} : std::vector<int64_t>{rows, a_.N(), size_[f]};
    return sums ? at::zeros(shape, a_.x.options()) : at::empty(shape, a_.x.options());
  }

  RowsOut<S> out(Factor f, const at::Tensor& t) const {
    if (!t.defined()) return {};
    return {t.mutable_data_ptr<S>(), a_.instances(f) * (f == Z ? 1 : a_.N()), size_[f]};
  }

  // Computes the results that are defined.
  template <class T>
  void run(const at::Tensor (&results)[3], const at::Tensor& dh) const {
    if (empty()) return;
    const int64_t workspace = a_.workspace;
    if (results[w_].defined()) {
      const auto s = sum(choose_v(false, false), a_.weight);
      const Tiling tiling(s, true, workspace);
      collect_rows<S, T>(s, tiling, out(w_, results[w_]), workspace);
    }
    const bool first_wanted = results[first()].defined(), second_wanted = results[second()].defined();
    if (first_wanted || second_wanted) {
      const Factor v = choose_v(first_wanted, second_wanted), u = v == first() ? second() : first();
      const auto s = sum(v, a_.weight);
      const Tiling tiling(s, true, workspace);
      expand_rows<S, T>(s, tiling, out(u, results[u]), out(v, results[v]), workspace);
    }
    if (dh.defined()) {
      const Factor v = choose_v(false, false), u = v == first() ? second() : first();
      const auto s = sum(v, dh);
      const Tiling tiling(s, false, workspace);
      const HeadOut<S> to{dh.mutable_data_ptr<S>(), stride(dh, w_), stride(dh, u), stride(dh, v)};
      IncidenceWeightGrad<S, T>(s, tiling, to, workspace).run();
    }
  }

 private:
  const IncidenceArguments& a_;
  const CheckedIndex source_, cond_, target_, order_;
  const CheckedPtr ptr_;
  const Factor w_;
  const Place place_[3];
  const int64_t size_[3];  // features of x, z and g
  Rows<const S> rows_[3] = {};
  Terms terms_;
};

at::Tensor apply_terms(
    const at::Tensor& x, const at::Tensor& z, const at::Tensor& weight, const MaybeTensor& source,
    const MaybeTensor& cond, const MaybeTensor& target, int64_t targets, const MaybeTensor& order,
    const MaybeTensor& ptr, c10::string_view schedule, int64_t workspace, bool native) {
  const IncidenceArguments arguments{
      realigned(x), realigned(z), realigned(weight), {},        source,   cond,     target, order, ptr,
      z.size(0),    targets,      weight.size(0),    z.size(1), schedule, workspace};
  arguments.check();
  at::Tensor y;
  with_types(x, native, [&](auto s, auto t) {
    const IncidenceCall<decltype(s)> call(arguments);
    y = call.result(G);
    call.template run<decltype(t)>({{}, {}, y}, {});
  });
  return y;
}

// Gradients of x, z and H where the mask is set.
std::tuple<at::Tensor, at::Tensor, at::Tensor> grads_terms(
    const at::Tensor& x, const MaybeTensor& z, const MaybeTensor& weight, const at::Tensor& g,
    const MaybeTensor& source, const MaybeTensor& cond, const MaybeTensor& target, int64_t conds,
    const MaybeTensor& order, const MaybeTensor& ptr, std::array<bool, 3> mask, c10::string_view schedule,
    int64_t workspace, bool native) {
  TORCH_CHECK_VALUE(z || !(mask[0] || mask[2]), "the gradients of x and of weight need z");
  TORCH_CHECK_VALUE(weight || !(mask[0] || mask[1]), "the gradients of x and of z need weight");
  if (!z && !weight) return {};
  const auto given = [](const MaybeTensor& t) { return t ? realigned(*t) : at::Tensor(); };
  const IncidenceArguments arguments{
      realigned(x),
      given(z),
      given(weight),
      realigned(g),
      source,
      cond,
      target,
      order,
      ptr,
      conds,
      g.size(0),
      g.size(2),
      z ? z->size(1) : weight->size(2),
      schedule,
      workspace};
  arguments.check();
  at::Tensor dx, dz, dh;
  with_types(x, native, [&](auto s, auto t) {
    const IncidenceCall<decltype(s)> call(arguments);
    if (mask[0]) dx = call.result(X);
    if (mask[1]) dz = call.result(Z);
    const std::vector<int64_t> shape{arguments.O, arguments.I(), arguments.R};
    if (mask[2]) dh = call.empty() ? at::zeros(shape, x.options()) : at::empty(shape, x.options());
    call.template run<decltype(t)>({dx, dz, {}}, dh);
  });
  return {dx, dz, dh};
}

// out[target[e]] += rows[source[e]] for all terms e, in their order.
void sum_terms(
    at::Tensor& out, const at::Tensor& rows, const MaybeTensor& source, const MaybeTensor& target, int64_t workspace) {
  const int64_t E = source ? source->numel() : target ? target->numel() : rows.size(0);
  TORCH_CHECK_VALUE(
      out.dim() == 2 && rows.dim() == 2 && out.size(1) == rows.size(1), "out and rows must have shapes (K, F), got ",
      out.sizes(), " and ", rows.sizes());
  const int64_t features = out.size(1);
  TORCH_CHECK_VALUE(
      features < 2 || (out.stride(1) == 1 && rows.stride(1) == 1), "features of out and rows must be contiguous");
  TORCH_CHECK_TYPE(
      out.scalar_type() == rows.scalar_type() || out.scalar_type() == at::kFloat, "out must be float32 or ",
      rows.scalar_type(), " like rows, got ", out.scalar_type());
  TORCH_CHECK_VALUE(aligned(out), "out must be aligned for its dtype");
  const CheckedIndex from("source", source, E, rows.size(0)), to("target", target, E, out.size(0));
  if (E == 0 || features == 0) return;
  const at::Tensor held = realigned(rows);
  with_types(held, false, [&](auto s, auto) {
    using S = decltype(s);
    const auto run = [&](auto* data) {
      sum_rows(
          data, out.stride(0), out.size(0), held.const_data_ptr<S>(), held.stride(0), features, E, from.data(),
          to.data(), workspace);
    };
    if (out.scalar_type() == at::kFloat) run(out.mutable_data_ptr<float>());
    else run(out.mutable_data_ptr<S>());
  });
}

TORCH_LIBRARY_FRAGMENT(fasthyper_cpu, m) {
  m.def(
      "apply_terms(Tensor x, Tensor z, Tensor weight, Tensor? source, Tensor? cond, Tensor? target, int targets, "
      "Tensor? order, Tensor? ptr, str schedule, int workspace, bool native) -> Tensor",
      apply_terms);
  m.def(
      "grads_terms(Tensor x, Tensor? z, Tensor? weight, Tensor g, Tensor? source, Tensor? cond, Tensor? target, "
      "int conds, Tensor? order, Tensor? ptr, bool[3] mask, str schedule, int workspace, bool native) -> (Tensor, "
      "Tensor, Tensor)",
      grads_terms);
  m.def("sum_terms(Tensor(a!) out, Tensor rows, Tensor? source, Tensor? target, int workspace) -> ()", sum_terms);
}

}  // namespace
}  // namespace fasthyper
