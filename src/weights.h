/* Weights of positions: how much a value counts in the statistics.
 *
 *   mean = sum w x / W        m2 = sum w (x - mean)^2        W = sum w
 *
 * A weight is 0 or more. A negative one marks a masked position: it counts for nothing, has no y
 * and no gradient, and what stands there, be it NaN, is not looked at. All channels share the
 * weight of a position: an element of a row has one of its own, a line of channels side by side
 * one in common.
 */
#ifndef BNCORE_WEIGHTS_H
#define BNCORE_WEIGHTS_H

#include "simd.h"

namespace bncore {

/* The weights of the elements of a row or line, in vectors V. */
struct Unweighted {
  static constexpr bool kAny = false;
  Unweighted row(ptrdiff_t) const { return {}; }
};

struct RowWeights {
  static constexpr bool kAny = true;
  const double* values;

  template <class V, bool Whole> V at(ptrdiff_t i, int k) const {
    return load_doubles<V, Whole>(values + i, k);
  }
};

/* One weight for the whole line, those of the lines after it side by side. */
struct LineWeights {
  static constexpr bool kAny = true;
  const double* values;

  LineWeights row(ptrdiff_t r) const { return {values + r}; }
  template <class V, bool Whole> V at(ptrdiff_t, int) const {
    typedef std::remove_reference_t<decltype(std::declval<V>()[0])> Real;
    return static_cast<Real>(*values) - V{};
  }
};

/* v where a position is not masked, else 0. */
template <bool Whole, class Weigh, class V>
BNCORE_INLINE V unmasked(const Weigh& weigh, V v, ptrdiff_t i, int k) {
  if constexpr (Weigh::kAny) return weigh.template at<V, Whole>(i, k) < V{} ? V{} : v;
  else return v;
}

/* The weights of a whole tensor: w[n, s] = data[n * n_stride + s], with S = 1 in columns. */
struct Weights {
  const double* data; // null: all are 1
  ptrdiff_t n_stride;
  double total;         // W, or the number of positions
  ptrdiff_t first_used; // the first position n * S + s that counts

  /* Calls visit with EveryPosition or with these weights. */
  template <class Visit> void visit(const Visit& visit) const;
};

/* What gives the weights of a row or line: Rows tells which of the two it is. */
struct EveryPosition {
  template <bool Rows> Unweighted at(ptrdiff_t, ptrdiff_t) const { return {}; }
};

struct WeightedPositions {
  const double* data;
  ptrdiff_t n_stride;

  template <bool Rows> auto at(ptrdiff_t n, ptrdiff_t s) const {
    const double* values = data + n * n_stride + s;
    if constexpr (Rows) return RowWeights{values};
    else return LineWeights{values};
  }
};

template <class Visit> void Weights::visit(const Visit& visit) const {
  if (data) visit(WeightedPositions{data, n_stride});
  else visit(EveryPosition());
}

} // namespace bncore

#endif
