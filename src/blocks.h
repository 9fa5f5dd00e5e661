/* Blocks: the grid a tensor is cut into, and the work of one cell of it.
 *
 * A tensor (N, C, S) is cut into groups of channels times blocks of positions. The grid follows
 * from the shape alone, never from the number of threads, and a cell's sums go to a place of
 * their own, so the bits of a result do not depend on who computed which cell.
 *
 *   rows     each channel has contiguous rows of S values; a row is summed into one accumulator
 *   columns  channels lie side by side (S = 1), or planes so small that a group of them is taken
 *            as one line of memory: every place on the line has an accumulator of its own, and
 *            places of one channel are folded at the end. Lines shorter than a few vectors are
 *            taken several at a time.
 */
#ifndef BNCORE_BLOCKS_H
#define BNCORE_BLOCKS_H

#include <atomic>
#include <cfloat>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "maps.h"
#include "sums.h"

namespace bncore {

constexpr ptrdiff_t kMaxLine = 1024;     // places on a line of columns, half for float64
constexpr ptrdiff_t kSumLine = 512;      // the same where they are summed
constexpr ptrdiff_t kMaxRowsWidth = 16;  // channels in a group of rows
constexpr ptrdiff_t kPacked = 128;       // below this, rows or lines come without gaps between
constexpr ptrdiff_t kPad = 16;           // elements beyond a per-place array's end

inline ptrdiff_t clamp(ptrdiff_t v, ptrdiff_t low, ptrdiff_t high) {
  return v > high ? high : v < low ? low : v;
}

/* Tables of coefficients live on the stacks of threads, which may be as small as 128 KB. */
constexpr ptrdiff_t max_line(ptrdiff_t itemsize) { return itemsize == 8 ? kMaxLine / 2 : kMaxLine; }

struct Grid {
  ptrdiff_t outer, channels, inner;       // N, C, S
  ptrdiff_t width, groups;                // channels in a group; groups
  ptrdiff_t segment, segments, positions; // elements of a row taken at once; N * segments
  ptrdiff_t blocks;                       // parts of the positions
  ptrdiff_t tile;                         // lines taken at once
  bool columns;

  ptrdiff_t first_channel(ptrdiff_t group) const { return group * width; }
  ptrdiff_t last_channel(ptrdiff_t group) const {
    ptrdiff_t last = (group + 1) * width;
    return last < channels ? last : channels;
  }
  /* Whether one group can be written while another is summed. */
  bool pairs(ptrdiff_t group, ptrdiff_t next) const {
    return !columns && next < groups && last_channel(group) - first_channel(group) == width &&
           last_channel(next) - first_channel(next) == width;
  }
  ptrdiff_t first_position(ptrdiff_t block) const { return positions * block / blocks; }
  ptrdiff_t group_size() const { return outer * width * inner; } // elements

  /* Cut for a given width: groups, segments, and blocks of about `cell` bytes. */
  void cut(ptrdiff_t itemsize, ptrdiff_t cell, ptrdiff_t max_blocks) {
    if (width > channels) width = channels;
    groups = (channels + width - 1) / width;
    segment = columns ? inner : clamp(inner, 1, itemsize == 8 ? kChunk<double> : 8192);
    segments = (inner + segment - 1) / segment;
    positions = outer * segments;
    if (max_blocks > positions) max_blocks = positions;
    blocks = clamp(group_size() * itemsize / cell, 1, max_blocks);
  }
};

/* Whether planes are so small, and so many to a channel, that columns serve them better. */
inline bool has_small_planes(ptrdiff_t outer, ptrdiff_t inner) {
  return inner > 1 && inner < kPacked && outer >= kStripRows;
}

/* The grid for sums. Rows take as many channels at a time as give a page of contiguous memory;
 * columns a line as long as the accumulators' cache bears. */
inline Grid sum_grid(ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, ptrdiff_t itemsize) {
  constexpr ptrdiff_t page = 4096, cell = 256 * 1024, cached = 1 << 20, max_blocks = 64;
  Grid grid = {};
  grid.outer = outer, grid.channels = channels, grid.inner = inner, grid.tile = 1;
  if (has_small_planes(outer, inner)) {
    grid.columns = true;
    grid.width = kSumLine / inner;
  } else if (inner == 1) {
    grid.columns = true;
    /* Columns that stay in a cache are shared out without a barrier, others read in long lines. */
    const bool small = outer * channels * itemsize <= cached;
    grid.width = small ? kPacked / 2 : kSumLine;
    if (channels < kPacked / 2) grid.tile = kSumLine / 2 / channels;
  } else {
    grid.width = clamp((page + inner * itemsize - 1) / (inner * itemsize), 1, kMaxRowsWidth);
  }
  grid.cut(itemsize, cell, max_blocks);
  return grid;
}

/* Lines to take at once: as many as make a line of 16 vectors, of whole vectors if may be. */
inline ptrdiff_t line_tile(ptrdiff_t channels, ptrdiff_t itemsize) {
  const ptrdiff_t enough = (256 + channels - 1) / channels;
  ptrdiff_t whole = 16;
  for (ptrdiff_t c = channels; c % 2 == 0 && whole > 1; c /= 2) whole /= 2;
  return clamp((enough + whole - 1) / whole * whole, 1, max_line(itemsize) / channels);
}

/* The grid for maps alone: no sums to keep together, so cells are as contiguous as can be. */
inline Grid map_grid(ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, ptrdiff_t itemsize) {
  const ptrdiff_t cell = (inner == 1 ? 512 : 128) * 1024; // columns have a table to fill
  Grid grid = {};
  grid.outer = outer, grid.channels = channels, grid.inner = inner, grid.tile = 1;
  if (has_small_planes(outer, inner)) {
    grid.columns = true;
    grid.width = max_line(itemsize) / inner;
  } else if (inner == 1) {
    grid.columns = true;
    grid.width = max_line(itemsize);
    if (channels < kPacked) grid.tile = line_tile(channels, itemsize);
  } else {
    grid.width = clamp(cell / (inner * itemsize), 1, max_line(itemsize));
  }
  grid.cut(itemsize, cell, outer * inner);
  return grid;
}

/* x[n, c, s] = data[n * n_stride + c * c_stride + s] */
template <class T> struct View {
  T* data;
  ptrdiff_t n_stride, c_stride;
  T* at(ptrdiff_t n, ptrdiff_t c) const { return data + n * n_stride + c * c_stride; }
};

/* A value per place of a line from a value per channel: each channel's repeated `inner` times,
 * the whole `tile` times. */
template <class Real, class ValueOfChannel>
inline void fill_line(const Grid& grid, ptrdiff_t channels, const ValueOfChannel& value,
                      Real* line) {
  const ptrdiff_t repeat = grid.columns ? grid.inner : 1, places = channels * repeat;
  for (ptrdiff_t c = 0; repeat == 1 && c < channels; ++c) line[c] = static_cast<Real>(value(c));
  for (ptrdiff_t c = 0; repeat > 1 && c < channels; ++c) {
    const Real v = static_cast<Real>(value(c));
    for (ptrdiff_t s = 0; s < repeat; ++s) line[c * repeat + s] = v;
  }
  for (ptrdiff_t i = places; i < grid.tile * places; ++i) line[i] = line[i - places];
}

/* Coefficients of a group, one per channel (rows) or per place of a line (columns). For y they
 * are mean_hi, mean_lo, scale, offset and unit; for dx mean_hi, mean_lo, shift_hi, shift_lo,
 * slope, scale and unit; for dz mean_hi, mean_lo, gate_scale, gate_offset and unit. */
enum {
  kMeanHi, kMeanLo, kScale, kOffset, kShiftHi = kOffset, kShiftLo, kSlope, kUnit, kGateScale,
  kGateOffset, kRows
};

template <class T> struct CoefficientTable {
  alignas(64) typename Element<T>::Real row[kRows][max_line(sizeof(T)) + kPad];
};

/* A coefficient as a map takes it. */
template <class T> struct PickUniform {
  template <class U> using Coefficient = Uniform<U>;
  const CoefficientTable<T>* table;
  ptrdiff_t c;
  Uniform<T> operator()(int which) const { return {table->row[which][c]}; }
};

template <class T> struct PickPerPlace {
  template <class U> using Coefficient = PerPlace<U>;
  const CoefficientTable<T>* table;
  PerPlace<T> operator()(int which) const { return {table->row[which]}; }
};

/* ------------------------------------------------------------------------------------- sums */

/* The two sums of every channel of a block, in twofold form: four rows of C values. */
struct SumTable {
  double *first, *first_lo, *second, *second_lo;

