// What a call is given, and how its axes are divided.
#pragma once

#include "operands.h"

namespace fasthyper {

enum class Schedule { fold, generate, project };

template <class S>
struct Matrix {
  const S* data = nullptr;
  int64_t s0 = 0, s1 = 0;
};

// What a call is given; null where it is not needed.
template <class S>
struct Factors {
  int64_t B, N, R, I, O;
  Rows<const S> x, z, g;
  const S* h;
  int64_t so, si, sr;
  Matrix<S> bias, base;  // (O, R), (O, I)

  // Not a whole number: it may pass 2⁶³.
  double multiplications() const { return double(B) * double(N) * double(R) * double(I) * double(O); }

  Head<S> oir() const { return {h, O, I, R, so, si, sr}; }
  Head<S> ori() const { return {h, O, R, I, so, sr, si}; }
  Head<S> iro() const { return {h, I, R, O, si, sr, so}; }
  Head<S> roi() const { return {h, R, O, I, sr, so, si}; }
};

// A whole number of tasks, slices or threads that so much work is worth.
inline int64_t many(double worth) { return int64_t(std::min(worth, 1e9)); }

// A range of an axis of H.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

inline Range share(int64_t size, int64_t part, int64_t parts) {
  return {size * part / parts, size * (part + 1) / parts};
}

template <class S>
Head<S> cut_p(Head<S> h, Range r) {
  h.data += r.begin * h.sp;
  h.p = r.size();
  return h;
}

template <class S>
Head<S> cut_q(Head<S> h, Range r) {
  h.data += r.begin * h.sq;
  h.q = r.size();
  return h;
}

// Tasks a thread must take at least.
inline int64_t tasks_per_thread(int64_t tasks, double multiplications) {
  return ceil_div(tasks, std::clamp<int64_t>(many(multiplications / WORTH), 1, tasks));
}

}  // namespace fasthyper
