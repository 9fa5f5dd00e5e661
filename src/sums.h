/* Sums: two at a time, in float64, in an order that the lengths alone decide.
 *
 * Every statistic here is a pair of sums over a channel's values:
 *   forward   first = sum w d      second = sum w d^2     d = x - shift, weights w if there are any
 *   backward  first = sum dy       second = sum dy d      d = (x - mean) - mean_lo
 * Terms go into kChains independent vectors, so that additions overlap; a chunk of at most
 * kChunk terms is then folded lane by lane, and chunks are added in twofold arithmetic. An error
 * bound follows: a lane holds few terms, and beyond a chunk nothing is lost.
 */
#ifndef BNCORE_SUMS_H
#define BNCORE_SUMS_H

#include "gates.h"
#include "weights.h"

namespace bncore {

constexpr int kChains = 4;
constexpr ptrdiff_t kStep = kChains * kWide; // elements that one step adds

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

/* Bytes that are fetched ahead, over all arrays that are read: so many that memory's latency has
 * passed when they are needed, and not so many that they leave the cache before.
 *
 * What fetches is always inlined: gcc takes a function that does nothing else for one without an
 * effect, and drops calls to it. */
constexpr ptrdiff_t kFetchAhead = 8192;

/* The caches to fetch to, as the compiler counts them. */
constexpr int kFirstLevel = 3, kSecondLevel = 2;

/* Fetch the lines of n elements; to the second level, as a core has more lines under way there at a
 * time than to its first, unless the first has room for them and nothing else to hold. */
template <int Level = kSecondLevel, class T>
BNCORE_INLINE void prefetch_lines(const T* p, ptrdiff_t n) {
#pragma GCC unroll 8
  for (ptrdiff_t i = 0; i < n; i += kCacheLine / static_cast<ptrdiff_t>(sizeof(T)))
    __builtin_prefetch(p + i, 0, Level);
}

/* Copy n elements, by vectors as far as these go. */
template <class T> BNCORE_INLINE void copy_row(const T* from, ptrdiff_t n, T* to) {
  constexpr ptrdiff_t lanes = kVectorBytes / sizeof(T);
  ptrdiff_t i = 0;
  for (; i + lanes <= n; i += lanes) store_unaligned(to + i, load_unaligned<Floats>(from + i));
  std::memcpy(to + i, from + i, (n - i) * sizeof(T));
}

struct Accumulator {
  Wide first[kChains], second[kChains];

  double first_total() const { return lane_sum((first[0] + first[1]) + (first[2] + first[3])); }
  double second_total() const {
    return lane_sum((second[0] + second[1]) + (second[2] + second[3]));
  }
};

/* What a row adds to the sums: term pairs of the elements at i, or of the k that are left. Scaled:
 * x is first multiplied by a power of two, and shift is that of the products. `keep` copies what
 * was read to where it is kept for the second reading. */
template <class T, bool Scaled, class Weigh> struct Deviations {
  const T* x;
  double shift, unit;
  Weigh weigh;
  T* kept;

  Wide centred(Wide v) const { return Scaled ? v * unit - shift : v - shift; }
  BNCORE_INLINE void prefetch(ptrdiff_t i, ptrdiff_t ahead) const {
    prefetch_lines(x + i + ahead, kStep);
  }
  bool keeps() const { return kept; }
  void keep(ptrdiff_t i, ptrdiff_t n) const { copy_row(x + i, n, kept + i); }
  template <bool Whole> void add(ptrdiff_t i, int k, Wide* first, Wide* second) const {
    Wide d = centred(load_wide<Whole>(x + i, k));
    if (!Whole) d = keep_first(d, k);
    d = weigh.template counted<Whole>(d, i, k);
    const Wide wd = weigh.template times<Whole>(d, i, k);
    *first = plus(*first, wd);
    *second = fma(wd, d, *second);
  }
};

/* Whether the rounding error of a float64 mean matters beside that of the data. */
template <class T> constexpr bool kNeedsLow = sizeof(T) == sizeof(double);

/* Source gives dz, see gates.h; the weights tell what is masked. */
template <class T, class Source, class Weigh> struct GradientTerms {
  Source source;
  const T* x;
  double mean, mean_lo;
  Weigh weigh;
  T *kept_dy, *kept_x;

  Wide centred(Wide v) const { return kNeedsLow<T> ? (v - mean) - mean_lo : v - mean; }
  BNCORE_INLINE void prefetch(ptrdiff_t i, ptrdiff_t ahead) const {
    prefetch_lines(x + i + ahead, kStep);
    prefetch_lines(source.dy + i + ahead, kStep);
  }
  bool keeps() const { return kept_x; }
  void keep(ptrdiff_t i, ptrdiff_t n) const {
    copy_row(source.dy + i, n, kept_dy + i);
    copy_row(x + i, n, kept_x + i);
  }
  template <bool Whole> void add(ptrdiff_t i, int k, Wide* first, Wide* second) const {
    const auto its_x = load_narrow<Whole>(x + i, k);
    Wide g = source.template wide_dz<Whole>(i, k, its_x);
    Wide d = centred(to_wide(latent_of(source, its_x)));
    if (!Whole) d = keep_first(d, k);
    g = weigh.template unmasked<Whole>(g, i, k);
    d = weigh.template unmasked<Whole>(d, i, k);
    *first = plus(*first, g);
    *second = fma(g, d, *second);
  }
};

/* Where the memory is that is read some time later: `near` elements on from those of a row before
 * `turn`, `far` elements on from the others. */
struct Onward {
  ptrdiff_t turn, near, far;

