// A function φ of the weights of every instance, with one point of each instance, in float32:
//
//   P[b] = H·z[b] + W0      y[b] = φ(P[b]) x[b]      dx[b] = φ(P[b])ᵀ g[b]      dP[b] = φ'(P[b]) ∘ (g[b] x[b]ᵀ)
//   dz[b] = H·dP[b]         dH = Σ_b dP[b] ⊗ z[b]    dW0 = Σ_b dP[b]
//
// Instances are lanes. A product writes a tile of P, some rows of H by some instances. One pass over the tile, in the
// nearest cache, adds to y, or adds to dx and overwrites P with dP. H has the axes p, q and r, in which p is the slower
// one of o and i: rows of H are read in place.
#pragma once

#include "maps.h"
#include "rows.h"

namespace fasthyper {

constexpr int64_t MAPPED_DEPTH = tile_size(128, LANES);    // instances of a tile
constexpr int64_t MAPPED_ROWS = tile_size(66, 6);          // rows of H of a tile
constexpr int64_t MAPPED_COLUMNS = tile_size(128, LANES);  // columns r of one product
constexpr int64_t MAPPED_SLICES = 16;                      // slices of instances, each with its own sum of dH

// The operands of a call. x, z and g have one row for each instance; rows of z are contiguous.
struct Mapped {
  int64_t B, R, np, nq;
  const float* h;
  int64_t sp, sq;  // strides of H; that of r is 1
  Matrix<float> base;
  Rows<const float> z, p, q;  // p and q: x and g by the axes of H
  bool outputs_first;         // whether p is o

  double multiplications() const { return double(B) * double(R) * double(np) * double(nq); }
  int64_t rows() const { return np * nq; }
  int64_t run() const { return np == 1 || sp == nq * sq ? rows() : nq; }  // rows sq apart

  // Calls f(first row, count, their first number in H) for tiles of rows.
  template <class F>
  void for_tiles(F&& f) const {
    const int64_t most = equal_size(run(), MAPPED_ROWS, 6);
    for (int64_t m = 0, count; m < rows(); m += count) {
      count = std::min(most, run() - m % run());
      f(m, count, h + m / nq * sp + m % nq * sq);
    }
  }
};

// The result of a pass that is a sum over one axis: along p, along q, or none.
enum class Along { p, q, none };

// One pass over n rows (p, q) of P with the same p. `t`, `of_q` and an `out` along q begin with the first q.
template <class Map, Along along, bool gradient>
void map_rows(
    float* t, int64_t n, const float* base, int64_t step, const float* of_p, const float* of_q, float* out,
    int64_t lanes) {
  constexpr int64_t V = LANES / WIDTH;
  constexpr bool needs_p = gradient || along == Along::q, needs_q = gradient || along == Along::p;
  for (int64_t l = 0; l < lanes; l += LANES) {
    Vec sum[V] = {}, up[V] = {};
    if constexpr (needs_p)
      for (int v = 0; v < V; ++v) up[v] = load<Vec>(of_p + l + v * WIDTH);
    for (int64_t q = 0; q < n; ++q) {
      const float shift = base ? base[q * step] : 0.f;
      for (int v = 0; v < V; ++v) {
        const int64_t at = q * MAPPED_DEPTH + l + v * WIDTH;
        const Vec p = load<Vec>(t + at) + shift;
        Vec uq = {};
        if constexpr (needs_q) uq = load<Vec>(of_q + at);
        if constexpr (along == Along::p) sum[v] += Map::value(p) * uq;
        if constexpr (along == Along::q) store(out + at, load<Vec>(out + at) + Map::value(p) * up[v]);
        if constexpr (gradient) store(t + at, Map::gradient(p, up[v] * uq));
      }
    }
    if constexpr (along == Along::p)
      for (int v = 0; v < V; ++v) store(out + l + v * WIDTH, load<Vec>(out + l + v * WIDTH) + sum[v]);
  }
}

// The lanes of a task: a chunk of instances at a time.
class MappedChunk {
 public:
  explicit MappedChunk(const Mapped& f)
      : z(f.R * MAPPED_DEPTH),
        p(f.np * MAPPED_DEPTH),
        q(f.nq * MAPPED_DEPTH),
        tile(MAPPED_ROWS * MAPPED_DEPTH),
        f_(f) {}

