/* Activations, and what a forward and a backward pass have in common: z, the value an activation
 * is applied to, is computed from x once for y and again, in the same way, for the gradient.
 *
 *   z = ((x - mean_hi) - mean_lo) scale + offset [+ residual]
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
  int activation; // 0 none, 1 clip to [a, b], 2 slope a below zero
  double a, b;
};

/* Comparisons are written so that a NaN stays one. */
template <class T> struct Identity {
  template <class V> V operator()(V z) const { return z; }
};

template <class T> struct Clip {
  typename Element<T>::Real low, high;
  explicit Clip(Epilogue e)
      : low(static_cast<decltype(low)>(e.a)), high(static_cast<decltype(high)>(e.b)) {}
  template <class V> V operator()(V z) const {
    const V floor = low - V{}, ceiling = high - V{};
    z = z < floor ? floor : z;
    return z > ceiling ? ceiling : z;
  }
};

template <class T> struct LeakyRelu {
  typename Element<T>::Real slope;
  explicit LeakyRelu(Epilogue e) : slope(static_cast<decltype(slope)>(e.a)) {}
  template <class V> V operator()(V z) const { return z < V{} ? z * slope : z; }
};

/* The gradient of any of them: dz = dy between low and high, elsewhere dy times `outside`, or 0
 * whatever dy is. */
template <class T> struct Gate {
  typename Element<T>::Real low, high, outside;
  explicit Gate(Epilogue e)
      : low(static_cast<decltype(low)>(e.activation == 1 ? e.a : 0)),
        high(static_cast<decltype(high)>(e.activation == 1 ? e.b : HUGE_VAL)),
        outside(static_cast<decltype(outside)>(e.activation == 1 ? 0 : e.a)) {}
  template <class V> V operator()(V z, V dy) const {
    const V floor = low - V{}, ceiling = high - V{}, otherwise = outside == 0 ? V{} : dy * outside;
    return (z <= floor) | (z >= ceiling) ? otherwise : dy;
  }
};

/* ------------------------------------------------------------------------------------ z, dz */

/* z of a row or line. Scaled: x is first multiplied by a power of two, see unit_of in blocks.h. */
template <class T, template <class> class Coefficient, bool Residual, bool Scaled> struct Latent {
  const T* x;
  const T* residual;
  Coefficient<T> mean_hi, mean_lo, scale, offset, unit;

  template <class V, bool Whole> V z(ptrdiff_t i, int k) const {
    V v = load_as<V, Whole>(x + i, k);
    if (Scaled) v *= unit.template as<V>(i);
    const V d = (v - mean_hi.template as<V>(i)) - mean_lo.template as<V>(i);
    v = fma(d, scale.template as<V>(i), offset.template as<V>(i));
    return Residual ? v + load_as<V, Whole>(residual + i, k) : v;
  }
};

/* Elements from one row to the next. */
struct Strides {
  ptrdiff_t dy, x, residual;
};

/* dz = dy, where there is no activation. */
template <class T> struct PlainSource {
  const T* dy;

  template <class V, bool Whole> V dz(ptrdiff_t i, int k) const {
    return load_as<V, Whole>(dy + i, k);
  }
  PlainSource row(ptrdiff_t r, Strides strides) const { return {dy + r * strides.dy}; }
};

/* dz = act'(z) dy */
template <class T, template <class> class Coefficient, bool Residual> struct GatedSource {
  const T* dy;
  Latent<T, Coefficient, Residual, true> latent;
  Gate<T> gate;

  template <class V, bool Whole> V dz(ptrdiff_t i, int k) const {
    return gate(latent.template z<V, Whole>(i, k), load_as<V, Whole>(dy + i, k));
  }
  GatedSource row(ptrdiff_t r, Strides strides) const {
    GatedSource moved = *this;
    moved.dy += r * strides.dy;
    moved.latent.x += r * strides.x;
    if (Residual) moved.latent.residual += r * strides.residual;
    return moved;
  }
};

} // namespace bncore

#endif
