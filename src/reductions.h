/* Reductions: the two sums of every channel over one cell of the grid, and statistics from them. */
#ifndef BNCORE_REDUCTIONS_H
#define BNCORE_REDUCTIONS_H

#include <cfloat>
#include <initializer_list>

#include "coefficients.h"

namespace bncore {

/* The two sums of every channel of a block, in twofold form: four rows of C values, of which there
 * may be room for one group's only. */
struct SumTable {
  double *first, *first_lo, *second, *second_lo;

  static SumTable of(const Grid& grid, double* partial, ptrdiff_t block) {
    double* row = partial + block * 4 * grid.room;
    return {row, row + grid.room, row + 2 * grid.room, row + 3 * grid.room};
  }
  void clear(ptrdiff_t begin, ptrdiff_t end) const {
    for (double* row : {first, first_lo, second, second_lo})
      std::memset(row + begin, 0, (end - begin) * sizeof(double));
  }
};

/* What a group's statistics need while they are found: sums (blocks, 4, C), a shift and a unit per
 * channel. Indexed by channel, though there may be room for one group's only. */
struct Workspace {
  double *partial, *shift, *unit;

  static ptrdiff_t size(const Grid& grid) { return (4 * grid.blocks + 2) * grid.room; }

  static Workspace of(const Grid& grid, double* data, ptrdiff_t group) {
    double* start = grid.room < grid.channels ? data - grid.first_channel(group) : data;
    const ptrdiff_t sums = 4 * grid.blocks * grid.room;
    return {start, start + sums, start + sums + grid.room};
  }
};

/* Terms of a forward pass: deviations from a shift per channel. Scaled: of x times a power of two
 * per channel, from a shift that is multiplied already. */
template <class T, bool Scaled, class From> struct MomentTerms {
  static constexpr ptrdiff_t kArrays = 1; // that are read
  typedef From Positions;
  View<const T> x;
  const double* shift;
  const double* unit;
  Positions weights;
  Kept<T> kept;

  void lines(const Grid& grid, ptrdiff_t first, ptrdiff_t last, double* one, double* two) const {
    fill_line(grid, last - first, [&](ptrdiff_t c) { return shift[first + c]; }, one);
    if (Scaled) fill_line(grid, last - first, [&](ptrdiff_t c) { return unit[first + c]; }, two);
  }
  auto row(ptrdiff_t n, ptrdiff_t c, ptrdiff_t s) const {
    const auto weigh = weights.row(n, s);
    return Deviations<T, Scaled, decltype(weigh)>{x.at(n, c) + s, shift[c], Scaled ? unit[c] : 1,
                                                  weigh, kept.at(n, c, s)};
  }
  template <class Weigh>
  auto column(ptrdiff_t n, ptrdiff_t c, ptrdiff_t tile, const double* shifts, const double* units,
              Lines<Weigh> lines) const {
    return ColumnDeviations<T, Scaled, Weigh>{x.at(n, c), x.n_stride * tile, shifts, units, lines};
  }
};

/* Where dz of a backward pass comes from: from dy alone, or through an activation. `of` is the same
 * of another dy. */
template <class T> struct PlainGradient {
  View<const T> dy;

  template <class Input> PlainGradient of(const Input& input) const { return {input.dy}; }
  Strides strides() const { return {dy.n_stride, 0}; }
  template <class Pick> auto source(const Pick&, ptrdiff_t n, ptrdiff_t c, ptrdiff_t s) const {
    return PlainSource<T>{dy.at(n, c) + s};
  }
};

template <class T, Interval Kind> struct IntervalGradient {
  View<const T> dy;
  Gate<T> gate;

  template <class Input> IntervalGradient of(const Input& input) const { return {input.dy, gate}; }
  Strides strides() const { return {dy.n_stride, 0}; }
  template <class Pick> auto source(const Pick& pick, ptrdiff_t n, ptrdiff_t c, ptrdiff_t s) const {
    return IntervalSource<T, Pick::template Coefficient, Kind>{dy.at(n, c) + s, pick(kGateLow),
                                                               pick(kGateHigh), gate};
  }
};

template <class T> struct BitGradient {
  View<const T> dy;
  GateBits<const uint8_t> bits;
  Gate<T> gate;

  template <class Input> BitGradient of(const Input& input) const { return {input.dy, bits, gate}; }
  Strides strides() const { return {dy.n_stride, bits.n_stride}; }
  template <class Pick> auto source(const Pick&, ptrdiff_t n, ptrdiff_t c, ptrdiff_t s) const {
    return BitSource<T>{dy.at(n, c) + s, bits.data, bits.at(n, c, s), gate};
  }
};

/* dy and y of a leaky ReLU. */
template <class T> struct OutputGradient {
  typedef typename Element<T>::Real Real;
  View<const T> dy;
  Real slope, inverse;

  OutputGradient(View<const T> its_dy, Epilogue e)
      : dy(its_dy), slope(static_cast<Real>(e.a)), inverse(static_cast<Real>(1 / e.a)) {}
  Strides strides() const { return {dy.n_stride, 0}; }
  template <class Pick> auto source(const Pick&, ptrdiff_t n, ptrdiff_t c, ptrdiff_t s) const {
    return OutputSource<T>{dy.at(n, c) + s, slope, inverse};
  }
};

/* z is computed again with what was added to it; for dz alone. */
template <class T> struct LatentGradient {
  View<const T> dy, x, residual;
  Gate<T> gate;

  template <class Pick> auto source(const Pick& pick, ptrdiff_t n, ptrdiff_t c, ptrdiff_t s) const {
    typedef Latent<T, Pick::template Coefficient, true, true> Z;
    const Z z = {x.at(n, c) + s, residual.at(n, c) + s, pick(kMean), pick(kScale), pick(kOffset),
                 pick(kUnit)};
    return LatentSource<T, Z>{dy.at(n, c) + s, z, gate};
  }
};

/* Whether z is got back from y. */
template <class From> constexpr bool kIsOutput = false;
template <class T> constexpr bool kIsOutput<OutputGradient<T>> = true;

/* Whether dz needs the table's gates. */
template <class From> constexpr bool kHasInterval = false;
template <class T, Interval Kind> constexpr bool kHasInterval<IntervalGradient<T, Kind>> = true;

/* Terms of a backward pass: dz and dz (x - mean). The table is that of a group from channel
 * `begin` on. */
template <class T, class From, class At> struct BackwardTerms {
  static constexpr ptrdiff_t kArrays = 2;
  typedef At Positions;
  From from;
  Positions weights;
  View<const T> x;
  const double* mean;
  const double* mean_lo;
  const GateTable<T>* table;
  ptrdiff_t begin;
  Kept<T> kept_dy, kept_x;

  void lines(const Grid& grid, ptrdiff_t first, ptrdiff_t last, double* one, double* two) const {
    fill_line(grid, last - first, [&](ptrdiff_t c) { return mean[first + c]; }, one);
    fill_line(grid, last - first, [&](ptrdiff_t c) { return mean_lo[first + c]; }, two);
  }
  auto row(ptrdiff_t n, ptrdiff_t c, ptrdiff_t s) const {
    const auto source = from.source(PickUniform<T, GateTable<T>>{table, c - begin}, n, c, s);
    const auto weigh = weights.row(n, s);
    return GradientTerms<T, decltype(source), decltype(weigh)>{
        source, x.at(n, c) + s, mean[c], mean_lo[c], weigh, kept_dy.at(n, c, s),
        kept_x.at(n, c, s)};
  }
  template <class Weigh>
  auto column(ptrdiff_t n, ptrdiff_t c, ptrdiff_t tile, const double* means,
              const double* means_lo, Lines<Weigh> lines) const {
    const auto source = from.source(PickPerPlace<T, GateTable<T>>{table}, n, c, 0);
    const Strides one = from.strides();
    return ColumnGradientTerms<T, decltype(source), Weigh>{
        source, x.at(n, c), {one.dy * tile, one.bits * tile}, x.n_stride * tile, means, means_lo,
        lines};
  }
};

/* What the sums of rows read next. A group's rows at one n are a run of memory; after the last n
 * comes the next group. */
template <class T, class Terms> struct Route {
  static constexpr ptrdiff_t kAhead = kFetchAhead / (Terms::kArrays * sizeof(T));
  ptrdiff_t outer, inner, run, n_stride, group_stride, runs_ahead;

  Route(const Grid& grid, const Terms& terms)
      : outer(grid.outer), inner(grid.inner), run(grid.width * grid.inner),
        n_stride(terms.x.n_stride), group_stride(grid.width * terms.x.c_stride),
        runs_ahead(kAhead / run) {}

  ptrdiff_t to_run(ptrdiff_t n, ptrdiff_t runs) const {
    const bool beyond = n + runs >= outer;
    return runs * n_stride + (beyond ? group_stride - outer * n_stride : 0);
  }
  /* From the piece of the group's channel number c. */
  Onward from(Piece piece, ptrdiff_t c) const {
    if (runs_ahead > 0) return {PTRDIFF_MAX, to_run(piece.n, runs_ahead), 0};
    return {run - kAhead - (c * inner + piece.s), kAhead, kAhead - run + to_run(piece.n, 1)};
  }
};

/* line[i] += more[i], which do not overlap; and the same of sums in twofold form. */
inline void add_line(const double* __restrict more, ptrdiff_t n, double* __restrict line) {
  for (ptrdiff_t i = 0; i < n; ++i) line[i] += more[i];
}

inline void two_sums(const double* __restrict more, ptrdiff_t n, double* __restrict hi,
                     double* __restrict lo) {
  for (ptrdiff_t i = 0; i < n; ++i) two_sum(more[i], &hi[i], &lo[i]);
}

/* End a chunk of channel c: its accumulator goes to the sums. */
inline void flush(Accumulator* accumulator, SumTable sums, ptrdiff_t c) {
  two_sum(accumulator->first_total(), &sums.first[c], &sums.first_lo[c]);
  two_sum(accumulator->second_total(), &sums.second[c], &sums.second_lo[c]);
  *accumulator = Accumulator();
}

template <class Terms>
inline void sum_row(const Terms& terms, ptrdiff_t n, Onward onward, Accumulator* sums) {
  add_row(terms, n, onward, sums);
  if (terms.keeps()) terms.keep(0, n);
}

/* Whether the rows of one channel after the other are summed, as one chunk that is all there is of
 * the channel: where it has one row, or all rows stay in a first-level cache and their order in
 * memory is no matter. The sums are the same. */
template <class T>
inline bool sums_by_channel(const Grid& grid, ptrdiff_t first, ptrdiff_t last,
                            ptrdiff_t positions) {
  constexpr ptrdiff_t cached = 16 * 1024; // of each array
  const ptrdiff_t size = positions * grid.segment;
  return grid.positions == 1 ||
         (grid.blocks == 1 && size <= kChunk<T> &&
          (last - first) * size * static_cast<ptrdiff_t>(sizeof(T)) <= cached);
}

/* Rows of one cell, into sums[first..last). */
template <class T, class Terms>
inline void sum_rows(const Grid& grid, const Terms& terms, ptrdiff_t first, ptrdiff_t last,
                     ptrdiff_t block, SumTable sums) {
  const Route<T, Terms> route(grid, terms);
  const ptrdiff_t begin = grid.first_position(block), end = grid.first_position(block + 1);
  if (sums_by_channel<T>(grid, first, last, end - begin)) {
    for (ptrdiff_t c = first; c < last; ++c) {
      Accumulator accumulator = {};
      for (ptrdiff_t t = begin; t < end; ++t) {
        const Piece piece = Piece::at(grid, t);
        sum_row(terms.row(piece.n, c, piece.s), piece.length, route.from(piece, c - first),
                &accumulator);
      }
      sums.first[c] = accumulator.first_total();
      sums.second[c] = accumulator.second_total();
    }
    return;
  }
  Accumulator accumulators[kMaxRowsWidth];
  for (ptrdiff_t c = first; c < last; ++c) accumulators[c - first] = Accumulator();
  ptrdiff_t filled = 0;
  for (ptrdiff_t t = begin; t < end; ++t) {
    const Piece piece = Piece::at(grid, t);
    for (ptrdiff_t c = first; c < last; ++c)
      sum_row(terms.row(piece.n, c, piece.s), piece.length, route.from(piece, c - first),
              &accumulators[c - first]);
    filled += piece.length;
    if (filled < kChunk<T> && t + 1 < end) continue;
    filled = 0;
    for (ptrdiff_t c = first; c < last; ++c) flush(&accumulators[c - first], sums, c);
  }
}

/* Add `count` lines of so many places, the upper half onto the lower until at most `least` are
 * left; how many these are. */
inline ptrdiff_t fold(double* line, ptrdiff_t count, ptrdiff_t places, ptrdiff_t least) {
  for (ptrdiff_t kept; count > least; count = kept) {
    kept = (count + 1) / 2;
    add_line(line + kept * places, (count - kept) * places, line);
  }
  return count;
}

/* Add the places of a line, folded by channel, to sums[first..last). For float64 what rounding the
 * last few additions would take shows in y: they are twofold. */
template <class T>
inline void fold_line(const Grid& grid, ptrdiff_t first, ptrdiff_t last, ptrdiff_t tile,
                      double* line, double* sum, double* sum_lo) {
  constexpr ptrdiff_t least = sizeof(T) == sizeof(double) ? 8 : 1;
  const ptrdiff_t channels = last - first, repeat = grid.inner;
  fold(line, tile, channels * repeat, 1);
  if (repeat == 1) return two_sums(line, channels, sum + first, sum_lo + first);
  for (ptrdiff_t c = 0; c < channels; ++c) {
    double* places = line + c * repeat;
    const ptrdiff_t left = fold(places, repeat, 1, least);
    for (ptrdiff_t s = 0; s < left; ++s) two_sum(places[s], &sum[first + c], &sum_lo[first + c]);
  }
}

/* Columns of one cell, into sums[first..last). */
template <class T, class Terms>
BNCORE_OWN_FRAME void sum_columns(const Grid& grid, const Terms& terms, ptrdiff_t first,
                                  ptrdiff_t last, ptrdiff_t block, SumTable sums) {
  constexpr ptrdiff_t chain = kChunk<T> / 8; // rows summed before a fold
  constexpr ptrdiff_t rows_spread = sizeof(typename Terms::Positions::Value) == 1 ? 16 : 4;
  Spread<typename Terms::Positions, rows_spread, kSumLine> spread;
  alignas(kVectorBytes) double constants[2][kLongSumLine + kPad], line[2][kLongSumLine + kPad];
  constexpr ptrdiff_t rest = kSumLine + kPad; // where lines that make no tile are summed
  terms.lines(grid, first, last, constants[0], constants[1]);
  const ptrdiff_t channels = last - first, end = grid.first_position(block + 1);
  const auto clear = [&](ptrdiff_t from, ptrdiff_t tile) {
    for (double* its_line : {line[0] + from, line[1] + from})
      std::memset(its_line, 0, (tile * channels * grid.inner + kPad) * sizeof(double));
  };
  const auto fold = [&](ptrdiff_t from, ptrdiff_t tile) {
    fold_line<T>(grid, first, last, tile, line[0] + from, sums.first, sums.first_lo);
    fold_line<T>(grid, first, last, tile, line[1] + from, sums.second, sums.second_lo);
  };
  ptrdiff_t n = grid.first_position(block);
  while (n < end) {
    const ptrdiff_t widest = grid.tile <= end - n ? grid.tile : 1;
    clear(0, widest);
    if (widest > 1) clear(rest, 1);
    for (ptrdiff_t room = chain, lines; n < end && room > 0; room -= lines) {
      const Run run = terms.weights.run(n, end);
      /* Of each run whole tiles first, then what is left line by line. */
      const ptrdiff_t length = run.end - n, tile = widest <= length ? widest : 1;
      const ptrdiff_t to = tile < widest ? rest : 0;
      lines = run.counts ? clamp(length / tile, 1, room) : 0;
      for (ptrdiff_t i = 0, rows; i < lines; i += rows) {
        rows = clamp(lines - i, 1, spread.rows_at_once(terms.weights, tile));
        const ptrdiff_t at = n + i * tile;
        const auto weights = spread.lines(terms.weights, {at, rows, tile, channels, grid.inner});
        add_columns(terms.column(at, first, tile, constants[0], constants[1], weights), rows,
                    tile * channels * grid.inner, grid.strip, line[0] + to, line[1] + to);
      }
      n = run.counts ? n + lines * tile : run.end;
    }
    fold(0, widest);
    if (widest > 1) fold(rest, 1);
  }
}

template <class T, class Terms>
inline void sum_block(const Grid& grid, const Terms& terms, ptrdiff_t group, ptrdiff_t block,
                      double* partial) {
  const ptrdiff_t first = grid.first_channel(group), last = grid.last_channel(group);
  const SumTable sums = SumTable::of(grid, partial, block);
  sums.clear(first, last);
  if (grid.columns) sum_columns<T>(grid, terms, first, last, block, sums);
  else sum_rows<T>(grid, terms, first, last, block, sums);
}

/* partial: (blocks, 4, C), see SumTable. keep: null, or where rows are kept, see Kept. */
template <class T>
inline void moments_block(const Grid& grid, View<const T> x, const Weights& weights,
                          const double* shift, ptrdiff_t group, ptrdiff_t block, double* partial,
                          T* keep) {
  const auto kept = Kept<T>::of(grid, keep, group);
  weights.visit(grid.columns, [&](auto positions) {
    const MomentTerms<T, false, decltype(positions)> terms = {x, shift, nullptr, positions, kept};
    sum_block<T>(grid, terms, group, block, partial);
  });
}

/* A value near the channel's mean: its first, for float64 moved by seven others spread over it.
 * A constant channel gives the constant itself. */
template <class T>
inline double pilot(const Grid& grid, View<const T> x, const Weights& weights, ptrdiff_t channel) {
  const ptrdiff_t n = weights.first_used / grid.inner, s = weights.first_used % grid.inner;
  const double start = Element<T>::wide(x.at(n, channel)[s]);
  const ptrdiff_t count = grid.outer * grid.inner;
  if (sizeof(T) < sizeof(double) || count < 8 || weights.any()) return start;
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
  const ptrdiff_t first = grid.first_channel(group), channels = grid.last_channel(group) - first;
  const SumTable total = SumTable::of(grid, partial, 0);
  for (ptrdiff_t block = 1; block < grid.blocks; ++block) {
    const SumTable more = SumTable::of(grid, partial, block);
    two_sums(more.first + first, channels, total.first + first, total.first_lo + first);
    add_line(more.first_lo + first, channels, total.first_lo + first);
    two_sums(more.second + first, channels, total.second + first, total.second_lo + first);
    add_line(more.second_lo + first, channels, total.second_lo + first);
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
inline void rescale(const Grid& grid, View<const T> x, const Weights& weights, double* partial,
                    double* shift, ptrdiff_t group, double* unit) {
  const ptrdiff_t first = grid.first_channel(group), last = grid.last_channel(group);
  const SumTable sums = SumTable::of(grid, partial, 0);
  bool ordinary = true;
  for (ptrdiff_t c = first; c < last; ++c) {
    unit[c] = unit_of_squares(sums.first[c], sums.second[c]);
    ordinary &= unit[c] == 1;
  }
  if (ordinary) return;
  for (ptrdiff_t c = first; c < last; ++c) shift[c] *= unit[c];
  weights.visit(grid.columns, [&](auto positions) {
    const MomentTerms<T, true, decltype(positions)> terms = {x, shift, unit, positions, {}};
    for (ptrdiff_t block = 0; block < grid.blocks; ++block)
      sum_block<T>(grid, terms, group, block, partial);
  });
  merge_blocks(grid, group, partial);
}

/* Moments of one channel from sums about its mean, near enough. */
template <class T, bool Scaled>
inline void centre_again(const Grid& grid, View<const T> x, const Weights& weights, ptrdiff_t c,
                         double unit, double* mean, double* mean_lo, double* m2) {
  Grid one = grid;
  one.width = one.channels = one.groups = one.tile = 1;
  const double near = *mean;
  const View<const T> channel = {x.data + c * x.c_stride, x.n_stride, x.c_stride};
  double again[4] = {};
  const SumTable total = {&again[0], &again[1], &again[2], &again[3]};
  weights.visit(grid.columns, [&](auto positions) {
    const MomentTerms<T, Scaled, decltype(positions)> terms = {
        channel, &near, &unit, positions, {}};
    for (ptrdiff_t block = 0; block < grid.blocks; ++block) {
      if (grid.columns) sum_columns<T>(one, terms, 0, 1, block, total);
      else sum_rows<T>(one, terms, 0, 1, block, total);
    }
  });
  centre(again[0], again[1], again[2], again[3], near, weights.total, mean, mean_lo, m2);
}

/* Mean and m2 of a group's channels, m2 being that of x times unit. The subtraction in `centre`
 * loses sum d^2 / m2 in accuracy; where that is more than the element type can bear, the sums are
 * taken again about the mean just found. */
template <class T>
inline void finish_moments(const Grid& grid, View<const T> x, const Weights& weights,
                           double* partial, double* shift, ptrdiff_t group,
                           double* __restrict unit, double* __restrict mean,
                           double* __restrict mean_lo, double* __restrict m2) {
  constexpr bool is_double = sizeof(T) == sizeof(double);
  constexpr double limit = is_double ? 4 : 64;
  const ptrdiff_t first = grid.first_channel(group), last = grid.last_channel(group);
  const SumTable sums = merge_blocks(grid, group, partial);
  if constexpr (is_double) rescale(grid, x, weights, partial, shift, group, unit);
  else for (ptrdiff_t c = first; c < last; ++c) unit[c] = 1;
  for (ptrdiff_t c = first; c < last; ++c)
    centre(sums.first[c], sums.first_lo[c], sums.second[c], sums.second_lo[c], shift[c],
           weights.total, &mean[c], &mean_lo[c], &m2[c]);
  int64_t lossy = 0; // whether any channel is, told by vectors of them, as mostly none is
  for (ptrdiff_t c = first; c < last; ++c)
    lossy |= sums.second[c] > limit * m2[c] ? int64_t(1) : int64_t(0);
  for (ptrdiff_t c = first; lossy && c < last; ++c)
    if (sums.second[c] > limit * m2[c])
      centre_again<T, is_double>(grid, x, weights, c, unit[c], &mean[c], &mean_lo[c], &m2[c]);
  for (ptrdiff_t c = first; is_double && c < last; ++c) {
    mean[c] /= unit[c];
    mean_lo[c] /= unit[c];
  }
}

/* Whether all of the units are 1. */
inline bool are_ordinary(const double* unit, ptrdiff_t n) {
  int64_t others = 0;
  for (ptrdiff_t i = 0; i < n; ++i) others |= unit[i] == 1 ? int64_t(0) : int64_t(1);
  return others == 0;
}

/* var = m2 / n      inv_std = 1 / sqrt(var + eps), where m2 is that of x times unit */
inline void finish_inv_std(const Grid& grid, const Weights& weights, double eps, ptrdiff_t group,
                           const double* __restrict unit, double* __restrict var,
                           double* __restrict inv_std) {
  const ptrdiff_t first = grid.first_channel(group), last = grid.last_channel(group);
  const double total = weights.total;
  const auto finish = [=](const auto& unit_at) {
    for (ptrdiff_t c = first; c < last; ++c) {
      const double u = unit_at(c), scaled = var[c] / total, scaled_eps = eps * u * u;
      /* The product overflows only where the variance is nothing beside eps. */
      inv_std[c] = scaled_eps <= DBL_MAX ? u / std::sqrt(scaled + scaled_eps) : 1 / std::sqrt(eps);
      var[c] = scaled / u / u;
    }
  };
  if (are_ordinary(unit + first, last - first)) finish([](ptrdiff_t) { return 1.0; });
  else finish([unit](ptrdiff_t c) { return unit[c]; });
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

} // namespace bncore

#endif