  static SumTable of(double* partial, ptrdiff_t block, ptrdiff_t channels) {
    double* row = partial + block * 4 * channels;
    return {row, row + channels, row + 2 * channels, row + 3 * channels};
  }
  void clear(ptrdiff_t begin, ptrdiff_t end) const {
    for (double* row : {first, first_lo, second, second_lo})
      std::memset(row + begin, 0, (end - begin) * sizeof(double));
  }
};

/* Terms of a forward pass: deviations from a shift per channel. Scaled: of x times a power of two
 * per channel, from a shift that is multiplied already. */
template <class T, bool Scaled = false> struct MomentTerms {
  View<const T> x;
  const double* shift;
  const double* unit;

  void lines(const Grid& grid, ptrdiff_t first, ptrdiff_t last, double* one, double* two) const {
    fill_line(grid, last - first, [&](ptrdiff_t c) { return shift[first + c]; }, one);
    if (Scaled) fill_line(grid, last - first, [&](ptrdiff_t c) { return unit[first + c]; }, two);
  }
  Deviations<T, Scaled> row(ptrdiff_t n, ptrdiff_t c, ptrdiff_t s) const {
    return {x.at(n, c) + s, shift[c], Scaled ? unit[c] : 1};
  }
  ColumnDeviations<T, Scaled> column(ptrdiff_t n, ptrdiff_t c, ptrdiff_t tile,
                                     const double* shifts, const double* units) const {
    return {x.at(n, c), x.n_stride * tile, shifts, units};
  }
};

/* Where dz of a backward pass comes from: from dy alone, or through an activation. */
template <class T> struct PlainGradient {
  View<const T> dy;

  Strides strides() const { return {dy.n_stride, 0, 0}; }
  template <class Pick> auto source(const Pick&, ptrdiff_t n, ptrdiff_t c, ptrdiff_t s) const {
    return PlainSource<T>{dy.at(n, c) + s};
  }
};

template <class T, bool Residual> struct GatedGradient {
  View<const T> dy, x, residual;
  Gate<T> gate;

  Strides strides() const { return {dy.n_stride, x.n_stride, residual.n_stride}; }
  template <class Pick> auto source(const Pick& pick, ptrdiff_t n, ptrdiff_t c, ptrdiff_t s) const {
    return GatedSource<T, Pick::template Coefficient, Residual>{
        dy.at(n, c) + s,
        {x.at(n, c) + s, Residual ? residual.at(n, c) + s : nullptr, pick(kMeanHi), pick(kMeanLo),
         pick(kGateScale), pick(kGateOffset), pick(kUnit)},
        gate};
  }
};

/* Terms of a backward pass: dz and dz (x - mean). The table is that of a group from channel
 * `begin` on. */
template <class T, class From> struct BackwardTerms {
  From from;
  View<const T> x;
  const double* mean;
  const double* mean_lo;
  const CoefficientTable<T>* table;
  ptrdiff_t begin;

  void lines(const Grid& grid, ptrdiff_t first, ptrdiff_t last, double* one, double* two) const {
    fill_line(grid, last - first, [&](ptrdiff_t c) { return mean[first + c]; }, one);
    fill_line(grid, last - first, [&](ptrdiff_t c) { return mean_lo[first + c]; }, two);
  }
  auto row(ptrdiff_t n, ptrdiff_t c, ptrdiff_t s) const {
    const auto source = from.source(PickUniform<T>{table, c - begin}, n, c, s);
    return GradientTerms<T, decltype(source)>{source, x.at(n, c) + s, mean[c], mean_lo[c]};
  }
  auto column(ptrdiff_t n, ptrdiff_t c, ptrdiff_t tile, const double* means,
              const double* means_lo) const {
    const auto source = from.source(PickPerPlace<T>{table}, n, c, 0);
    const Strides one = from.strides();
    return ColumnGradientTerms<T, decltype(source)>{
        source, x.at(n, c), {one.dy * tile, x.n_stride * tile, one.residual * tile}, means,
        means_lo};
  }
};

/* The piece of a row at a position. */
struct Piece {
  ptrdiff_t n, s, length;

