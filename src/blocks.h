/* Blocks: the grid a tensor is cut into, and the work of one cell of it.
 *
 * A tensor (N, C, S) is cut into groups of channels times blocks of positions. The grid follows
 * from the shape alone, never from the number of threads, and a cell's sums go to a place of
 * their own, so the bits of a result do not depend on who computed which cell.
 *
 *   rows     S > 1: each channel has contiguous rows of S values
 *   columns  S = 1: channels lie side by side
 */
#ifndef BNCORE_BLOCKS_H
#define BNCORE_BLOCKS_H

#include "maps.h"
#include "sums.h"

namespace bncore {

constexpr ptrdiff_t kMaxWidth = 512;    // channels in a group of columns
constexpr ptrdiff_t kMaxRowsWidth = 16; // channels in a group of rows
constexpr ptrdiff_t kPad = 16;          // elements beyond a per-channel array's end

inline ptrdiff_t clamp(ptrdiff_t v, ptrdiff_t low, ptrdiff_t high) {
  return v > high ? high : v < low ? low : v;
}

struct Grid {
  ptrdiff_t outer, channels, inner;         // N, C, S
  ptrdiff_t width, groups;                  // channels in a group; groups
  ptrdiff_t segment, segments, positions;   // elements of a row taken at once; N * segments
  ptrdiff_t blocks;                         // parts of the positions
  bool columns;

  ptrdiff_t first_channel(ptrdiff_t group) const { return group * width; }
  ptrdiff_t last_channel(ptrdiff_t group) const {
    ptrdiff_t last = (group + 1) * width;
    return last < channels ? last : channels;
  }
  ptrdiff_t first_position(ptrdiff_t block) const { return positions * block / blocks; }
  ptrdiff_t group_size() const { return outer * width * inner; } // elements

