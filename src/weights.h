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

struct Mask {
  const int8_t* values;

  template <bool Whole, class V> V counted(V v, ptrdiff_t i, int k) const {
    return load_lanes<V, Whole>(values + i, k) ? v : V{};
  }
  template <bool Whole, class V> V times(V v, ptrdiff_t, int) const { return v; }
  template <bool Whole, class V> V unmasked(V v, ptrdiff_t i, int k) const {
    return counted<Whole>(v, i, k);
  }
};

struct Weighting {
  const double* values;

  template <bool Whole, class V> V counted(V v, ptrdiff_t i, int k) const {
    return load_doubles<V, Whole>(values + i, k) > V{} ? v : V{};
  }
  template <bool Whole, class V> V times(V v, ptrdiff_t i, int k) const {
    return load_doubles<V, Whole>(values + i, k) * v;
  }
  template <bool Whole, class V> V unmasked(V v, ptrdiff_t i, int k) const {
    return load_doubles<V, Whole>(values + i, k) < V{} ? V{} : v;
  }
};

/* The weights of several lines, one after the other, as columns ask for them. */
template <class Weigh> struct Lines {
  const decltype(Weigh::values) first;
  ptrdiff_t stride;

  Weigh row(ptrdiff_t r) const { return {first + r * stride}; }
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

  Weigh row(ptrdiff_t n, ptrdiff_t s) const { return {data + n * n_stride + s}; }
};
typedef SomePositions<int8_t, Mask> MaskedPositions;
typedef SomePositions<double, Weighting> WeightedPositions;

/* Room to spread the weights of up to Rows lines of at most Places places over those: a position's
 * weight once for each of its channels. */
template <class Positions, ptrdiff_t Rows, ptrdiff_t Places> struct Spread;

template <ptrdiff_t Rows, ptrdiff_t Places> struct Spread<EveryPosition, Rows, Places> {
  static constexpr ptrdiff_t kRows = PTRDIFF_MAX;
  Lines<Unweighted> lines(EveryPosition, ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t) {
    return {};
  }
};

template <class Value, class Weigh, ptrdiff_t Rows, ptrdiff_t Places>
struct Spread<SomePositions<Value, Weigh>, Rows, Places> {
  static constexpr ptrdiff_t kRows = Rows;
  static constexpr ptrdiff_t kSplat = 16 / sizeof(Value);
  typedef Value Splat __attribute__((vector_size(16)));
  Value values[Rows * Places + kSplat];

  /* Of the positions (n, s) from n on, each n with `inner` of them, for so many channels. */
  Lines<Weigh> lines(SomePositions<Value, Weigh> from, ptrdiff_t n, ptrdiff_t count,
                     ptrdiff_t stride, ptrdiff_t channels, ptrdiff_t inner) {
    Value* to = values;
    for (const Value* w = from.data + n * inner; count > 0; --count, w += inner) {
      /* A vector may reach beyond the last channel: what follows is written next. */
      for (ptrdiff_t c = 0; inner == 1 && c < channels; c += kSplat)
        store_unaligned(to + c, *w - Splat{});
      for (ptrdiff_t c = 0; inner > 1 && c < channels; ++c)
        std::memcpy(to + c * inner, w, inner * sizeof(Value));
      to += channels * inner;
    }
    return {values, stride};
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
