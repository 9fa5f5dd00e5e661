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

  void prefetch(ptrdiff_t i) const {
    __builtin_prefetch(x + i);
    if (Residual) __builtin_prefetch(residual + i);
  }

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

  void prefetch(ptrdiff_t i) const {
    __builtin_prefetch(x + i);
    __builtin_prefetch(dy + i);
  }

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

  void prefetch(ptrdiff_t i) const { __builtin_prefetch(dy + i); }

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

/* Write n elements of each map to its `out`, all of one alignment. Whole vectors are stored
 * aligned, past the cache where Stream says so; what stands before and after them is stored in
 * part. Such a part needs its line of memory first, and stores are made in order, so the lines of
 * the row written `ahead` elements further on are fetched now. Several rows at a time share the
 * loads of coefficients per place, which would otherwise wait for stores that end in the same 12
 * bits of the address. */
template <bool Stream, int Rows, class T, class Map>
inline void write_rows(const Map (&maps)[Rows], T* const (&out)[Rows], ptrdiff_t n,
                       ptrdiff_t ahead) {
  typedef Element<T> E;
  constexpr int lanes = E::kLanes, unroll = Rows == 1 ? 4 : 1;
  if (Stream && ahead)
    for (T* row : out) {
      __builtin_prefetch(row + ahead, 1);
      __builtin_prefetch(row + ahead + n, 1);
    }
  ptrdiff_t i = 0;
  if (n >= 2 * lanes) {
    const ptrdiff_t past = reinterpret_cast<uintptr_t>(out[0]) % (lanes * sizeof(T));
    const int head = past ? lanes - static_cast<int>(past / sizeof(T)) : 0;
    if (head)
      for (int r = 0; r < Rows; ++r)
        E::store_part(out[r], maps[r].template at<false>(0, head), head);
    for (i = head; i + unroll * lanes <= n; i += unroll * lanes) {
      typename E::Vec v[Rows][unroll];
      if (Rows > 1)
        for (const Map& map : maps) map.prefetch(i + ahead);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < unroll; ++j)
          v[r][j] = maps[r].template at<true>(i + j * lanes, lanes);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < unroll; ++j) store_aligned<Stream>(out[r] + i + j * lanes, v[r][j]);
    }
    for (; unroll > 1 && i + lanes <= n; i += lanes)
      for (int r = 0; r < Rows; ++r)
        store_aligned<Stream>(out[r] + i, maps[r].template at<true>(i, lanes));
  }
  for (; i + lanes <= n; i += lanes)
    for (int r = 0; r < Rows; ++r) E::store(out[r] + i, maps[r].template at<true>(i, lanes));
  const int k = static_cast<int>(n - i);
  if (k)
    for (int r = 0; r < Rows; ++r) E::store_part(out[r] + i, maps[r].template at<false>(i, k), k);
}

} // namespace bncore

#endif
