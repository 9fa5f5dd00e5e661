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

/* Where the weights of a row come from. */
struct EveryPosition {
  typedef char Value;
  static constexpr bool kAny = false;
  Unweighted row(ptrdiff_t, ptrdiff_t) const { return {}; }
};

template <class V, class Weigh> struct SomePositions {
  typedef V Value;
  static constexpr bool kAny = true;
  const Value* data;
  ptrdiff_t n_stride;

  Weigh row(ptrdiff_t n, ptrdiff_t s) const { return {data + n * n_stride + s, false}; }
};
typedef SomePositions<int8_t, Mask> MaskedPositions;
typedef SomePositions<double, Weighting> WeightedPositions;

/* Lines of positions from n on: `tile` of them in a line, each with so many channels and `inner`
 * positions a channel. */
struct LinesAt {
  ptrdiff_t n, lines, tile, channels, inner;
};

/* Room to spread the weights of up to Rows lines of at most Places places over those: a position's
 * weight once for each of its channels. A line of a single position needs none. */
template <class Positions, ptrdiff_t Rows, ptrdiff_t Places> struct Spread;

template <ptrdiff_t Rows, ptrdiff_t Places> struct Spread<EveryPosition, Rows, Places> {
  static ptrdiff_t rows_at_once(ptrdiff_t, ptrdiff_t) { return PTRDIFF_MAX; }
  Lines<Unweighted> lines(EveryPosition, LinesAt) { return {}; }
};

template <class Value, class Weigh, ptrdiff_t Rows, ptrdiff_t Places>
struct Spread<SomePositions<Value, Weigh>, Rows, Places> {
  static constexpr ptrdiff_t kSplat = 16 / sizeof(Value);
  typedef Value Splat __attribute__((vector_size(16)));
  Value values[Rows * Places + kSplat];

  static ptrdiff_t rows_at_once(ptrdiff_t tile, ptrdiff_t inner) {
    return tile == 1 && inner == 1 ? PTRDIFF_MAX : Rows;
  }
  Lines<Weigh> lines(SomePositions<Value, Weigh> from, LinesAt at) {
    const Value* w = from.data + at.n * at.inner;
    if (at.tile == 1 && at.inner == 1) return {w, 1, true};
    Value* to = values;
    for (ptrdiff_t i = at.lines * at.tile; i > 0; --i, w += at.inner) {
      /* A vector may reach beyond the last channel: what follows is written next. */
      for (ptrdiff_t c = 0; at.inner == 1 && c < at.channels; c += kSplat)
        store_unaligned(to + c, *w - Splat{});
      for (ptrdiff_t c = 0; at.inner > 1 && c < at.channels; ++c)
        std::memcpy(to + c * at.inner, w, at.inner * sizeof(Value));
      to += at.channels * at.inner;
    }
    return {values, at.tile * at.channels * at.inner, false};
  }
};

/* The weights of a whole tensor: w[n, s] = data[n * n_stride + s], with S = 1 in columns. */
struct Weights {
  const double* values; // both null: all weights are 1
  const int8_t* mask;
  ptrdiff_t n_stride;
  double total;         // W, or the number of positions
  ptrdiff_t first_used; // the first position n * S + s that counts

  bool any() const { return values || mask; }
  /* Calls visit with what gives them; visit_some only where there are any. */
  template <class Visit> void visit_some(const Visit& visit) const {
    if (mask) visit(MaskedPositions{mask, n_stride});
    else visit(WeightedPositions{values, n_stride});
  }
  template <class Visit> void visit(const Visit& visit) const {
    if (any()) visit_some(visit);
    else visit(EveryPosition());
  }
};

} // namespace bncore

#endif
