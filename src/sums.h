/* Sums: two at a time, in float64, in an order that the lengths alone decide.
 *
 * Every statistic here is a pair of sums over a channel's values:
 *   forward   first = sum d        second = sum d^2       d = x - shift
 *   backward  first = sum dy       second = sum dy d      d = (x - mean) - mean_lo
 * Terms go into kChains independent vectors, so that additions overlap; a chunk of at most
 * kChunk terms is then folded lane by lane, and chunks are added in twofold arithmetic. An error
 * bound follows: a lane holds few terms, and beyond a chunk nothing is lost.
 */
#ifndef BNCORE_SUMS_H
#define BNCORE_SUMS_H

#include "simd.h"

namespace bncore {

constexpr int kChains = 4;

/* Terms in a chunk: float64 input needs short chains for its 1e-14, others need not. */
template <class T> constexpr ptrdiff_t kChunk = 16384;
template <> inline constexpr ptrdiff_t kChunk<double> = 1024;

/* hi + lo += v, where hi + lo is an unevaluated sum of two (Knuth's two-sum). A sum that is not
 * finite keeps no error term. */
BNCORE_INLINE void two_sum(double v, double* hi, double* lo) {
  const double total = *hi + v, taken = total - *hi;
  const double error = (*hi - (total - taken)) + (v - taken);
  *lo += error - error == 0 ? error : 0;
  *hi = total;
}

struct Accumulator {
  Wide first[kChains], second[kChains];

