// The arguments of a call, as views, and the division of its axes into tasks.
#pragma once

#include "operands.h"

namespace fasthyper {

enum class Schedule { fold, generate, project };

// A matrix with arbitrary strides.
template <class S>
struct Matrix {
  const S* data = nullptr;
  int64_t s0 = 0, s1 = 0;
};

// Sizes and operands of a call. An operand that the call does not need is null.
template <class S>
struct Factors {
  int64_t B, N, R, I, O;
  Rows<const S> x, z, g;
  const S* h;
  int64_t so, si, sr;
  Matrix<S> bias, base;  // (O, R), (O, I)

  // A double, because the product may exceed 2⁶³.
  double multiplications() const { return double(B) * double(N) * double(R) * double(I) * double(O); }

  Head<S> oir() const { return {h, O, I, R, so, si, sr}; }
  Head<S> ori() const { return {h, O, R, I, so, sr, si}; }
  Head<S> iro() const { return {h, I, R, O, si, sr, so}; }
  Head<S> roi() const { return {h, R, O, I, sr, so, si}; }
};

// Converts a ratio of work to a number of tasks, slices or threads.
inline int64_t to_count(double ratio) { return int64_t(std::min(ratio, 1e9)); }

// A range of indices of an axis.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Range k of `count` even ranges of an axis.
inline Range share(int64_t size, int64_t k, int64_t count) { return {size * k / count, size * (k + 1) / count}; }

// H restricted to a range of p.
template <class S>
Head<S> cut_p(Head<S> h, Range r) {
  h.data += r.begin * h.sp;
  h.p = r.size();
  return h;
}

// H restricted to a range of q.
template <class S>
Head<S> cut_q(Head<S> h, Range r) {
  h.data += r.begin * h.sq;
  h.q = r.size();
  return h;
}

// The least number of tasks that one thread should run.
inline int64_t tasks_per_thread(int64_t tasks, double multiplications) {
  return ceil_div(tasks, std::clamp<int64_t>(to_count(multiplications / THREAD_WORK), 1, tasks));
}

}  // namespace fasthyper
