/* Weights of positions: how much a value counts in the statistics.
 *
 *   mean = sum w x / W        m2 = sum w (x - mean)^2        W = sum w
 *
 * A weight is 0 or more. A negative one marks a masked position: it counts for nothing, has no y
 * and no gradient, and what stands there, be it NaN, is not looked at. Where there is nothing but
 * a mask it is kept as bytes, -1 where a position counts, else 0. All channels share the weight of
 * a position: an element of a row has one of its own, a line of channels side by side one in
 * common.
 */
#ifndef BNCORE_WEIGHTS_H
#define BNCORE_WEIGHTS_H

#include "simd.h"

namespace bncore {

/* What weights do to a vector of values from element i on, or to the k that are left:
 *   counted   v, or 0 where the position does not count in the statistics
 *   times     w v, for counted values
 *   unmasked  v, or 0 where the position is masked */

struct Unweighted {
  Unweighted row(ptrdiff_t) const { return {}; }
  template <bool Whole, class V> V counted(V v, ptrdiff_t, int) const { return v; }
  template <bool Whole, class V> V times(V v, ptrdiff_t, int) const { return v; }
  template <bool Whole, class V> V unmasked(V v, ptrdiff_t, int) const { return v; }
};

/* A mask: of the elements of a row, or one for a whole line and for those after it side by side. */
template <bool Row> struct Mask {
  const int8_t* values;

  Mask row(ptrdiff_t r) const { return {values + r}; }
  template <bool Whole, class V> V counted(V v, ptrdiff_t i, int k) const {
    if constexpr (Row) return load_lanes<V, Whole>(values + i, k) ? v : V{};
    else return *values ? v : V{};
  }
  template <bool Whole, class V> V times(V v, ptrdiff_t, int) const { return v; }
  template <bool Whole, class V> V unmasked(V v, ptrdiff_t i, int k) const {
    return counted<Whole>(v, i, k);
  }
};

/* The same of weights. */
template <bool Row> struct Weighting {
  const double* values;

  Weighting row(ptrdiff_t r) const { return {values + r}; }
  template <class V, bool Whole> V at(ptrdiff_t i, int k) const {
    typedef std::remove_reference_t<decltype(std::declval<V>()[0])> Real;
    if constexpr (Row) return load_doubles<V, Whole>(values + i, k);
    else return static_cast<Real>(*values) - V{};
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

/* What gives the weights of a row or line: Row tells which of the two it is. */
struct EveryPosition {
  static constexpr bool kAny = false;
  template <bool Row> Unweighted at(ptrdiff_t, ptrdiff_t) const { return {}; }
};

template <class Value, template <bool> class Weigh> struct SomePositions {
  static constexpr bool kAny = true;
  const Value* data;
  ptrdiff_t n_stride;

  template <bool Row> Weigh<Row> at(ptrdiff_t n, ptrdiff_t s) const {
    return {data + n * n_stride + s};
  }
};
typedef SomePositions<int8_t, Mask> MaskedPositions;
typedef SomePositions<double, Weighting> WeightedPositions;

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