  static Piece at(const Grid& grid, ptrdiff_t position) {
    const ptrdiff_t s = position % grid.segments * grid.segment, rest = grid.inner - s;
    return {position / grid.segments, s, rest < grid.segment ? rest : grid.segment};
  }
};

/* How far ahead a row is fetched. Prefetchers follow a long row by themselves once told where it
 * goes on; of short ones the next row is fetched. */
template <class T> inline ptrdiff_t ahead_of(const Grid& grid, ptrdiff_t n_stride) {
  const ptrdiff_t row_bytes = grid.inner * static_cast<ptrdiff_t>(sizeof(T));
  return row_bytes >= 8192 ? 2048 / static_cast<ptrdiff_t>(sizeof(T)) : n_stride;
}

/* End a chunk of channel c: its accumulator goes to the sums. */
inline void flush(Accumulator* accumulator, SumTable sums, ptrdiff_t c) {
  two_sum(accumulator->first_total(), &sums.first[c], &sums.first_lo[c]);
  two_sum(accumulator->second_total(), &sums.second[c], &sums.second_lo[c]);
  *accumulator = Accumulator();
}

/* Rows of one cell, into sums[first..last). */
template <class T, class Terms>
inline void sum_rows(const Grid& grid, const Terms& terms, ptrdiff_t n_stride, ptrdiff_t first,
                     ptrdiff_t last, ptrdiff_t block, SumTable sums) {
  const ptrdiff_t ahead = ahead_of<T>(grid, n_stride), end = grid.first_position(block + 1);
  if (grid.positions == 1) { // nothing to keep from one row of a channel to the next
    for (ptrdiff_t c = first; c < last; ++c) {
      Accumulator accumulator = {};
      add_row(terms.row(0, c, 0), grid.inner, ahead, &accumulator);
      flush(&accumulator, sums, c);
    }
    return;
  }
  Accumulator accumulators[kMaxRowsWidth];
  for (ptrdiff_t c = first; c < last; ++c) accumulators[c - first] = Accumulator();
  ptrdiff_t filled = 0;
  for (ptrdiff_t t = grid.first_position(block); t < end; ++t) {
    const Piece piece = Piece::at(grid, t);
    for (ptrdiff_t c = first; c < last; ++c)
      add_row(terms.row(piece.n, c, piece.s), piece.length, ahead, &accumulators[c - first]);
    filled += piece.length;
    if (filled < kChunk<T> && t + 1 < end) continue;
    filled = 0;
    for (ptrdiff_t c = first; c < last; ++c) flush(&accumulators[c - first], sums, c);
  }
}

/* Add the places of a line, folded by channel, to sums[first..last). */
inline void fold_line(const Grid& grid, ptrdiff_t first, ptrdiff_t last, ptrdiff_t tile,
                      double* line, double* sum, double* sum_lo) {
  const ptrdiff_t channels = last - first, repeat = grid.inner, places = channels * repeat;
  for (ptrdiff_t i = places; i < tile * places; ++i) line[i % places] += line[i];
  for (ptrdiff_t c = 0; repeat > 1 && c < channels; ++c) {
    double total = 0;
    for (ptrdiff_t s = 0; s < repeat; ++s) total += line[c * repeat + s];
    line[c] = total;
  }
  for (ptrdiff_t c = 0; c < channels; ++c) two_sum(line[c], &sum[first + c], &sum_lo[first + c]);
}

/* Columns of one cell, into sums[first..last). */
template <class T, class Terms>
inline void sum_columns(const Grid& grid, const Terms& terms, ptrdiff_t first, ptrdiff_t last,
                        ptrdiff_t block, SumTable sums) {
  constexpr ptrdiff_t chain = kChunk<T> / 8; // rows summed before a fold
  double constants[2][kSumLine + kPad], line[2][kSumLine + kPad];
  terms.lines(grid, first, last, constants[0], constants[1]);
  const ptrdiff_t channels = last - first, end = grid.first_position(block + 1);
  ptrdiff_t n = grid.first_position(block);
  while (n < end) {
    /* Whole tiles first, then what is left line by line. */
    const ptrdiff_t tile = grid.tile <= end - n ? grid.tile : 1;
    const ptrdiff_t places = tile * channels * grid.inner;
    const ptrdiff_t lines = clamp((end - n) / tile, 1, chain);
    /* After a block's last line comes the neighbouring group, if there is one. */
    const bool done = n + lines * tile >= end;
    const bool is_last = done && grid.blocks == 1;
    const Ahead next = is_last ? Ahead{(lines - 1) / kStripRows * -kStripRows, places}
                               : Ahead{kStripRows, 0};
    std::memset(line[0], 0, (places + kPad) * sizeof(double));
    std::memset(line[1], 0, (places + kPad) * sizeof(double));
    add_columns(terms.column(n, first, tile, constants[0], constants[1]), lines, places, next,
                line[0], line[1]);
    fold_line(grid, first, last, tile, line[0], sums.first, sums.first_lo);
    fold_line(grid, first, last, tile, line[1], sums.second, sums.second_lo);
    n += lines * tile;
  }
}

template <class T, class Terms>
inline void sum_block(const Grid& grid, const Terms& terms, ptrdiff_t n_stride, ptrdiff_t group,
                      ptrdiff_t block, double* partial) {
  const ptrdiff_t first = grid.first_channel(group), last = grid.last_channel(group);
  const SumTable sums = SumTable::of(partial, block, grid.channels);
  sums.clear(first, last);
  if (grid.columns) sum_columns<T>(grid, terms, first, last, block, sums);
  else sum_rows<T>(grid, terms, n_stride, first, last, block, sums);
}

/* partial: (blocks, 4, C), see SumTable. */
template <class T>
inline void moments_block(const Grid& grid, View<const T> x, const double* shift, ptrdiff_t group,
                          ptrdiff_t block, double* partial) {
  sum_block<T>(grid, MomentTerms<T>{x, shift, nullptr}, x.n_stride, group, block, partial);
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

/* ------------------------------------------------------------------------------- statistics */

/* All blocks' sums of a group's channels, added in the blocks' order, into block 0's rows. */
inline SumTable merge_blocks(const Grid& grid, ptrdiff_t group, double* partial) {
  const ptrdiff_t first = grid.first_channel(group), last = grid.last_channel(group);
  const SumTable total = SumTable::of(partial, 0, grid.channels);
  for (ptrdiff_t block = 1; block < grid.blocks; ++block) {
    const SumTable more = SumTable::of(partial, block, grid.channels);
    for (ptrdiff_t c = first; c < last; ++c) {
      two_sum(more.first[c], &total.first[c], &total.first_lo[c]);
      total.first_lo[c] += more.first_lo[c];
      two_sum(more.second[c], &total.second[c], &total.second_lo[c]);
      total.second_lo[c] += more.second_lo[c];
    }
  }
  return total;
}

/* From a channel's sums about `shift`:
 *   offset = sum d / n     m2 = sum d^2 - (sum d)^2 / n     mean + mean_lo = shift + offset */
inline void centre(double first, double first_lo, double second, double second_lo, double shift,
                   double count, double* mean, double* mean_lo, double* m2) {
  const double offset = (first + first_lo) / count;
  const double squares = (second - first * offset) + (second_lo - first_lo * offset);
  /* Rounding may leave a constant channel just below zero; a NaN stays one. */
  *m2 = squares < 0 ? 0 : squares;
  const double total = shift + offset, taken = total - shift;
  *mean_lo = (shift - (total - taken)) + (offset - taken);
  *mean = total;
}

/* By what to multiply the deviations of a channel with these sums, lest their squares leave
 * float64's range; a NaN is left to itself. */
inline double unit_of_squares(double first, double second) {
  if (second > 0x1p-900 && second < 0x1p900) return 1;
  if (second >= 0x1p900 && first == first) return 0x1p-600;
  return second <= 0x1p-900 && first != 0 ? 0x1p600 : 1;
}

/* Take a group's sums again where a unit is not 1: into unit, sums and shift. */
template <class T>
inline void rescale(const Grid& grid, View<const T> x, double* partial, double* shift,
                    ptrdiff_t group, double* unit) {
  const ptrdiff_t first = grid.first_channel(group), last = grid.last_channel(group);
  const SumTable sums = SumTable::of(partial, 0, grid.channels);
  bool ordinary = true;
  for (ptrdiff_t c = first; c < last; ++c) {
    unit[c] = unit_of_squares(sums.first[c], sums.second[c]);
    ordinary &= unit[c] == 1;
  }
  if (ordinary) return;
  for (ptrdiff_t c = first; c < last; ++c) shift[c] *= unit[c];
  for (ptrdiff_t block = 0; block < grid.blocks; ++block)
    sum_block<T>(grid, MomentTerms<T, true>{x, shift, unit}, x.n_stride, group, block, partial);
  merge_blocks(grid, group, partial);
}

/* Moments of one channel from sums about its mean, near enough. */
template <class T, bool Scaled>
inline void centre_again(const Grid& grid, View<const T> x, ptrdiff_t c, double unit,
                         double* mean, double* mean_lo, double* m2) {
  Grid one = grid;
  one.width = one.channels = one.groups = one.tile = 1;
  const double near = *mean;
  const MomentTerms<T, Scaled> terms = {{x.data + c * x.c_stride, x.n_stride, x.c_stride}, &near,
                                        &unit};
  double again[4] = {};
  const SumTable total = {&again[0], &again[1], &again[2], &again[3]};
  for (ptrdiff_t block = 0; block < grid.blocks; ++block) {
    if (grid.columns) sum_columns<T>(one, terms, 0, 1, block, total);
    else sum_rows<T>(one, terms, x.n_stride, 0, 1, block, total);
  }
  const double count = static_cast<double>(grid.outer * grid.inner);
  centre(again[0], again[1], again[2], again[3], near, count, mean, mean_lo, m2);
}

/* Mean and m2 of a group's channels, m2 being that of x times unit. The subtraction in `centre`
 * loses sum d^2 / m2 in accuracy; where that is more than the element type can bear, the sums are
 * taken again about the mean just found. */
template <class T>
inline void finish_moments(const Grid& grid, View<const T> x, double* partial, double* shift,
                           ptrdiff_t group, double* __restrict unit, double* __restrict mean,
                           double* __restrict mean_lo, double* __restrict m2) {
  constexpr bool is_double = sizeof(T) == sizeof(double);
  constexpr double limit = is_double ? 4 : 64;
  const ptrdiff_t first = grid.first_channel(group), last = grid.last_channel(group);
  const double count = static_cast<double>(grid.outer * grid.inner);
  const SumTable sums = merge_blocks(grid, group, partial);
  if constexpr (is_double) rescale(grid, x, partial, shift, group, unit);
  else for (ptrdiff_t c = first; c < last; ++c) unit[c] = 1;
  for (ptrdiff_t c = first; c < last; ++c)
    centre(sums.first[c], sums.first_lo[c], sums.second[c], sums.second_lo[c], shift[c], count,
           &mean[c], &mean_lo[c], &m2[c]);
  for (ptrdiff_t c = first; c < last; ++c)
    if (sums.second[c] > limit * m2[c])
      centre_again<T, is_double>(grid, x, c, unit[c], &mean[c], &mean_lo[c], &m2[c]);
  for (ptrdiff_t c = first; is_double && c < last; ++c) {
    mean[c] /= unit[c];
    mean_lo[c] /= unit[c];
  }
}

/* var = m2 / n      inv_std = 1 / sqrt(var + eps), where m2 is that of x times unit */
inline void finish_inv_std(const Grid& grid, double eps, ptrdiff_t group,
                           const double* __restrict unit, double* __restrict var,
                           double* __restrict inv_std) {
  const double count = static_cast<double>(grid.outer * grid.inner);
  for (ptrdiff_t c = grid.first_channel(group); c < grid.last_channel(group); ++c) {
    const double scaled = var[c] / count, scaled_eps = eps * unit[c] * unit[c];
    /* The product overflows only where the variance is nothing beside eps. */
    inv_std[c] = scaled_eps <= DBL_MAX ? unit[c] / std::sqrt(scaled + scaled_eps)
                                       : 1 / std::sqrt(eps);
    var[c] = scaled / unit[c] / unit[c];
  }
}

/* sum dy      sum dy x' = inv_std sum dy (x - mean) */
inline void finish_sums(const Grid& grid, double* partial, const double* __restrict inv_std,
                        ptrdiff_t group, double* __restrict sum_dy,
                        double* __restrict sum_dy_xhat) {
  const SumTable sums = merge_blocks(grid, group, partial);
  for (ptrdiff_t c = grid.first_channel(group); c < grid.last_channel(group); ++c) {
    sum_dy[c] = sums.first[c] + sums.first_lo[c];
    sum_dy_xhat[c] = (sums.second[c] + sums.second_lo[c]) * inv_std[c];
  }
}

/* ------------------------------------------------------------------------------------- maps */

/* Write lines of a group from position t on, at most `tiles` tiles of them; the number of tiles
 * written: several where they are alike in alignment. */
constexpr int kLinesAtOnce = kVectorBytes == 64 ? 4 : 1;

template <class T, class Writer>
inline ptrdiff_t write_lines(const Grid& grid, const CoefficientTable<T>& table,
                             const Writer& writer, ptrdiff_t c, ptrdiff_t t, ptrdiff_t tiles,
                             ptrdiff_t length) {
  const PickPerPlace<T> pick = {&table};
  const ptrdiff_t step = grid.tile, stride = step * writer.out.n_stride;
  T* const line = writer.out.at(t, c);
  const auto map = [&](ptrdiff_t i) { return writer.map(pick, t + i * step, c, 0); };
  if (tiles >= kLinesAtOnce && stride % Element<T>::kLanes == 0) {
    if constexpr (kLinesAtOnce == 4)
      write_rows<Writer::kStream>({map(0), map(1), map(2), map(3)},
                                  {line, line + stride, line + 2 * stride, line + 3 * stride},
                                  length, kLinesAtOnce * stride);
    else
      write_rows<Writer::kStream>({map(0)}, {line}, length, stride);
    return kLinesAtOnce;
  }
  write_rows<Writer::kStream>({map(0)}, {line}, length, stride);
  return 1;
}

/* Write every row or line of one cell. */
template <class T, class Writer>
inline void write_cell(const Grid& grid, ptrdiff_t group, ptrdiff_t block,
                       const CoefficientTable<T>& table, const Writer& writer) {
  const ptrdiff_t first = grid.first_channel(group), last = grid.last_channel(group);
  const ptrdiff_t end = grid.first_position(block + 1);
  ptrdiff_t t = grid.first_position(block);
  if (grid.columns) {
    const ptrdiff_t places = (last - first) * grid.inner;
    while (t + grid.tile <= end)
      t += grid.tile * write_lines(grid, table, writer, first, t, (end - t) / grid.tile,
                                   grid.tile * places);
    if (t < end) write_lines(grid, table, writer, first, t, 1, (end - t) * places);
    return;
  }
  for (; t < end; ++t) {
    const Piece piece = Piece::at(grid, t);
    for (ptrdiff_t c = first; c < last; ++c)
      write_rows<Writer::kStream>(
          {writer.map(PickUniform<T>{&table, c - first}, piece.n, c, piece.s)},
          {writer.out.at(piece.n, c) + piece.s}, piece.length,
          c + 1 < last ? writer.out.c_stride : writer.out.n_stride);
  }
}

/* Write one cell of a group while the same cell of group `next`, as wide, is summed (rows only). */
template <class T, class Writer, class Terms>
inline void write_and_sum_cell(const Grid& grid, ptrdiff_t group, ptrdiff_t next, ptrdiff_t block,
                               const CoefficientTable<T>& table, const Writer& writer,
                               const Terms& terms, ptrdiff_t n_stride, double* partial) {
  const ptrdiff_t written = grid.first_channel(group), summed = grid.first_channel(next);
  const SumTable sums = SumTable::of(partial, block, grid.channels);
  sums.clear(summed, summed + grid.width);
  Accumulator accumulators[kMaxRowsWidth];
  for (ptrdiff_t i = 0; i < grid.width; ++i) accumulators[i] = Accumulator();
  const ptrdiff_t ahead = ahead_of<T>(grid, n_stride), end = grid.first_position(block + 1);
  ptrdiff_t filled = 0;
  for (ptrdiff_t t = grid.first_position(block); t < end; ++t) {
    const Piece piece = Piece::at(grid, t);
    for (ptrdiff_t i = 0; i < grid.width; ++i)
      write_and_add_row<Writer::kStream>(
          writer.map(PickUniform<T>{&table, i}, piece.n, written + i, piece.s),
          writer.out.at(piece.n, written + i) + piece.s, terms.row(piece.n, summed + i, piece.s),
          piece.length, i + 1 < grid.width ? writer.out.c_stride : writer.out.n_stride, ahead,
          &accumulators[i]);
    filled += piece.length;
    if (filled < kChunk<T> && t + 1 < end) continue;
    filled = 0;
    for (ptrdiff_t i = 0; i < grid.width; ++i) flush(&accumulators[i], sums, summed + i);
  }
}

/* Writers: the map of a row and where it goes. */
template <class T, class Activation, bool Residual, bool Scaled, bool Stream>
struct NormalizeWriter {
  static constexpr bool kStream = Stream;
  View<const T> x, residual;
  View<T> out;
  Activation activation;

  template <class Pick>
  auto map(const Pick& pick, ptrdiff_t n, ptrdiff_t c, ptrdiff_t s) const {
    return Normalize<T, Pick::template Coefficient, Activation, Residual, Scaled>{
        {x.at(n, c) + s, Residual ? residual.at(n, c) + s : nullptr, pick(kMeanHi), pick(kMeanLo),
         pick(kScale), pick(kOffset), pick(kUnit)},
        activation};
  }
};

template <class T, bool Scaled, bool Stream, class From> struct GradientWriter {
  static constexpr bool kStream = Stream;
  From from;
  View<const T> x;
  View<T> out;

  template <class Pick>
  auto map(const Pick& pick, ptrdiff_t n, ptrdiff_t c, ptrdiff_t s) const {
    const auto source = from.source(pick, n, c, s);
    return Gradient<T, Pick::template Coefficient, Scaled, decltype(source)>{
        source, x.at(n, c) + s, pick(kMeanHi), pick(kMeanLo), pick(kShiftHi), pick(kShiftLo),
        pick(kSlope), pick(kScale), pick(kUnit)};
  }
};

template <class T, class From> struct GateWriter {
  static constexpr bool kStream = false;
  From from;
  View<T> out;

  template <class Pick>
  auto map(const Pick& pick, ptrdiff_t n, ptrdiff_t c, ptrdiff_t s) const {
    const auto source = from.source(pick, n, c, s);
    return JustGate<T, decltype(source)>{source};
  }
};

template <class T, bool Stream> struct FixedGradientWriter {
  static constexpr bool kStream = Stream;
  View<const T> dy;
  View<T> out;

  template <class Pick>
  auto map(const Pick& pick, ptrdiff_t n, ptrdiff_t c, ptrdiff_t s) const {
    return FixedGradient<T, Pick::template Coefficient>{dy.at(n, c) + s, pick(kScale)};
  }
};

/* Per-channel statistics and parameters; null stands for mean_lo 0, gamma 1, beta 0. */
struct NormalizeParameters {
  const double *mean, *mean_lo, *inv_std, *gamma, *beta;
};

struct GradientParameters {
  const double *mean, *mean_lo, *inv_std, *gamma, *beta, *sum_dy, *sum_dy_xhat;
  double count;
};

/* Maps compute in Real. Channels whose mean or deviations are beyond 2^+-kOrdinary of it have a
 * unit other than 1. */
template <class Real> constexpr int kOrdinary = sizeof(Real) == sizeof(double) ? 400 : 60;

/* The power of two that brings a channel's values into the middle of Real's range. With it no
 * subtraction overflows, no part of the mean is lost below the smallest number, and scaling the
 * data by a power of two leaves the bits of y as they are. */
template <class Real> inline double unit_of(double mean, double inv_std) {
  constexpr int most = kOrdinary<Real>;
  const double large = std::ldexp(1.0, most), small = 1 / large;
  const double deviation = 1 / inv_std, offset = std::fabs(mean);
  double size = offset > deviation ? offset : deviation;
  if (size >= small && size < large) {
    /* With eps above the variance, a tiny mean may still be all there is. */
    if (offset >= small || offset == 0 || deviation > 0x1p20) return 1;
    size = offset;
  }
  if (!(size > 0 && std::isfinite(size))) return 1;
  int exponent;
  std::frexp(size, &exponent);
  const int power = (exponent > 0 ? most : -most) - exponent;
  return std::ldexp(1.0, power < 2 * most ? power : 2 * most); // a Real itself
}

/* The nearest finite Real to a scale, lest it make a NaN of x - mean = 0; a NaN stays one. */
template <class Real> inline double finite(double scale) {
  constexpr double most = std::numeric_limits<Real>::max();
  return scale > most ? most : scale < -most ? -most : scale;
}

/* Whether a channel's unit is 1, as told without a branch. */
template <class Real> inline bool is_ordinary(double mean, double inv_std) {
  constexpr double large = sizeof(Real) == sizeof(double) ? 0x1p400 : 0x1p60, small = 1 / large;
  const double offset = std::fabs(mean);
  return (inv_std > small) & (inv_std < large) & (offset < large) &
         ((offset >= small) | (offset == 0));
}

/* The coefficients all maps share, and each channel's unit; true where one is not 1. */
template <class T, class Parameters>
inline bool fill_centre(const Grid& grid, const Parameters& p, ptrdiff_t first, ptrdiff_t last,
                        double* __restrict unit, CoefficientTable<T>* table) {
  typedef typename Element<T>::Real Real;
  const ptrdiff_t channels = last - first;
  const double *mean = p.mean + first, *inv_std = p.inv_std + first;
  bool scaled = false;
  for (ptrdiff_t c = 0; c < channels; ++c) scaled |= !is_ordinary<Real>(mean[c], inv_std[c]);
  for (ptrdiff_t c = 0; c < channels; ++c) unit[c] = 1;
  for (ptrdiff_t c = 0; scaled && c < channels; ++c) unit[c] = unit_of<Real>(mean[c], inv_std[c]);
  Real hi[max_line(sizeof(T))], lo[max_line(sizeof(T))];
  for (ptrdiff_t c = 0; c < channels; ++c) {
    hi[c] = static_cast<Real>(mean[c] * unit[c]);
    lo[c] = static_cast<Real>(mean[c] * unit[c] - hi[c]);
  }
  for (ptrdiff_t c = 0; p.mean_lo && c < channels; ++c)
    lo[c] = static_cast<Real>((mean[c] * unit[c] - hi[c]) + p.mean_lo[first + c] * unit[c]);
  fill_line(grid, channels, [&](ptrdiff_t c) { return hi[c]; }, table->row[kMeanHi]);
  fill_line(grid, channels, [&](ptrdiff_t c) { return lo[c]; }, table->row[kMeanLo]);
  if (scaled) fill_line(grid, channels, [&](ptrdiff_t c) { return unit[c]; }, table->row[kUnit]);
  return scaled;
}

/* What a cell does: write, or write while another channel is summed. */
template <class T> struct JustWrite {
  const Grid& grid;
  ptrdiff_t group, block;

  template <class Writer>
  void operator()(const CoefficientTable<T>& table, const Writer& writer) const {
    write_cell(grid, group, block, table, writer);
    if (Writer::kStream) stream_fence();
  }
};

template <class T, class Terms> struct WriteAndSum {
  const Grid& grid;
  ptrdiff_t group, block, next;
  Terms terms;
  ptrdiff_t n_stride;
  double* partial;

  template <class Writer>
  void operator()(const CoefficientTable<T>& table, const Writer& writer) const {
    write_and_sum_cell(grid, group, next, block, table, writer, terms, n_stride, partial);
    if (Writer::kStream) stream_fence();
  }
};

template <class T, class Activation, bool Residual, bool Scaled, class Work>
inline void normalize_with(const Work& work, const CoefficientTable<T>& table, View<const T> x,
                           View<const T> residual, View<T> y, Activation activation,
                           bool stream) {
  if (stream)
    work(table,
         NormalizeWriter<T, Activation, Residual, Scaled, true>{x, residual, y, activation});
  else
    work(table,
         NormalizeWriter<T, Activation, Residual, Scaled, false>{x, residual, y, activation});
}

/* The coefficients of z in a group; whether a unit is not 1. */
template <class T>
inline bool fill_normalize(const Grid& grid, const NormalizeParameters& p, ptrdiff_t group,
                           bool with_unit, CoefficientTable<T>* table) {
  typedef typename Element<T>::Real Real;
  const ptrdiff_t first = grid.first_channel(group), channels = grid.last_channel(group) - first;
  double unit[max_line(sizeof(T))];
  const bool scaled = fill_centre<T>(grid, p, first, first + channels, unit, table);
  if (with_unit && !scaled)
    fill_line(grid, channels, [](ptrdiff_t) { return 1; }, table->row[kUnit]);
  fill_line(grid, channels, [&](ptrdiff_t c) {
    const double scale = p.gamma ? p.gamma[first + c] * p.inv_std[first + c] : p.inv_std[first + c];
    return finite<Real>(scale / unit[c]);
  }, table->row[kScale]);
  fill_line(grid, channels, [&](ptrdiff_t c) { return p.beta ? p.beta[first + c] : 0; },
            table->row[kOffset]);
  return scaled;
}

/* y of one cell. A unit is always multiplied in beside a residual or an activation, where 1
 * changes nothing and another instance would cost more than it saves. */
template <class T, class Work>
inline void normalize_work(const Work& work, View<const T> x, View<const T> residual, View<T> y,
                           const NormalizeParameters& p, Epilogue epilogue, bool stream) {
  CoefficientTable<T> table;
  const bool plain = !residual.data && epilogue.activation == 0;
  const bool scaled = fill_normalize<T>(work.grid, p, work.group, !plain, &table);
  const Identity<T> identity;
  const Clip<T> clip(epilogue);
  const LeakyRelu<T> leaky(epilogue);
#define BNCORE_WORK(activation, with_residual, with_unit)                                         \
  normalize_with<T, decltype(activation), with_residual, with_unit>(work, table, x, residual, y,  \
                                                                    activation, stream)
  if (plain) {
    if (scaled) BNCORE_WORK(identity, false, true);
    else BNCORE_WORK(identity, false, false);
  } else if (residual.data) {
    if (epilogue.activation == 1) BNCORE_WORK(clip, true, true);
    else if (epilogue.activation == 2) BNCORE_WORK(leaky, true, true);
    else BNCORE_WORK(identity, true, true);
  } else {
    if (epilogue.activation == 1) BNCORE_WORK(clip, false, true);
    else BNCORE_WORK(leaky, false, true);
  }
#undef BNCORE_WORK
}

template <class T>
inline void normalize_block(const Grid& grid, View<const T> x, View<const T> residual, View<T> y,
                            const NormalizeParameters& p, Epilogue epilogue, bool stream,
                            ptrdiff_t group, ptrdiff_t block) {
  normalize_work(JustWrite<T>{grid, group, block}, x, residual, y, p, epilogue, stream);
}

/* y of one cell, and the moments' sums of the same cell of group `next`. */
template <class T>
inline void normalize_and_sum_block(const Grid& grid, View<const T> x, View<const T> residual,
                                    View<T> y, const NormalizeParameters& p, Epilogue epilogue,
                                    bool stream, ptrdiff_t group, ptrdiff_t block,
                                    ptrdiff_t next, const double* shift, double* partial) {
  typedef WriteAndSum<T, MomentTerms<T>> Work;
  const Work work = {grid, group, block, next, {x, shift, nullptr}, x.n_stride, partial};
  normalize_work(work, x, residual, y, p, epilogue, stream);
}

/* What a backward pass reads. */
template <class T> struct BackwardInput {
  View<const T> dy, x, residual; // no residual: null
  Epilogue epilogue;

  /* Calls visit with where dz comes from. */
  template <class Visit> void visit(const Visit& visit_from) const {
    const Gate<T> gate(epilogue);
    if (epilogue.activation == 0) visit_from(PlainGradient<T>{dy});
    else if (residual.data) visit_from(GatedGradient<T, true>{dy, x, residual, gate});
    else visit_from(GatedGradient<T, false>{dy, x, residual, gate});
  }
};

/* The scale of a channel's gradient. */
inline double gradient_scale(const GradientParameters& p, ptrdiff_t c) {
  return p.gamma ? p.gamma[c] * p.inv_std[c] : p.inv_std[c];
}

/* The coefficients of dz in a group, beyond those of fill_centre. */
template <class T>
inline void fill_gate(const Grid& grid, const GradientParameters& p, ptrdiff_t group, bool scaled,
                      const double* unit, CoefficientTable<T>* table) {
  const ptrdiff_t first = grid.first_channel(group), channels = grid.last_channel(group) - first;
  if (!scaled) fill_line(grid, channels, [](ptrdiff_t) { return 1; }, table->row[kUnit]);
  fill_line(grid, channels, [&](ptrdiff_t c) {
    return finite<typename Element<T>::Real>(gradient_scale(p, first + c) / unit[c]);
  }, table->row[kGateScale]);
  fill_line(grid, channels, [&](ptrdiff_t c) { return p.beta ? p.beta[first + c] : 0; },
            table->row[kGateOffset]);
}

/* The coefficients of dz alone. */
template <class T>
inline void fill_gate_alone(const Grid& grid, const GradientParameters& p, ptrdiff_t group,
                            CoefficientTable<T>* table) {
  const ptrdiff_t first = grid.first_channel(group), last = grid.last_channel(group);
  double unit[max_line(sizeof(T))];
  const bool scaled = fill_centre<T>(grid, p, first, last, unit, table);
  fill_gate<T>(grid, p, group, scaled, unit, table);
}

/* The sums of one cell: dz and dz (x - mean). */
template <class T>
inline void reduce_block(const Grid& grid, const BackwardInput<T>& input,
                         const GradientParameters& p, ptrdiff_t group, ptrdiff_t block,
                         double* partial) {
  input.visit([&](const auto& from) {
    typedef std::decay_t<decltype(from)> From;
    const auto sum = [&](const CoefficientTable<T>* table) {
      sum_block<T>(grid,
                   BackwardTerms<T, From>{from, input.x, p.mean, p.mean_lo, table,
                                          grid.first_channel(group)},
                   input.x.n_stride, group, block, partial);
    };
    if constexpr (std::is_same_v<From, PlainGradient<T>>) return sum(nullptr);
    CoefficientTable<T> table;
    fill_gate_alone(grid, p, group, &table);
    sum(&table);
  });
}

/* dz of one cell. */
template <class T>
inline void gate_block(const Grid& grid, const BackwardInput<T>& input, View<T> dz,
                       const GradientParameters& p, ptrdiff_t group, ptrdiff_t block) {
  CoefficientTable<T> table;
  fill_gate_alone(grid, p, group, &table);
  input.visit([&](const auto& from) {
    JustWrite<T>{grid, group, block}(table, GateWriter<T, std::decay_t<decltype(from)>>{from, dz});
  });
}

/* The coefficients of dx in a group; whether a unit is not 1. */
template <class T>
inline bool fill_gradient(const Grid& grid, const GradientParameters& p, ptrdiff_t group,
                          bool gated, CoefficientTable<T>* table) {
  typedef typename Element<T>::Real Real;
  const ptrdiff_t first = grid.first_channel(group), channels = grid.last_channel(group) - first;
  double unit[max_line(sizeof(T))];
  const bool scaled = fill_centre<T>(grid, p, first, first + channels, unit, table);
  const auto shift = [&](ptrdiff_t c) { return p.sum_dy[first + c] / p.count; };
  const auto shift_hi = [&](ptrdiff_t c) { return static_cast<Real>(shift(c)); };
  fill_line(grid, channels, [&](ptrdiff_t c) { return finite<Real>(gradient_scale(p, first + c)); },
            table->row[kScale]);
  fill_line(grid, channels, shift_hi, table->row[kShiftHi]);
  fill_line(grid, channels, [&](ptrdiff_t c) { return shift(c) - shift_hi(c); },
            table->row[kShiftLo]);
  fill_line(grid, channels, [&](ptrdiff_t c) {
    return p.inv_std[first + c] * p.sum_dy_xhat[first + c] / p.count / unit[c];
  }, table->row[kSlope]);
  if (gated) fill_gate<T>(grid, p, group, scaled, unit, table);
  return scaled;
}

/* dx of one cell. */
template <class T, class Work, class From>
inline void gradient_work(const Work& work, const From& from, View<const T> x, View<T> dx,
                          const GradientParameters& p, bool stream) {
  constexpr bool gated = !std::is_same_v<From, PlainGradient<T>>;
  CoefficientTable<T> table;
  const bool scaled = fill_gradient<T>(work.grid, p, work.group, gated, &table);
  if (scaled || gated) {
    if (stream) work(table, GradientWriter<T, true, true, From>{from, x, dx});
    else work(table, GradientWriter<T, true, false, From>{from, x, dx});
  } else {
    if (stream) work(table, GradientWriter<T, gated, true, From>{from, x, dx});
    else work(table, GradientWriter<T, gated, false, From>{from, x, dx});
  }
}

template <class T>
inline void gradient_block(const Grid& grid, const BackwardInput<T>& input, View<T> dx,
                           const GradientParameters& p, bool stream, ptrdiff_t group,
                           ptrdiff_t block) {
  input.visit([&](const auto& from) {
    gradient_work(JustWrite<T>{grid, group, block}, from, input.x, dx, p, stream);
  });
}

/* dx of one cell, and the gradient's sums of the same cell of group `next`. */
template <class T>
inline void gradient_and_sum_block(const Grid& grid, const BackwardInput<T>& input, View<T> dx,
                                   const GradientParameters& p, bool stream, ptrdiff_t group,
                                   ptrdiff_t block, ptrdiff_t next, double* partial) {
  input.visit([&](const auto& from) {
    typedef std::decay_t<decltype(from)> From;
    typedef BackwardTerms<T, From> Terms;
    const auto work = [&](const CoefficientTable<T>* table) {
      const Terms terms = {from, input.x, p.mean, p.mean_lo, table, grid.first_channel(next)};
      gradient_work(
          WriteAndSum<T, Terms>{grid, group, block, next, terms, input.x.n_stride, partial}, from,
          input.x, dx, p, stream);
    };
    if constexpr (std::is_same_v<From, PlainGradient<T>>) return work(nullptr);
    CoefficientTable<T> table;
    fill_gate_alone(grid, p, next, &table);
    work(&table);
  });
}

/* dx = gamma inv_std dy of one cell: the statistics were constants. */
template <class T>
inline void fixed_gradient_block(const Grid& grid, View<const T> dy, View<T> dx,
                                 const GradientParameters& p, bool stream, ptrdiff_t group,
                                 ptrdiff_t block) {
  const ptrdiff_t first = grid.first_channel(group), last = grid.last_channel(group);
  CoefficientTable<T> table;
  fill_line(grid, last - first, [&](ptrdiff_t c) {
    return finite<typename Element<T>::Real>(gradient_scale(p, first + c));
  }, table.row[kScale]);
  const JustWrite<T> work = {grid, group, block};
  if (stream) work(table, FixedGradientWriter<T, true>{dy, dx});
  else work(table, FixedGradientWriter<T, false>{dy, dx});
}

/* Hands out groups to the threads of a team, each once, whoever comes: a batch of neighbours at a
 * time, lest small groups have two cores write to one line of statistics. */
struct Tickets {
  std::atomic<ptrdiff_t> taken{0};
  ptrdiff_t batch = 1;

  void set_batch(const Grid& grid, ptrdiff_t itemsize, ptrdiff_t threads) {
    constexpr ptrdiff_t worth = 128 * 1024; // bytes
    batch = clamp(worth / (grid.group_size() * itemsize), 1, 1 + grid.groups / (4 * threads));
  }
};

/* One thread's turns. */
struct Turns {
  ptrdiff_t next = 0, end = 0;

  ptrdiff_t take(Tickets* tickets) {
    if (next == end) {
      next = tickets->taken.fetch_add(tickets->batch, std::memory_order_relaxed);
      end = next + tickets->batch;
    }
    return next++;
  }
};

} // namespace bncore

#endif