  // Loads z, and x and g if they are not null, of as many instances from b on as fit.
  void load(int64_t b, int64_t end) {
    first = b, count = std::min(MAPPED_DEPTH, end - b), lanes = whole_lanes(count);
    for (const auto& [rows, to] : {std::pair{&f_.z, &z}, {&f_.p, &p}, {&f_.q, &q}})
      if (rows->data) load_lanes(*rows, b, b + count, to->span(), MAPPED_DEPTH, lanes);
  }

  // Computes P of `rows` rows from m on, without W0, and passes over it.
  template <class Map, Along along, bool gradient>
  void compute(int64_t m, int64_t rows, const float* h, Span<float> out) {
    gemm(
        rows, lanes, f_.R, h, f_.sq, (const float*)z.at(0, f_.R * MAPPED_DEPTH), MAPPED_DEPTH,
        tile.at(0, rows * MAPPED_DEPTH), MAPPED_DEPTH, false);
    for (int64_t k = 0, n; k < rows; k += n) {
      const int64_t i = (m + k) / f_.nq, j = (m + k) % f_.nq;
      n = std::min(rows - k, f_.nq - j);
      float* to = nullptr;
      if constexpr (along == Along::p) to = out.at(i * MAPPED_DEPTH, MAPPED_DEPTH);
      if constexpr (along == Along::q) to = out.at(j * MAPPED_DEPTH, n * MAPPED_DEPTH);
      map_rows<Map, along, gradient>(
          tile.at(k * MAPPED_DEPTH, n * MAPPED_DEPTH), n,
          f_.base.data ? f_.base.data + i * f_.base.s0 + j * f_.base.s1 : nullptr, f_.base.s1,
          p.at(i * MAPPED_DEPTH, MAPPED_DEPTH), q.at(j * MAPPED_DEPTH, n * MAPPED_DEPTH), to, lanes);
    }
  }

  // Writes lanes to the rows of a result.
  void store(Span<const float> from, float* to, int64_t features) const {
    pack(from.at(0, features * MAPPED_DEPTH), 1, MAPPED_DEPTH, to + first * features, features, count, features);
  }

  const Scratch<float> z, p, q, tile;
  int64_t first = 0, count = 0, lanes = 0;

 private:
  const Mapped& f_;
};

// y, of f with x and without g.
template <class Map>
void apply_mapped(const Mapped& f, float* y, int64_t workspace) {
  const int64_t O = f.outputs_first ? f.np : f.nq, tasks = ceil_div(f.B, MAPPED_DEPTH);
  const int64_t floats = MAPPED_DEPTH * (f.R + f.np + f.nq + O + MAPPED_ROWS);
  const int64_t together = std::max<int64_t>(1, workspace / 2 / int64_t(sizeof(float)) / floats);
  const int64_t grain = std::max(ceil_div(tasks, together), tasks_per_thread(tasks, f.multiplications()));
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    MappedChunk chunk(f);
    const Scratch<float> out(O * MAPPED_DEPTH);
    for (int64_t k = begin; k < end; ++k) {
      chunk.load(k * MAPPED_DEPTH, f.B);
      out.span().fill(0.f);
      f.for_tiles([&](int64_t m, int64_t rows, const float* h) {
        if (f.outputs_first) chunk.compute<Map, Along::p, false>(m, rows, h, out);
        else chunk.compute<Map, Along::q, false>(m, rows, h, out);
      });
      chunk.store(out.span(), y, O);
    }
  });
}

// The gradients that are not null: dx, dz, dH (O, I, R) and dW0 (O, I).
struct MappedGrads {
  float *x, *z, *h, *base;
};

// The transposed head, (R, rows).
struct TransposedHead {
  explicit TransposedHead(const Mapped& f) : ld(packed_ld(f.rows())), memory(f.R * ld) {
    for (int64_t p = 0; p < f.np; ++p)
      pack(f.h + p * f.sp, 1, f.sq, memory.at(p * f.nq, (f.R - 1) * ld + f.nq), ld, f.R, f.nq);
  }

  int64_t ld;
  Scratch<float> memory;
};

