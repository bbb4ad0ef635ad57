// Convolutions with weights of their own for every instance b,
//
//   y[b,o,p] = Σ_{i,u,v} w[b,o,i,u,v] x[b, G(o)·I + i, stride·p − padding + dilation·(u,v)] + shift[b,o],
//
// where G(o) is the group of output channel o, and x is zero outside of the image. Their derivatives by x and by w have
// the same loops. This file has the geometry of one axis.
//
// Let stride·p − padding + dilation·u = stride·(p + s) + f with 0 ≤ f < stride. A tap u reads phase f of the image:
// every stride-th number of it, from f on. In a plane that holds the numbers of a phase one after the other, the tap
// reads s numbers further on than p, whatever the stride is. So all loops over p read contiguous numbers.
#pragma once

#include <algorithm>
#include <vector>

#include "sizes.h"

namespace fasthyper {

constexpr int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// One axis of a convolution: the sizes of image, output and kernel.
struct ConvAxis {
  int64_t image, output, kernel, stride, padding, dilation;

  int64_t place(int64_t u) const { return u * dilation - padding; }
  int64_t steps(int64_t u) const { return floor_div(place(u), stride); }
  int64_t phase(int64_t u) const { return place(u) - stride * steps(u); }
};

// The cells of an axis of a plane: cell k has number step·(begin + k) + phase of the image, or zero outside of it.
struct Cells {
  int64_t begin, count, step, phase;

  int64_t number(int64_t k) const { return step * (begin + k) + phase; }

  // The first cell inside of an image of this size, and the first one after it.
  int64_t first() const { return std::clamp<int64_t>(-begin, 0, count); }
  int64_t last(int64_t size) const {
    const int64_t numbers = size > phase ? ceil_div(size - phase, step) : 0;
    return std::clamp(numbers - begin, first(), count);
  }
};

// The planes of one axis: a sum over taps reads planes of a source at `cell[u]` + p, and is written to planes of p.
// Every phase has a plane.
struct PlaneAxis {
  int64_t count;        // of p
  int64_t begin, span;  // cell 0 of the source is at p = begin; `span` cells are added to those of p
  int64_t source_step, target_step;
  std::vector<int64_t> source_phases, target_phases;
  std::vector<int64_t> source_phase, target_phase, cell;  // of every tap: indices of a phase, and of a cell

  Cells source_cells(int64_t p, int64_t size, int64_t phase) const {
    return {p + begin, size + span, source_step, source_phases[phase]};
  }
  Cells target_cells(int64_t p, int64_t size, int64_t phase) const {
    return {p, size, target_step, target_phases[phase]};
  }

 protected:
  explicit PlaneAxis(const ConvAxis& a, int64_t count)
      : count(count), source_phase(a.kernel), target_phase(a.kernel), cell(a.kernel) {
    const int64_t u = std::max<int64_t>(a.kernel, 1) - 1;
    span = a.steps(u) - a.steps(0);
  }
};

// y from x: planes of the phases of the image that some tap reads.
struct ForwardAxis : PlaneAxis {
  explicit ForwardAxis(const ConvAxis& a) : PlaneAxis(a, a.output) {
    begin = a.steps(0), source_step = a.stride, target_step = 1, target_phases = {0};
    for (int64_t u = 0; u < a.kernel; ++u) {
      const auto known = std::find(source_phases.begin(), source_phases.end(), a.phase(u));
      source_phase[u] = known - source_phases.begin();
      if (known == source_phases.end()) source_phases.push_back(a.phase(u));
      cell[u] = a.steps(u) - begin;
    }
  }
};

// dx from g: planes of all phases of the image are written.
struct BackwardAxis : PlaneAxis {
  explicit BackwardAxis(const ConvAxis& a) : PlaneAxis(a, ceil_div(a.image, a.stride)) {
    const int64_t last = a.steps(0) + span;
    begin = -last, source_step = 1, target_step = a.stride, source_phases = {0};
    for (int64_t f = 0; f < std::min(a.stride, a.image); ++f) target_phases.push_back(f);
    for (int64_t u = 0; u < a.kernel; ++u) target_phase[u] = a.phase(u), cell[u] = last - a.steps(u);
  }
};

// A tap of two axes: `offset` of its cell in the planes of a channel, and its index u·V + v.
struct Tap {
  int64_t offset, index;
};

}  // namespace fasthyper
