/* Weights of positions: how much a value counts in the statistics.
 *
 *   mean = sum w x / W        m2 = sum w (x - mean)^2        W = sum w
 *
 * A weight is 0 or more. A negative one marks a masked position: it counts for nothing, has no y
 * and no gradient, and what stands there, be it NaN, is not looked at. Where there is nothing but
 * a mask it is kept as bytes, -1 where a position counts, else 0. All channels share the weight of
 * a position: on a line of channels side by side it is spread over them.
 */
#ifndef BNCORE_WEIGHTS_H
#define BNCORE_WEIGHTS_H

#include <cstdint>

#include "simd.h"

namespace bncore {

/* What weights do to a vector of values from element i on, or to the k that are left:
 *   counted   v, or 0 where the position does not count in the statistics
 *   times     w v, for counted values
 *   unmasked  v, or 0 where the position is masked */

struct Unweighted {
  template <bool Whole, class V> V counted(V v, ptrdiff_t, int) const { return v; }
  template <bool Whole, class V> V times(V v, ptrdiff_t, int) const { return v; }
  template <bool Whole, class V> V unmasked(V v, ptrdiff_t, int) const { return v; }
};

/* Equal: all elements have the weight of the first. */
struct Mask {
  const int8_t* values;
  bool equal;

  template <bool Whole, class V> V counted(V v, ptrdiff_t i, int k) const {
    if (equal) return *values ? v : V{};
    return load_lanes<V, Whole>(values + i, k) ? v : V{};
  }
  template <bool Whole, class V> V times(V v, ptrdiff_t, int) const { return v; }
  template <bool Whole, class V> V unmasked(V v, ptrdiff_t i, int k) const {
    return counted<Whole>(v, i, k);
  }
};

struct Weighting {
  const double* values;
  bool equal;

  template <class V, bool Whole> V at(ptrdiff_t i, int k) const {
    typedef std::remove_reference_t<decltype(std::declval<V>()[0])> Real;
    if (equal) return static_cast<Real>(*values) - V{};
    return load_doubles<V, Whole>(values + i, k);
  }
  template <bool Whole, class V> V counted(V v, ptrdiff_t i, int k) const {
    return at<V, Whole>(i, k) > V{} ? v : V{};
  }
  template <bool Whole, class V> V times(V v, ptrdiff_t i, int k) const {
    return at<V, Whole>(i, k) * v;
  }
  template <bool Whole, class V> V unmasked(V v, ptrdiff_t i, int k) const {
    return at<V, Whole>(i, k) < V{} ? V{} : v;
  }
};

/* The weights of several lines, one after the other, as columns ask for them. */
template <class Weigh> struct Lines {
  decltype(Weigh::values) first;
  ptrdiff_t stride;
  bool equal;

  Weigh row(ptrdiff_t r) const { return {first + r * stride, equal}; }
};

template <> struct Lines<Unweighted> {
  Unweighted row(ptrdiff_t) const { return {}; }
};

/* Lines [begin, end) of columns, which all count or are all masked. */
struct Run {
  ptrdiff_t begin, end;
  bool counts;
};

/* Where the weights of a row come from. */
struct EveryPosition {
  typedef char Value;
  static constexpr bool kAny = false;
  const int8_t* lines = nullptr; // a mask of whole lines of columns; null: all count