  double first_total() const { return lane_sum((first[0] + first[1]) + (first[2] + first[3])); }
  double second_total() const {
    return lane_sum((second[0] + second[1]) + (second[2] + second[3]));
  }
};

/* What a row adds to the sums: term pairs of the elements at i. */
template <class T> struct Deviations {
  const T* x;
  double shift;

  void prefetch(ptrdiff_t i, ptrdiff_t ahead) const { __builtin_prefetch(x + i + ahead); }
  void full(ptrdiff_t i, Wide* first, Wide* second) const {
    Wide d = Element<T>::load_wide(x + i) - shift;
    *first += d;
    *second = fma(d, d, *second);
  }
  void part(ptrdiff_t i, int k, Wide* first, Wide* second) const {
    Wide d = keep_first(load_wide_part(x + i, k) - shift, k);
    *first += d;
    *second = fma(d, d, *second);
  }
};

template <class T> struct GradientTerms {
  const T* dy;
  const T* x;
  double mean, mean_lo;

  void prefetch(ptrdiff_t i, ptrdiff_t ahead) const {
    __builtin_prefetch(x + i + ahead);
    __builtin_prefetch(dy + i + ahead);
  }
  void full(ptrdiff_t i, Wide* first, Wide* second) const {
    Wide g = Element<T>::load_wide(dy + i);
    *first += g;
    *second = fma(g, (Element<T>::load_wide(x + i) - mean) - mean_lo, *second);
  }
  void part(ptrdiff_t i, int k, Wide* first, Wide* second) const {
    Wide g = load_wide_part(dy + i, k);
    *first += g;
    *second = fma(g, keep_first((load_wide_part(x + i, k) - mean) - mean_lo, k), *second);
  }
};

/* Elements that one step adds. Prefetches are for memory `ahead` elements further on. */
constexpr ptrdiff_t kStep = kChains * kWide;

template <class Terms>
BNCORE_INLINE void add_step(const Terms& terms, ptrdiff_t i, ptrdiff_t ahead, Accumulator* sums) {
  terms.prefetch(i, ahead);
  if (kVectorBytes == 64) terms.prefetch(i + kStep / 2, ahead);
#pragma GCC unroll 4
  for (int chain = 0; chain < kChains; ++chain)
    terms.full(i + chain * kWide, &sums->first[chain], &sums->second[chain]);
}

/* The elements from i to n, less than a step. Indices are constant: that keeps the accumulators
 * in registers. */
template <class Terms>
BNCORE_INLINE void add_rest(const Terms& terms, ptrdiff_t i, ptrdiff_t n, Accumulator* sums) {
  constexpr int last = kChains - 1;
#pragma GCC unroll 4
  for (int chain = 0; chain < last; ++chain)
    if (i + kWide <= n) {
      terms.full(i, &sums->first[chain], &sums->second[chain]);
      i += kWide;
    }
  if (i < n) terms.part(i, static_cast<int>(n - i), &sums->first[last], &sums->second[last]);
}

/* Add n contiguous elements. */
template <class Terms>
inline void add_row(const Terms& terms, ptrdiff_t n, ptrdiff_t ahead, Accumulator* sums) {
  Accumulator local = *sums;
  ptrdiff_t i = 0;
  for (; i + kStep <= n; i += kStep) add_step(terms, i, ahead, &local);
  add_rest(terms, i, n, &local);
  *sums = local;
}

/* -------------------------------------------------------------------------------- columns */

/* A term of the first sum, and what makes it one of the second. */
struct Product {
  Wide first, factor;
};

/* Rows of channels side by side: the term pairs of kWide channels from c on, or of the k that are
 * left. Per-channel arrays are padded to whole vectors; what the padding holds is never used. */
template <class T> struct ColumnDeviations {
  const T* x;
  ptrdiff_t x_stride;
  const double* shift;

  void prefetch(ptrdiff_t row, ptrdiff_t c) const { __builtin_prefetch(x + row * x_stride + c); }

  template <bool Whole> Product at(ptrdiff_t row, ptrdiff_t c, int k) const {
    Wide d = load_wide<Whole>(x + row * x_stride + c, k) - load_unaligned<Wide>(shift + c);
    return {d, d};
  }
};

template <class T> struct ColumnGradientTerms {
  const T* dy;
  ptrdiff_t dy_stride;
  const T* x;
  ptrdiff_t x_stride;
  const double* mean;
  const double* mean_lo;

  void prefetch(ptrdiff_t row, ptrdiff_t c) const {
    __builtin_prefetch(x + row * x_stride + c);
    __builtin_prefetch(dy + row * dy_stride + c);
  }

  template <bool Whole> Product at(ptrdiff_t row, ptrdiff_t c, int k) const {
    Wide d = load_wide<Whole>(x + row * x_stride + c, k) - load_unaligned<Wide>(mean + c);
    return {load_wide<Whole>(dy + row * dy_stride + c, k), d - load_unaligned<Wide>(mean_lo + c)};
  }
};

/* Rows summed as a tree before an accumulator in memory is touched. */
constexpr int kTreeRows = 8;

template <int Rows, bool Whole, class Terms>
BNCORE_INLINE void tree(const Terms& terms, ptrdiff_t row, ptrdiff_t c, int k, Wide* first,
                        Wide* second) {
  if constexpr (Rows == 2) {
    const Product a = terms.template at<Whole>(row, c, k);
    const Product b = terms.template at<Whole>(row + 1, c, k);
    *first = a.first + b.first;
    *second = fma(b.first, b.factor, a.first * a.factor);
  } else {
    Wide more_first, more_second;
    tree<Rows / 2, Whole>(terms, row, c, k, first, second);
    tree<Rows / 2, Whole>(terms, row + Rows / 2, c, k, &more_first, &more_second);
    *first += more_first;
    *second += more_second;
  }
}

template <int Rows, bool Whole, class Terms>
BNCORE_INLINE void add_tree(const Terms& terms, ptrdiff_t row, ptrdiff_t c, int k, double* first,
                            double* second) {
  Wide one = load_unaligned<Wide>(first + c), two = load_unaligned<Wide>(second + c);
  if constexpr (Rows == 1) {
    const Product a = terms.template at<Whole>(row, c, k);
    one += a.first;
    two = fma(a.first, a.factor, two);
  } else {
    Wide a, b;
    tree<Rows, Whole>(terms, row, c, k, &a, &b);
    one += a;
    two += b;
  }
  store_unaligned(first + c, one);
  store_unaligned(second + c, two);
}

template <int Rows, class Terms>
inline void add_rows(const Terms& terms, ptrdiff_t row, ptrdiff_t channels, ptrdiff_t ahead,
                     double* first, double* second) {
  ptrdiff_t c = 0;
  for (; c + 2 * kWide <= channels; c += 2 * kWide) {
    if (ahead)
      for (int r = 0; r < Rows; ++r) terms.prefetch(row + r + ahead, c);
    add_tree<Rows, true>(terms, row, c, kWide, first, second);
    add_tree<Rows, true>(terms, row, c + kWide, kWide, first, second);
  }
  for (; c + kWide <= channels; c += kWide)
    add_tree<Rows, true>(terms, row, c, kWide, first, second);
  if (c < channels)
    add_tree<Rows, false>(terms, row, c, static_cast<int>(channels - c), first, second);
}

/* Add `rows` rows of `channels` channels to first[c] and second[c]; fetch those `ahead` rows on. */
template <class Terms>
inline void add_columns(const Terms& terms, ptrdiff_t rows, ptrdiff_t channels, ptrdiff_t ahead,
                        double* first, double* second) {
  ptrdiff_t row = 0;
  for (; row + kTreeRows <= rows; row += kTreeRows)
    add_rows<kTreeRows>(terms, row, channels, ahead, first, second);
  for (; row < rows; ++row) add_rows<1>(terms, row, channels, 0, first, second);
}

} // namespace bncore

#endif
