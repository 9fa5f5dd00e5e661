/* Activations, and z, the value they are applied to:
 *
 *   z = (x - mean) scale + offset [+ residual]      offset = beta - mean_lo scale
 *
 * Coefficients are one value for a whole row (channel-major) or one value per channel (columns);
 * a formula does not care which.
 */
#ifndef BNCORE_ACTIVATIONS_H
#define BNCORE_ACTIVATIONS_H

#include <cmath>

#include "simd.h"

namespace bncore {

/* --------------------------------------------------------------------- elements, coefficients */

/* Elements at p in vectors V, which are Vec or Narrow; the first k of them where not Whole. */
template <class V, bool Whole, class T> inline V load_as(const T* p, int k) {
  if constexpr (sizeof(V) < sizeof(typename Element<T>::Vec)) return load_narrow<Whole>(p, k);
  else return Whole ? Element<T>::load(p) : Element<T>::load_part(p, k);
}

/* One value for all elements of a row. */
template <class T> struct Uniform {
  typename Element<T>::Real value;
  template <class V> V as(ptrdiff_t) const { return value - V{}; }
  typename Element<T>::Vec at(ptrdiff_t i) const { return as<typename Element<T>::Vec>(i); }
};

/* A value per place of a line, padded to whole vectors. */
template <class T> struct PerPlace {
  const typename Element<T>::Real* values;
  template <class V> V as(ptrdiff_t i) const { return load_unaligned<V>(values + i); }
  typename Element<T>::Vec at(ptrdiff_t i) const { return as<typename Element<T>::Vec>(i); }
};

/* ------------------------------------------------------------------------------ activations */

/* What is applied after gamma and beta. */
struct Epilogue {
  int activation; // 0 none, 1 clip to [a, b], 2 slope a below zero; 3 see OutputSource
  double a, b;
};

/* Comparisons are written so that a NaN stays one. */
template <class T> struct Identity {
  explicit Identity(Epilogue) {}
  template <class V> V operator()(V z) const { return z; }
};

template <class T> struct Clip {
  typename Element<T>::Real low, high;
  explicit Clip(Epilogue e)
      : low(static_cast<decltype(low)>(e.a)), high(static_cast<decltype(high)>(e.b)) {}
  template <class V> V operator()(V z) const {
    return least(high - V{}, most(low - V{}, z));
  }
};

template <class T> struct LeakyRelu {
  typename Element<T>::Real slope;
  explicit LeakyRelu(Epilogue e) : slope(static_cast<decltype(slope)>(e.a)) {}
  template <class V> V operator()(V z) const { return z < V{} ? z * slope : z; }
};

/* All of them in one, for instances that are not worth having three times. */
template <class T> struct AnyActivation {
  typename Element<T>::Real slope, low, high;
  explicit AnyActivation(Epilogue e)
      : slope(static_cast<decltype(slope)>(e.activation == 2 ? e.a : 1)),
        low(static_cast<decltype(low)>(e.activation == 1 ? e.a : -HUGE_VAL)),
        high(static_cast<decltype(high)>(e.activation == 1 ? e.b : HUGE_VAL)) {}
  template <class V> V operator()(V z) const {
    return least(high - V{}, most(low - V{}, z < V{} ? z * slope : z));
  }
};

/* ---------------------------------------------------------------------------------------- z */

/* z of a row or line. Scaled: x is first multiplied by a power of two, see unit_of in
 * coefficients.h. */
template <class T, template <class> class Coefficient, bool Residual, bool Scaled> struct Latent {
  const T* x;
  const T* residual;
  Coefficient<T> mean, scale, offset, unit;

  template <class V, bool Whole> BNCORE_INLINE V z(ptrdiff_t i, int k) const {
    V v = load_as<V, Whole>(x + i, k);
    if (Scaled) v *= unit.template as<V>(i);
    const V d = v - mean.template as<V>(i);
    v = fma(d, scale.template as<V>(i), offset.template as<V>(i));
    return Residual ? v + load_as<V, Whole>(residual + i, k) : v;
  }
};

} // namespace bncore

#endif