  Unweighted row(ptrdiff_t, ptrdiff_t) const { return {}; }
  Run run(ptrdiff_t n, ptrdiff_t end) const {
    if (!lines) return {n, end, true};
    const int8_t its = lines[n];
    const void* other = std::memchr(lines + n, its ? 0 : -1, end - n);
    return {n, other ? static_cast<const int8_t*>(other) - lines : end, its != 0};
  }
};

template <class V, class Weigh> struct SomePositions {
  typedef V Value;
  static constexpr bool kAny = true;
  const Value* data;
  ptrdiff_t n_stride, s_stride; // s_stride: 1, or 0 where all positions of one n weigh the same

  bool equal() const { return s_stride == 0; }
  Run run(ptrdiff_t n, ptrdiff_t end) const { return {n, end, true}; }
  Weigh row(ptrdiff_t n, ptrdiff_t s) const {
    return {data + n * n_stride + s * s_stride, equal()};
  }
};
typedef SomePositions<int8_t, Mask> MaskedPositions;
typedef SomePositions<double, Weighting> WeightedPositions;

/* Lines of positions from n on: `tile` of them in a line, each with so many channels and `inner`
 * positions a channel. */
struct LinesAt {
  ptrdiff_t n, lines, tile, channels, inner;
};

/* Room to spread the weights of up to Rows lines of at most Places places over those: a position's
 * weight once for each of its channels. A line of one weight needs none. */
template <class Positions, ptrdiff_t Rows, ptrdiff_t Places> struct Spread;

template <ptrdiff_t Rows, ptrdiff_t Places> struct Spread<EveryPosition, Rows, Places> {
  static ptrdiff_t rows_at_once(EveryPosition, ptrdiff_t) { return PTRDIFF_MAX; }
  Lines<Unweighted> lines(EveryPosition, LinesAt) { return {}; }
};

template <class Value, class Weigh, ptrdiff_t Rows, ptrdiff_t Places>
struct Spread<SomePositions<Value, Weigh>, Rows, Places> {
  static constexpr ptrdiff_t kSplat = 16 / sizeof(Value);
  typedef Value Splat __attribute__((vector_size(16)));
  Value values[Rows * Places + kSplat];

  static ptrdiff_t rows_at_once(SomePositions<Value, Weigh> from, ptrdiff_t tile) {
    return tile == 1 && from.equal() ? PTRDIFF_MAX : Rows;
  }
  Lines<Weigh> lines(SomePositions<Value, Weigh> from, LinesAt at) {
    const Value* w = from.data + at.n * from.n_stride;
    if (at.tile == 1 && from.equal()) return {w, from.n_stride, true};
    const ptrdiff_t places = at.channels * at.inner;
    Value* to = values;
    for (ptrdiff_t i = at.lines * at.tile; i > 0; --i, w += from.n_stride, to += places) {
      /* A vector may reach beyond the last place: what follows is written next. */
      for (ptrdiff_t p = 0; from.equal() && p < places; p += kSplat)
        store_unaligned(to + p, *w - Splat{});
      for (ptrdiff_t p = 0; !from.equal() && p < places; p += at.inner)
        std::memcpy(to + p, w, at.inner * sizeof(Value));
    }
    return {values, at.tile * places, false};
  }
};

/* The weights of a whole tensor: w[n, s] = data[n * n_stride + s * s_stride], with strides as in
 * SomePositions. */
struct Weights {
  const double* values; // both null: all weights are 1
  const int8_t* mask;
  ptrdiff_t n_stride, s_stride;
  bool masking;         // whether positions are masked
  bool in_runs;         // whether whole rows or lines are, many after one another
  double total;         // W, or the number of positions
  ptrdiff_t first_used; // the first position n * S + s that counts

  bool any() const { return values || mask; }
  /* What is left of them where only masks matter. */
  Weights just_masks() const {
    Weights weights = *this;
    if (!masking) weights.values = nullptr, weights.mask = nullptr;
    return weights;
  }
  /* Whether lines of columns are taken run by run, as there is nothing but a mask of them. */
  bool by_line(bool columns) const { return columns && mask && in_runs; }
  EveryPosition lines(bool columns) const { return {by_line(columns) ? mask : nullptr}; }

  /* Calls visit with what gives them; visit_some only where a position has a weight of its own. */
  template <class Visit> void visit_some(const Visit& visit) const {
    if (mask) visit(MaskedPositions{mask, n_stride, s_stride});
    else visit(WeightedPositions{values, n_stride, s_stride});
  }
  template <class Visit> void visit(bool columns, const Visit& visit) const {
    if (any() && !by_line(columns)) visit_some(visit);
    else visit(lines(columns));
  }
};

} // namespace bncore

#endif
