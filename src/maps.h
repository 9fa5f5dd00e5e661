/* Maps: what is computed of every element once the sums are known, and how it is stored.
 *
 *   Normalize   y  = act(((x - mean_hi) - mean_lo) scale + offset [+ residual])
 *   Gradient    dx = scale ((dy - shift_hi) - shift_lo - ((x - mean_hi) - mean_lo) slope)
 *
 * The mean is subtracted in two steps, hi then lo, and never folded into the offset: x - mean_hi
 * is exact or nearly so where x is near the mean, which is where a x + b would cancel.
 *
 * Coefficients are one value for a whole row (channel-major) or one value per channel (columns);
 * a map does not care which.
 */
#ifndef BNCORE_MAPS_H
#define BNCORE_MAPS_H

#include "simd.h"

namespace bncore {

/* ----------------------------------------------------------------------------- coefficients */

/* One value for all elements of a row. */
template <class T> struct Uniform {
  typename Element<T>::Real value;
  typename Element<T>::Vec at(ptrdiff_t) const { return value - typename Element<T>::Vec{}; }
};

/* A value per place of a line, padded to whole vectors. */
template <class T> struct PerPlace {
  const typename Element<T>::Real* values;
  typename Element<T>::Vec at(ptrdiff_t i) const {
    return load_unaligned<typename Element<T>::Vec>(values + i);
  }
};

/* ------------------------------------------------------------------------------ activations */

/* Each gives the activation of z and, for the backward pass, dy where z passes and what the
 * activation makes of it elsewhere. Comparisons are written so that a NaN stays one. */
template <class T> struct Identity {
  typedef typename Element<T>::Vec Vec;
  Vec operator()(Vec z) const { return z; }
  Vec gradient(Vec, Vec dy) const { return dy; }
};

template <class T> struct Clip {
  typedef typename Element<T>::Vec Vec;
  typename Element<T>::Real low, high;
  Vec operator()(Vec z) const {
    Vec floor = low - Vec{}, ceiling = high - Vec{};
    z = z < floor ? floor : z;
    return z > ceiling ? ceiling : z;
  }
  Vec gradient(Vec z, Vec dy) const {
    Vec floor = low - Vec{}, ceiling = high - Vec{}, zero = {};
    return (z <= floor) | (z >= ceiling) ? zero : dy;
  }
};

template <class T> struct LeakyRelu {
  typedef typename Element<T>::Vec Vec;
  typename Element<T>::Real slope;
  Vec operator()(Vec z) const { return z < Vec{} ? z * slope : z; }
  Vec gradient(Vec z, Vec dy) const { return z <= Vec{} ? dy * slope : dy; }
};

/* ------------------------------------------------------------------------------------- maps */

template <bool Whole, class T>
inline typename Element<T>::Vec load(const T* p, int k) {
  return Whole ? Element<T>::load(p) : Element<T>::load_part(p, k);
}

/* Scaled: x is first multiplied by a power of two, see unit_of in blocks.h. */
template <class T, template <class> class Coefficient, class Activation, bool Residual,
          bool Scaled>
struct Normalize {
  const T* x;
  const T* residual;
  Coefficient<T> mean_hi, mean_lo, scale, offset, unit;
  Activation activation;

  template <bool Whole>
  typename Element<T>::Vec at(ptrdiff_t i, int k) const {
    auto v = load<Whole>(x + i, k);
    if (Scaled) v *= unit.at(i);
    auto z = ((v - mean_hi.at(i)) - mean_lo.at(i)) * scale.at(i) + offset.at(i);
    if (Residual) z += load<Whole>(residual + i, k);
    return activation(z);
  }
};

template <class T, template <class> class Coefficient, bool Scaled>
struct Gradient {
  const T* dy;
  const T* x;
  Coefficient<T> mean_hi, mean_lo, shift_hi, shift_lo, slope, scale, unit;

  template <bool Whole>
  typename Element<T>::Vec at(ptrdiff_t i, int k) const {
    auto v = load<Whole>(x + i, k);
    if (Scaled) v *= unit.at(i);
    auto d = (v - mean_hi.at(i)) - mean_lo.at(i);
    auto g = (load<Whole>(dy + i, k) - shift_hi.at(i)) - shift_lo.at(i);
    return (g - d * slope.at(i)) * scale.at(i);
  }
};

/* The statistics are constants: dx = scale dy. */
template <class T, template <class> class Coefficient>
struct FixedGradient {
  const T* dy;
  Coefficient<T> scale;

  template <bool Whole>
  typename Element<T>::Vec at(ptrdiff_t i, int k) const {
    return load<Whole>(dy + i, k) * scale.at(i);
  }
};

template <bool Stream, class T>
BNCORE_INLINE void store_aligned(T* out, typename Element<T>::Vec v) {
  if (Stream) Element<T>::stream(out, v);
  else Element<T>::store(out, v);
}

/* Write n elements of the map to `out`. Whole vectors are stored aligned, past the cache where
 * Stream says so; what stands before and after them is stored in part. */
template <bool Stream, class T, class Map>
inline void write_row(const Map& map, T* out, ptrdiff_t n) {
  typedef Element<T> E;
  constexpr int lanes = E::kLanes, unroll = 4;
  ptrdiff_t i = 0;
  if (n >= 2 * lanes) {
    const ptrdiff_t past = reinterpret_cast<uintptr_t>(out) % (lanes * sizeof(T));
    const int head = past ? lanes - static_cast<int>(past / sizeof(T)) : 0;
    if (head) E::store_part(out, map.template at<false>(0, head), head);
    for (i = head; i + unroll * lanes <= n; i += unroll * lanes) {
      typename E::Vec v[unroll];
#pragma GCC unroll 4
      for (int j = 0; j < unroll; ++j) v[j] = map.template at<true>(i + j * lanes, lanes);
#pragma GCC unroll 4
      for (int j = 0; j < unroll; ++j) store_aligned<Stream>(out + i + j * lanes, v[j]);
    }
    for (; i + lanes <= n; i += lanes)
      store_aligned<Stream>(out + i, map.template at<true>(i, lanes));
  }
  for (; i + lanes <= n; i += lanes) E::store(out + i, map.template at<true>(i, lanes));
  if (i < n) {
    const int k = static_cast<int>(n - i);
    E::store_part(out + i, map.template at<false>(i, k), k);
  }
}

} // namespace bncore

#endif