  /* Cut for a given width: groups, segments, and blocks of about `cell` bytes. */
  void cut(ptrdiff_t itemsize, ptrdiff_t cell, ptrdiff_t max_blocks) {
    if (width > channels) width = channels;
    groups = (channels + width - 1) / width;
    segment = clamp(inner, 1, itemsize == 8 ? kChunk<double> : 8192);
    segments = (inner + segment - 1) / segment;
    positions = outer * segments;
    blocks = clamp(group_size() * itemsize / cell, 1, max_blocks < positions ? max_blocks : positions);
  }
};

/* The grid for sums. Rows take as many channels at a time as give a page of contiguous memory;
 * columns as many as keep a group in the cache, if that is four cache lines of them or more. */
inline Grid sum_grid(ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, ptrdiff_t itemsize) {
  constexpr ptrdiff_t page = 4096, cell = 256 * 1024, cached = 512 * 1024, max_blocks = 64;
  Grid grid = {};
  grid.outer = outer, grid.channels = channels, grid.inner = inner;
  grid.columns = inner == 1;
  if (grid.columns) {
    grid.width = clamp(cached / (outer * itemsize) / 64 * 64, 0, kMaxWidth);
    if (grid.width == 0) grid.width = kMaxWidth;
  } else {
    grid.width = clamp((page + inner * itemsize - 1) / (inner * itemsize), 1, kMaxRowsWidth);
  }
  grid.cut(itemsize, cell, max_blocks);
  return grid;
}

/* The grid for maps alone: no sums to keep together, so cells are as contiguous as can be. */
inline Grid map_grid(ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, ptrdiff_t itemsize) {
  Grid grid = {};
  grid.outer = outer, grid.channels = channels, grid.inner = inner;
  grid.columns = inner == 1;
  grid.width = kMaxWidth;
  grid.cut(itemsize, 128 * 1024, outer * inner);
  return grid;
}

/* x[n, c, s] = data[n * n_stride + c * c_stride + s] */
template <class T> struct View {
  T* data;
  ptrdiff_t n_stride, c_stride;
  T* at(ptrdiff_t n, ptrdiff_t c) const { return data + n * n_stride + c * c_stride; }
};

/* What is applied after gamma and beta. */
struct Epilogue {
  int activation; // 0 none, 1 clip to [a, b], 2 slope a below zero
  double a, b;
};

/* ------------------------------------------------------------------------------------- sums */

/* Terms of a forward pass: deviations from a shift per channel. */
template <class T> struct MomentTerms {
  View<const T> x;
  const double* shift;

  Deviations<T> row(ptrdiff_t n, ptrdiff_t c, ptrdiff_t s) const {
    return {x.at(n, c) + s, shift[c]};
  }
  ColumnDeviations<T> column(ptrdiff_t n, ptrdiff_t c) const {
    return {x.at(n, c), x.n_stride, shift + c};
  }
};

/* Terms of a backward pass: dy and dy (x - mean). */
template <class T> struct BackwardTerms {
  View<const T> dy, x;
  const double* mean;
  const double* mean_lo;

  GradientTerms<T> row(ptrdiff_t n, ptrdiff_t c, ptrdiff_t s) const {
    return {dy.at(n, c) + s, x.at(n, c) + s, mean[c], mean_lo[c]};
  }
  ColumnGradientTerms<T> column(ptrdiff_t n, ptrdiff_t c) const {
    return {dy.at(n, c), dy.n_stride, x.at(n, c), x.n_stride, mean + c, mean_lo + c};
  }
};

/* sums[c - first channel] of one cell, rows. */
template <class T, class Terms>
inline void sum_rows(const Grid& grid, const Terms& terms, ptrdiff_t n_stride, ptrdiff_t first,
                     ptrdiff_t last, ptrdiff_t block, SumPair* sums) {
  Accumulator accumulators[kMaxRowsWidth];
  for (ptrdiff_t c = 0; c < last - first; ++c) accumulators[c] = Accumulator();
  ptrdiff_t filled = 0;
  const ptrdiff_t end = grid.first_position(block + 1);
  for (ptrdiff_t t = grid.first_position(block); t < end; ++t) {
    const ptrdiff_t n = t / grid.segments, s = t % grid.segments * grid.segment;
    const ptrdiff_t length = grid.inner - s < grid.segment ? grid.inner - s : grid.segment;
    for (ptrdiff_t c = first; c < last; ++c)
      add_row(terms.row(n, c, s), length, 2 * n_stride, &accumulators[c - first]);
    filled += length;
    if (filled < kChunk<T> && t + 1 < end) continue;
    for (ptrdiff_t c = 0; c < last - first; ++c) {
      accumulators[c].fold_into(&sums[c]);
      accumulators[c] = Accumulator();
    }
    filled = 0;
  }
}

/* sums[c - first channel] of one cell, columns. */
template <class T, class Terms>
inline void sum_columns(const Grid& grid, const Terms& terms, ptrdiff_t first, ptrdiff_t last,
                        ptrdiff_t block, SumPair* sums) {
  constexpr ptrdiff_t chunk = kChunk<T> / (4 * kTreeRows); // a chain of additions in one lane
  const ptrdiff_t channels = last - first, end = grid.first_position(block + 1);
  for (ptrdiff_t n = grid.first_position(block); n < end; n += chunk) {
    double one[kMaxWidth + kPad], two[kMaxWidth + kPad];
    std::memset(one, 0, (channels + kPad) * sizeof(double));
    std::memset(two, 0, (channels + kPad) * sizeof(double));
    const ptrdiff_t rows = end - n < chunk ? end - n : chunk;
    add_columns(terms.column(n, first), rows, channels, kTreeRows, one, two);
    for (ptrdiff_t c = 0; c < channels; ++c) {
      sums[c].first.add(one[c]);
      sums[c].second.add(two[c]);
    }
  }
}

template <class T, class Terms>
inline void sum_block(const Grid& grid, const Terms& terms, ptrdiff_t n_stride, ptrdiff_t group,
                      ptrdiff_t block, SumPair* partial) {
  const ptrdiff_t first = grid.first_channel(group), last = grid.last_channel(group);
  SumPair* sums = partial + block * grid.channels + first;
  std::memset(static_cast<void*>(sums), 0, (last - first) * sizeof(SumPair));
  if (grid.columns) sum_columns<T>(grid, terms, first, last, block, sums);
  else sum_rows<T>(grid, terms, n_stride, first, last, block, sums);
}

template <class T>
inline void moments_block(const Grid& grid, View<const T> x, const double* shift, ptrdiff_t group,
                          ptrdiff_t block, SumPair* partial) {
  sum_block<T>(grid, MomentTerms<T>{x, shift}, x.n_stride, group, block, partial);
}

template <class T>
inline void reduce_block(const Grid& grid, View<const T> dy, View<const T> x, const double* mean,
                         const double* mean_lo, ptrdiff_t group, ptrdiff_t block,
                         SumPair* partial) {
  sum_block<T>(grid, BackwardTerms<T>{dy, x, mean, mean_lo}, x.n_stride, group, block, partial);
}

/* The moments' sums of one channel about another shift, over all blocks. */
template <class T>
inline SumPair moments_again(const Grid& grid, View<const T> x, double shift, ptrdiff_t channel) {
  SumPair total = {};
  double shifts[kPad] = {shift};
  const View<const T> at_channel = {x.data + channel * x.c_stride, x.n_stride, x.c_stride};
  for (ptrdiff_t block = 0; block < grid.blocks; ++block) {
    SumPair sums = {};
    const MomentTerms<T> terms = {at_channel, shifts};
    if (grid.columns) sum_columns<T>(grid, terms, 0, 1, block, &sums);
    else sum_rows<T>(grid, terms, x.n_stride, 0, 1, block, &sums);
    add(&total, sums);
  }
  return total;
}

/* A value near the channel's mean: its first, for float64 moved by seven others spread over it.
 * A constant channel gives the constant itself. */
template <class T>
inline double pilot(const Grid& grid, View<const T> x, ptrdiff_t channel) {
  const double start = Element<T>::wide(*x.at(0, channel));
  const ptrdiff_t count = grid.outer * grid.inner;
  if (sizeof(T) < sizeof(double) || count < 8) return start;
  double moved = 0;
  for (ptrdiff_t i = 1; i < 8; ++i) {
    const ptrdiff_t at = count / 8 * i;
    moved += Element<T>::wide(x.at(at / grid.inner, channel)[at % grid.inner]) - start;
  }
  const double guess = start + 0.125 * moved;
  return guess - guess == 0 ? guess : start;
}

/* ------------------------------------------------------------------------------------- maps */

/* A channel's coefficients: mean_hi, mean_lo, scale, offset, unit for y (see maps.h); mean_hi,
 * mean_lo, shift_hi, shift_lo, slope, scale for dx. */
constexpr int kCoefficients = 6;

template <class T> struct CoefficientTable {
  typename Element<T>::Real row[kCoefficients][kMaxWidth + kPad];
};

template <class T> inline void split(double v, typename Element<T>::Real* hi,
                                     typename Element<T>::Real* lo, double lower = 0) {
  *hi = static_cast<typename Element<T>::Real>(v);
  *lo = static_cast<typename Element<T>::Real>((v - *hi) + lower);
}

/* Pick a coefficient: for a row the channel's own value, for columns the array from c0 on. */
template <class T> struct PickUniform {
  template <class U> using Coefficient = Uniform<U>;
  const CoefficientTable<T>& table;
  ptrdiff_t c;
  Uniform<T> operator()(int which) const { return {table.row[which][c]}; }
};

template <class T> struct PickPerChannel {
  template <class U> using Coefficient = PerChannel<U>;
  const CoefficientTable<T>& table;
  PerChannel<T> operator()(int which) const { return {table.row[which]}; }
};

/* Walk the rows of one cell backwards: what was summed last is still nearest. */
template <class T, class RowWriter>
inline void for_rows(const Grid& grid, ptrdiff_t group, ptrdiff_t block, const RowWriter& write) {
  const ptrdiff_t first = grid.first_channel(group), last = grid.last_channel(group);
  const ptrdiff_t begin = grid.first_position(block);
  for (ptrdiff_t t = grid.first_position(block + 1) - 1; t >= begin; --t) {
    if (grid.columns) {
      write.columns(t, first, last - first);
      continue;
    }
    const ptrdiff_t n = t / grid.segments, s = t % grid.segments * grid.segment;
    const ptrdiff_t length = grid.inner - s < grid.segment ? grid.inner - s : grid.segment;
    for (ptrdiff_t c = first; c < last; ++c) write.row(n, c, c - first, s, length);
  }
}

template <class T, class Activation, bool Residual, bool Scaled, bool Stream>
struct NormalizeWriter {
  View<const T> x, residual;
  View<T> y;
  const CoefficientTable<T>& table;
  Activation activation;

