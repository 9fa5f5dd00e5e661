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
  explicit Identity(Epilogue) {}
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

/* All of them in one, for instances that are not worth having three times. */
template <class T> struct AnyActivation {
  typename Element<T>::Real slope, low, high;
  explicit AnyActivation(Epilogue e)
      : slope(static_cast<decltype(slope)>(e.activation == 2 ? e.a : 1)),
        low(static_cast<decltype(low)>(e.activation == 1 ? e.a : -HUGE_VAL)),
        high(static_cast<decltype(high)>(e.activation == 1 ? e.b : HUGE_VAL)) {}
  template <class V> V operator()(V z) const {
    const V floor = low - V{}, ceiling = high - V{};
    z = z < V{} ? z * slope : z;
    z = z < floor ? floor : z;
    return z > ceiling ? ceiling : z;
  }
};

/* The gradient of any of them: dz = dy between low and high, elsewhere dy times `outside`, or 0
 * whatever dy is. */
template <class T> struct Gate {
  typename Element<T>::Real low, high, outside;
  explicit Gate(Epilogue e)
      : low(static_cast<decltype(low)>(e.activation == 1 ? e.a : 0)),
        high(static_cast<decltype(high)>(e.activation == 1 ? e.b : HUGE_VAL)),
        outside(static_cast<decltype(outside)>(e.activation == 1 ? 0 : e.a)) {}
  template <class V> auto passes(V z) const {
    const V floor = low - V{}, ceiling = high - V{};
    return ~((z <= floor) | (z >= ceiling));
  }
  template <class Lanes, class V> V apply(Lanes passed, V dy) const {
    const V otherwise = outside == 0 ? V{} : dy * outside;
    return passed ? dy : otherwise;
  }
  template <class V> V operator()(V z, V dy) const { return apply(passes(z), dy); }
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

/* Elements from one row to the next; of bits the bytes. */
struct Strides {
  ptrdiff_t dy, x, bits;
};

/* dz = dy, where there is no activation. */
template <class T> struct PlainSource {
  const T* dy;

  template <class V, bool Whole> V dz(ptrdiff_t i, int k) const {
    return load_as<V, Whole>(dy + i, k);
  }
  PlainSource row(ptrdiff_t r, Strides strides) const { return {dy + r * strides.dy}; }
};

/* dz = act'(z) dy, z computed again. */
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
    return moved;
  }
};

/* dz = act'(z) dy, the gate kept as a bit for each element. */
template <class T> struct BitSource {
  const T* dy;
  const uint8_t* bits;
  Gate<T> gate;

  template <class V, bool Whole> V dz(ptrdiff_t i, int k) const {
    return gate.apply(lanes_of_bits<V>(bits, i), load_as<V, Whole>(dy + i, k));
  }
  BitSource row(ptrdiff_t r, Strides strides) const {
    return {dy + r * strides.dy, bits + r * strides.bits, gate};
  }
};

/* Keep where z passes the gate, a bit for each of n elements, the last byte filled up with 0. */
template <class T, class Latent>
inline void pack_gate(const Latent& latent, const Gate<T>& gate, ptrdiff_t n, uint8_t* bits) {
  typedef typename Element<T>::Vec Vec;
  constexpr int lanes = Element<T>::kLanes, step = lanes < 8 ? 8 : lanes;
  ptrdiff_t i = 0;
  for (; i + step <= n; i += step) {
    uint32_t passed = 0;
#pragma GCC unroll 4
    for (int j = 0; j < step; j += lanes)
      passed |= bits_of_lanes(gate.passes(latent.template z<Vec, true>(i + j, lanes))) << j;
    std::memcpy(bits + i / 8, &passed, step / 8);
  }
  for (uint32_t passed = 0; i < n; i += lanes) {
    const int k = n - i < lanes ? static_cast<int>(n - i) : lanes, at = i % 8;
    const uint32_t some = bits_of_lanes(gate.passes(latent.template z<Vec, false>(i, k)));
    passed = (at ? passed : 0) | (some & ((1u << k) - 1)) << at;
    std::memcpy(bits + i / 8, &passed, (at + k + 7) / 8);
  }
}

} // namespace bncore

#endif