  ptrdiff_t from(ptrdiff_t i) const { return i < turn ? near : far; }
};

template <class Terms>
BNCORE_INLINE void add_step(const Terms& terms, ptrdiff_t i, Onward onward, Accumulator* sums) {
  const ptrdiff_t ahead = onward.from(i);
  terms.prefetch(i, ahead);
#pragma GCC unroll 4
  for (int chain = 0; chain < kChains; ++chain)
    terms.template add<true>(i + chain * kWide, kWide, &sums->first[chain], &sums->second[chain]);
}

/* The elements from i to n, less than a step. Indices are constant: that keeps the accumulators
 * in registers. */
template <class Terms>
BNCORE_INLINE void add_rest(const Terms& terms, ptrdiff_t i, ptrdiff_t n, Accumulator* sums) {
  constexpr int last = kChains - 1;
#pragma GCC unroll 4
  for (int chain = 0; chain < last; ++chain)
    if (i + kWide <= n) {
      terms.template add<true>(i, kWide, &sums->first[chain], &sums->second[chain]);
      i += kWide;
    }
  const int k = static_cast<int>(n - i);
  if (k > 0) terms.template add<false>(i, k, &sums->first[last], &sums->second[last]);
}

/* Add n contiguous elements. */
template <class Terms>
inline void add_row(const Terms& terms, ptrdiff_t n, Onward onward, Accumulator* sums) {
  Accumulator local = *sums;
  ptrdiff_t i = 0;
  for (; i + kStep <= n; i += kStep) add_step(terms, i, onward, &local);
  add_rest(terms, i, n, &local);
  *sums = local;
}

/* -------------------------------------------------------------------------------- columns */

/* A term of the first sum, and what makes it one of the second. */
struct Product {
  Wide first, factor;
};

/* Vectors of a row of columns that are taken together: a cache line or two. */
constexpr int kStripVectors = 4;

/* Whether rows that are summed side by side stand far apart, each at the beginning of a part of all
 * of them: cores whose vectors are shorter than a cache line follow so many streams by themselves,
 * and get more from memory for it. Elsewhere rows are neighbours, and what is read next is fetched.
 */
constexpr bool kFarApart = kVectorBytes < kCacheLine;

/* Fetches what is read next, row after row in the order of memory, which is what the hardware's own
 * prefetchers follow; strips by themselves go from row to row. */
template <class T, int Arrays> struct Ahead {
  static constexpr ptrdiff_t kElements = kFetchAhead / (Arrays * sizeof(T));
  static constexpr ptrdiff_t kWidth = kStripVectors * kWide;
  const T* rows[Arrays];
  ptrdiff_t strides[Arrays], place = 0;

  BNCORE_INLINE void step(ptrdiff_t places) {
#pragma GCC unroll 2
    for (const T* row : rows) prefetch_lines(row + place, kWidth);
    place += kWidth;
    if (place + kWidth <= places) return;
    place = 0;
#pragma GCC unroll 2
    for (int a = 0; a < Arrays; ++a) rows[a] += strides[a];
  }
};

/* Rows of channels side by side: the term pairs of kWide channels from c on, or of the k that are
 * left. Per-channel arrays are padded to whole vectors; what the padding holds is never used. */
template <class T, bool Scaled, class Weigh> struct ColumnDeviations {
  typedef Ahead<T, 1> Fetched;
  const T* x;
  ptrdiff_t x_stride;
  const double *shift, *unit;
  Lines<Weigh> weights;

  Fetched ahead(ptrdiff_t row) const { return {{x + row * x_stride}, {x_stride}}; }

  template <bool Whole> Product at(ptrdiff_t row, ptrdiff_t c, int k) const {
    Wide v = load_wide<Whole>(x + row * x_stride + c, k);
    if (Scaled) v *= load_unaligned<Wide>(unit + c);
    const Weigh its = weights.row(row);
    const Wide d = its.template counted<Whole>(v - load_unaligned<Wide>(shift + c), c, k);
    return {its.template times<Whole>(d, c, k), d};
  }
};

template <class T, class Source, class Weigh> struct ColumnGradientTerms {
  typedef Ahead<T, 2> Fetched;
  Source source;
  const T* x;
  Strides strides;
  ptrdiff_t x_stride;
  const double* mean;
  const double* mean_lo;
  Lines<Weigh> weights;

  Fetched ahead(ptrdiff_t row) const {
    return {{x + row * x_stride, source.dy + row * strides.dy}, {x_stride, strides.dy}};
  }

  template <bool Whole> Product at(ptrdiff_t row, ptrdiff_t c, int k) const {
    const auto its_x = load_narrow<Whole>(x + row * x_stride + c, k);
    Wide d = to_wide(latent_of(source, its_x)) - load_unaligned<Wide>(mean + c);
    if (kNeedsLow<T>) d -= load_unaligned<Wide>(mean_lo + c);
    const Wide g = source.row(row, strides).template wide_dz<Whole>(c, k, its_x);
    const Weigh its = weights.row(row);
    return {its.template unmasked<Whole>(g, c, k), its.template unmasked<Whole>(d, c, k)};
  }
};

/* Rows that are summed side by side: row, row + gap, ..., so many. */
struct Rows {
  ptrdiff_t row, count, gap;
};

/* Add a strip of rows, Vectors vectors wide from place c on. */
template <int Vectors, bool Whole, class Terms>
BNCORE_INLINE void add_strip(const Terms& terms, Rows rows, ptrdiff_t c, int k, ptrdiff_t places,
                             typename Terms::Fetched* ahead, double* first, double* second) {
  Wide one[Vectors] = {}, two[Vectors] = {};
  for (ptrdiff_t i = 0, r = rows.row; i < rows.count; ++i, r += rows.gap) {
    if (!kFarApart && Vectors == kStripVectors) ahead->step(places);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const Product p = terms.template at<Whole>(r, c + v * kWide, k);
      one[v] = plus(one[v], p.first);
      two[v] = fma(p.first, p.factor, two[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    double *to_first = first + c + v * kWide, *to_second = second + c + v * kWide;
    store_unaligned(to_first, load_unaligned<Wide>(to_first) + one[v]);
    store_unaligned(to_second, load_unaligned<Wide>(to_second) + two[v]);
  }
}

/* Add rows of `places` places to first[c] and second[c]. The terms are taken by value: no store can
 * be thought to change them. */
template <class Terms>
inline void add_strips(const Terms terms, Rows rows, ptrdiff_t places, ptrdiff_t rows_ahead,
                       double* first, double* second) {
  constexpr ptrdiff_t wide = kStripVectors * kWide;
  typename Terms::Fetched ahead = terms.ahead(rows.row + rows_ahead);
  ptrdiff_t c = 0;
  for (; c + wide <= places; c += wide)
    add_strip<kStripVectors, true>(terms, rows, c, kWide, places, &ahead, first, second);
  for (; c + kWide <= places; c += kWide)
    add_strip<1, true>(terms, rows, c, kWide, places, &ahead, first, second);
  if (c < places)
    add_strip<1, false>(terms, rows, c, static_cast<int>(places - c), places, &ahead, first,
                        second);
}

/* Add `rows` rows of `places` places to first[c] and second[c]. `strip` at a time are read side by
 * side and summed in registers before the accumulators in memory are touched. Far apart they are so
 * by an odd number, as rows a power of two apart fall into the same places of a cache. */
template <class Terms>
inline void add_columns(const Terms& terms, ptrdiff_t rows, ptrdiff_t places, ptrdiff_t strip,
                        double* first, double* second) {
  const ptrdiff_t rows_ahead = (Terms::Fetched::kElements / places / strip + 1) * strip;
  const auto add = [&](ptrdiff_t row, ptrdiff_t count, ptrdiff_t gap) {
    add_strips(terms, {row, count, gap}, places, rows_ahead, first, second);
  };
  const ptrdiff_t gap = kFarApart && rows >= strip ? (rows / strip - 1) | 1 : 0;
  for (ptrdiff_t row = 0; row < gap; ++row) add(row, strip, gap);
  for (ptrdiff_t row = gap * strip; row < rows; row += strip)
    add(row, row + strip < rows ? strip : rows - row, 1);
}

} // namespace bncore

#endif