  template <class Pick>
  void write(const Pick& pick, ptrdiff_t n, ptrdiff_t c, ptrdiff_t s, ptrdiff_t length) const {
    const T* more = Residual ? residual.at(n, c) + s : nullptr;
    const Normalize<T, Pick::template Coefficient, Activation, Residual, Scaled> map = {
        x.at(n, c) + s, more, pick(0), pick(1), pick(2), pick(3), pick(4), activation};
    write_row<Stream>(map, y.at(n, c) + s, length);
  }
  void row(ptrdiff_t n, ptrdiff_t c, ptrdiff_t at, ptrdiff_t s, ptrdiff_t length) const {
    write(PickUniform<T>{table, at}, n, c, s, length);
  }
  void columns(ptrdiff_t n, ptrdiff_t c, ptrdiff_t channels) const {
    write(PickPerChannel<T>{table}, n, c, 0, channels);
  }
};

template <class T, bool Stream> struct GradientWriter {
  View<const T> dy, x;
  View<T> dx;
  const CoefficientTable<T>& table;
  bool fixed;

  template <class Pick>
  void write(const Pick& pick, ptrdiff_t n, ptrdiff_t c, ptrdiff_t s, ptrdiff_t length) const {
    if (fixed) {
      const FixedGradient<T, Pick::template Coefficient> map = {dy.at(n, c) + s, pick(5)};
      write_row<Stream>(map, dx.at(n, c) + s, length);
      return;
    }
    const Gradient<T, Pick::template Coefficient> map = {
        dy.at(n, c) + s, x.at(n, c) + s, pick(0), pick(1), pick(2), pick(3), pick(4), pick(5)};
    write_row<Stream>(map, dx.at(n, c) + s, length);
  }
  void row(ptrdiff_t n, ptrdiff_t c, ptrdiff_t at, ptrdiff_t s, ptrdiff_t length) const {
    write(PickUniform<T>{table, at}, n, c, s, length);
  }
  void columns(ptrdiff_t n, ptrdiff_t c, ptrdiff_t channels) const {
    write(PickPerChannel<T>{table}, n, c, 0, channels);
  }
};

/* Per-channel arrays of a map over the whole tensor; null pointers stand for 0, 1, 0 and none. */
struct NormalizeParameters {
  const double *mean, *mean_lo, *inv_std, *gamma, *beta;
};

/* The coefficients of a group's channels; true where a channel needs the power of two. */
template <class T>
inline bool normalize_coefficients(const NormalizeParameters& p, ptrdiff_t first, ptrdiff_t last,
                                   CoefficientTable<T>* table) {
  typedef typename Element<T>::Real Real;
  bool scaled = false;
  for (ptrdiff_t c = first; c < last; ++c) {
    const ptrdiff_t i = c - first;
    const double scale = p.gamma ? p.gamma[c] * p.inv_std[c] : p.inv_std[c];
    const double lower = p.mean_lo ? p.mean_lo[c] : 0;
    split<T>(p.mean[c], &table->row[0][i], &table->row[1][i], lower);
    table->row[2][i] = static_cast<Real>(scale);
    table->row[3][i] = static_cast<Real>(p.beta ? p.beta[c] : 0);
    table->row[4][i] = 1;
  }
  return scaled;
}

template <class T, class Activation, bool Residual, bool Scaled>
inline void normalize_cell(const Grid& grid, View<const T> x, View<const T> residual, View<T> y,
                           const CoefficientTable<T>& table, Activation activation, bool stream,
                           ptrdiff_t group, ptrdiff_t block) {
  if (stream) {
    const NormalizeWriter<T, Activation, Residual, Scaled, true> write = {x, residual, y, table,
                                                                         activation};
    for_rows<T>(grid, group, block, write);
  } else {
    const NormalizeWriter<T, Activation, Residual, Scaled, false> write = {x, residual, y, table,
                                                                          activation};
    for_rows<T>(grid, group, block, write);
  }
}

template <class T>
inline void normalize_block(const Grid& grid, View<const T> x, View<const T> residual, View<T> y,
                            const NormalizeParameters& p, Epilogue epilogue, bool stream,
                            ptrdiff_t group, ptrdiff_t block) {
  typedef typename Element<T>::Real Real;
  CoefficientTable<T> table;
  const bool scaled =
      normalize_coefficients<T>(p, grid.first_channel(group), grid.last_channel(group), &table);
  const Clip<T> clip = {static_cast<Real>(epilogue.a), static_cast<Real>(epilogue.b)};
  const LeakyRelu<T> leaky = {static_cast<Real>(epilogue.a)};
#define BNCORE_CELL(activation, with_residual, with_scale)                                        \
  normalize_cell<T, decltype(activation), with_residual, with_scale>(                             \
      grid, x, residual, y, table, activation, stream, group, block)
  if (residual.data) {
    if (epilogue.activation == 1) BNCORE_CELL(clip, true, true);
    else if (epilogue.activation == 2) BNCORE_CELL(leaky, true, true);
    else BNCORE_CELL(Identity<T>(), true, true);
  } else {
    if (epilogue.activation == 1) BNCORE_CELL(clip, false, true);
    else if (epilogue.activation == 2) BNCORE_CELL(leaky, false, true);
    else if (scaled) BNCORE_CELL(Identity<T>(), false, true);
    else BNCORE_CELL(Identity<T>(), false, false);
  }
#undef BNCORE_CELL
  if (stream) stream_fence();
}

/* Per-channel arrays of the gradient: sums hold sum dy and sum dy x'; null sums mean that the
 * statistics were constants. */
struct GradientParameters {
  const double *mean, *mean_lo, *inv_std, *gamma, *sum_dy, *sum_dy_xhat;
  double count;
};

template <class T>
inline void gradient_block(const Grid& grid, View<const T> dy, View<const T> x, View<T> dx,
                           const GradientParameters& p, bool stream, ptrdiff_t group,
                           ptrdiff_t block) {
  typedef typename Element<T>::Real Real;
  CoefficientTable<T> table;
  const ptrdiff_t first = grid.first_channel(group), last = grid.last_channel(group);
  for (ptrdiff_t c = first; c < last; ++c) {
    const ptrdiff_t i = c - first;
    table.row[5][i] = static_cast<Real>(p.gamma ? p.gamma[c] * p.inv_std[c] : p.inv_std[c]);
    if (!p.sum_dy) continue;
    split<T>(p.mean[c], &table.row[0][i], &table.row[1][i], p.mean_lo ? p.mean_lo[c] : 0);
    split<T>(p.sum_dy[c] / p.count, &table.row[2][i], &table.row[3][i]);
    table.row[4][i] = static_cast<Real>(p.inv_std[c] * p.sum_dy_xhat[c] / p.count);
  }
  if (stream) {
    for_rows<T>(grid, group, block, GradientWriter<T, true>{dy, x, dx, table, !p.sum_dy});
    stream_fence();
  } else {
    for_rows<T>(grid, group, block, GradientWriter<T, false>{dy, x, dx, table, !p.sum_dy});
  }
}

} // namespace bncore

#endif