// dx and dz of the instances b0 to b1, and their sums of dH and dW0, as rows (p, q).
template <class Map>
void grads_mapped_slice(
    const Mapped& f, int64_t b0, int64_t b1, const MappedGrads& to, const TransposedHead* head, Span<float> dh,
    Span<float> base) {
  constexpr int64_t D = MAPPED_DEPTH;
  const int64_t I = f.outputs_first ? f.nq : f.np;
  MappedChunk chunk(f);
  const Scratch<float> dx(to.x ? I * D : 0), dz(to.z ? f.R * D : 0);
  if (base) base.fill(0.f);
  for (int64_t b = b0; b < b1; b += D) {
    chunk.load(b, b1);
    dx.span().fill(0.f);
    f.for_tiles([&](int64_t m, int64_t rows, const float* h) {
      if (!to.x) chunk.compute<Map, Along::none, true>(m, rows, h, {});
      else if (f.outputs_first) chunk.compute<Map, Along::q, true>(m, rows, h, dx);
      else chunk.compute<Map, Along::p, true>(m, rows, h, dx);
      const float* const dp = chunk.tile.at(0, rows * D);
      if (to.z)
        gemm(
            f.R, chunk.lanes, rows, (const float*)head->memory.at(m, (f.R - 1) * head->ld + rows), head->ld, dp, D,
            dz.at(0, f.R * D), D, m > 0);
      for (int64_t r = 0; to.h && r < f.R; r += MAPPED_COLUMNS)
        gemm(
            rows, std::min(MAPPED_COLUMNS, f.R - r), chunk.count, dp, D, f.z.row(b) + r, f.z.instance,
            dh.at(m * f.R + r, rows * f.R - r), f.R, b > b0);
      if (to.base)
        for (int64_t k = 0; k < rows; ++k) *base.at(m + k, 1) += sum(dp + k * D, chunk.count);
    });
    if (to.x) chunk.store(dx.span(), to.x, I);
    if (to.z) chunk.store(dz.span(), to.z, f.R);
  }
}

// to[o,i] = Σ_s sums[s][p,q], for rows of `n` numbers.
inline void sum_slices(const Mapped& f, Span<const float> sums, int64_t slices, int64_t n, float* to) {
  const int64_t I = f.outputs_first ? f.nq : f.np, total = f.rows() * n;
  at::parallel_for(0, f.rows(), ceil_div(1 << 15, n), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t p = m / f.nq, q = m % f.nq;
      float* const row = to + (f.outputs_first ? p * I + q : q * I + p) * n;
      copy(sums.at(m * n, n), row, n);
      for (int64_t s = 1; s < slices; ++s) {
        const float* const addend = sums.at(s * total + m * n, n);
        for (int64_t k = 0; k < n; ++k) row[k] += addend[k];
      }
    }
  });
}

// The gradients of f with x and g. Slices of instances depend on sizes only, so that results do not depend on the
// number of threads.
template <class Map>
void grads_mapped(const Mapped& f, const MappedGrads& to, int64_t workspace) {
  const int64_t floats = workspace / int64_t(sizeof(float)), numbers = f.rows() * f.R;
  const int64_t fit = std::clamp<int64_t>(floats / 4 / numbers, 1, MAPPED_SLICES);
  const int64_t chunks = ceil_div(f.B, MAPPED_DEPTH);
  const int64_t slices = std::bit_floor(uint64_t(std::min(chunks, fit)));
  const std::optional<TransposedHead> head = to.z ? std::optional<TransposedHead>(f) : std::nullopt;
  const Scratch<float> dh(to.h ? slices * numbers : 0), base(to.base ? slices * f.rows() : 0);
  const int64_t each = MAPPED_DEPTH * (2 * (f.R + f.np + f.nq) + MAPPED_ROWS);
  const int64_t together = std::max<int64_t>(1, floats / 4 / each);
  const int64_t grain = std::max(ceil_div(slices, together), tasks_per_thread(slices, f.multiplications()));
  at::parallel_for(0, slices, grain, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const Range own = share(chunks, s, slices);
      grads_mapped_slice<Map>(
          f, own.begin * MAPPED_DEPTH, std::min(f.B, own.end * MAPPED_DEPTH), to, head ? &*head : nullptr,
          to.h ? dh.subspan(s * numbers, numbers) : Span<float>(),
          to.base ? base.subspan(s * f.rows(), f.rows()) : Span<float>());
    }
  });
  if (to.h) sum_slices(f, dh.span(), slices, f.R, to.h);
  if (to.base) sum_slices(f, base.span(), slices, 1, to.base);
}

}  // namespace fasthyper
