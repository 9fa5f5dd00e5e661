/* Maps: what is computed of every element once the sums are known, and how it is stored.
 *
 *   Normalize      y  = act(z)
 *   JustGate       dz = act'(z) dy
 *   Gradient       dx = scale ((dz - shift_hi) - shift_lo - ((x - mean_hi) - mean_lo) slope)
 *   FixedGradient  dx = scale dz
 *
 * z is in activations.h. The mean is subtracted in two steps, hi then lo, and never folded into
 * the offset: x - mean_hi is exact or nearly so where x is near the mean, which is where a x + b
 * would cancel.
 */
#ifndef BNCORE_MAPS_H
#define BNCORE_MAPS_H

#include "sums.h"

namespace bncore {

/* ------------------------------------------------------------------------------------- maps */

/* A map is computed in two steps, of which only this one tells the first from the second. */
template <class T> struct OneStep {
  typedef typename Element<T>::Vec Vec;
  static constexpr bool kKeepsGate = false;
  template <bool Whole> Vec finish(Vec v, ptrdiff_t, int) const { return v; }
};

template <class T, class Latent, class Activation, class Weigh, bool Residual> struct Normalize {
  typedef typename Element<T>::Vec Vec;
  static constexpr bool kKeepsGate = Residual;
  Latent latent;
  Activation activation;
  Weigh weigh;
  Gate<T> gate;
  uint8_t* bits;       // null: none are kept
  ptrdiff_t first_bit; // of this row

  template <bool Whole> Vec at(ptrdiff_t i, int k) const {
    return latent.template z<Vec, Whole>(i, k);
  }
  template <bool Whole> Vec finish(Vec z, ptrdiff_t i, int k) const {
    return weigh.template unmasked<Whole>(activation(z), i, k);
  }
};

/* Source gives dz, see gates.h. With weights the shift and the slope count w times. */
template <class T, template <class> class Coefficient, bool Scaled, class Source, class Weigh>
struct Gradient : OneStep<T> {
  typedef typename Element<T>::Vec Vec;
  Source source;
  const T* x;
  Coefficient<T> mean_hi, mean_lo, shift_hi, shift_lo, slope, scale, unit;
  Weigh weigh;

  template <bool Whole> Vec at(ptrdiff_t i, int k) const {
    Vec v = load_as<Vec, Whole>(x + i, k);
    if (Scaled) v *= unit.at(i);
    const Vec d = (v - mean_hi.at(i)) - mean_lo.at(i), dz = source.template dz<Vec, Whole>(i, k);
    const Vec hi = weigh.template times<Whole>(shift_hi.at(i), i, k);
    const Vec lo = weigh.template times<Whole>(shift_lo.at(i), i, k);
    const Vec wd = weigh.template times<Whole>(d, i, k);
    const Vec dx = fma(-wd, slope.at(i), (dz - hi) - lo) * scale.at(i);
    return weigh.template unmasked<Whole>(dx, i, k);
  }
};

/* dz itself. */
template <class T, class Source, class Weigh> struct JustGate : OneStep<T> {
  typedef typename Element<T>::Vec Vec;
  Source source;
  Weigh weigh;

  template <bool Whole> Vec at(ptrdiff_t i, int k) const {
    return weigh.template unmasked<Whole>(source.template dz<Vec, Whole>(i, k), i, k);
  }
};

/* The statistics are constants: dx = scale dz. */
template <class T, template <class> class Coefficient, class Source>
struct FixedGradient : OneStep<T> {
  typedef typename Element<T>::Vec Vec;
  Source source;
  Coefficient<T> scale;

  template <bool Whole> Vec at(ptrdiff_t i, int k) const {
    return source.template dz<Vec, Whole>(i, k) * scale.at(i);
  }
};

constexpr int kCacheLine = 64; // bytes

/* Vectors of T that fill a line of the cache. A line stored past the cache wants to be stored
 * whole before another is begun: few of them can be open at a time. */
template <class T>
constexpr int kVectorsInLine = kCacheLine / (Element<T>::kLanes * static_cast<int>(sizeof(T)));

/* Elements before the first aligned vector of a row: 0 where the row is shorter than a vector, and
 * where it is not worth aligning, as streams must be and others need not. */
template <bool Stream, class T> inline int head_of(const T* out, ptrdiff_t n) {
  constexpr int lanes = Element<T>::kLanes;
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(out) % (lanes * sizeof(T)));
  return past && n >= (Stream ? 1 : 2) * lanes ? lanes - past / static_cast<int>(sizeof(T)) : 0;
}

/* Keep the gates of Vectors vectors of a row from element i on, k elements of the last one. */
template <int Vectors, class T, class Map, class Vec>
BNCORE_INLINE void keep_gates(const Map& map, const Vec (&z)[Vectors], ptrdiff_t i, int k) {
  constexpr int lanes = Element<T>::kLanes, together = 32 / lanes < Vectors ? 32 / lanes : Vectors;
  if constexpr (Map::kKeepsGate) {
    if (!map.bits) return;
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; j += together) {
      uint64_t closed = 0;
#pragma GCC unroll 4
      for (int v = 0; v < together; ++v)
        closed |= static_cast<uint64_t>(bits_of_lanes(map.gate.closed(z[j + v]))) << v * lanes;
      const int count = (together - 1) * lanes + k;
      if (k < lanes) closed &= (uint64_t(1) << count) - 1;
      keep_bits(map.bits, map.first_bit + i + j * lanes, closed, count);
    }
  }
}

/* Unroll vectors of each of the maps from i on, into aligned memory. Several rows at a time share
 * the loads of coefficients per place. */
template <bool Stream, int Rows, int Unroll, class T, class Map>
BNCORE_INLINE void write_vectors(const Map (&maps)[Rows], T* const (&out)[Rows], ptrdiff_t i) {
  typedef Element<T> E;
  typename E::Vec v[Rows][Unroll];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < Unroll; ++j)
      v[r][j] = maps[r].template at<true>(i + j * E::kLanes, E::kLanes);
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    keep_gates<Unroll, T>(maps[r], v[r], i, E::kLanes);
#pragma GCC unroll 4
    for (int j = 0; j < Unroll; ++j) {
      const ptrdiff_t at = i + j * E::kLanes;
      const typename E::Vec y = maps[r].template finish<true>(v[r][j], at, E::kLanes);
      if (Stream) E::stream(out[r] + at, y);
      else E::store(out[r] + at, y);
    }
  }
}

/* Less than a vector, or unaligned. */
template <int Rows, class T, class Map>
BNCORE_INLINE void write_part(const Map (&maps)[Rows], T* const (&out)[Rows], ptrdiff_t i, int k) {
  for (int r = 0; r < Rows; ++r) {
    const typename Element<T>::Vec v[1] = {maps[r].template at<false>(i, k)};
    keep_gates<1, T>(maps[r], v, i, k);
    Element<T>::store_part(out[r] + i, maps[r].template finish<false>(v[0], i, k), k);
  }
}

template <class T> inline bool begins_line(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % kCacheLine == 0;
}

/* A part of a line of memory is stored after that line has come, and stores are made in order:
 * ask for the lines at both ends of a row beforehand, but never for one that is stored whole. */
template <class T> BNCORE_INLINE void prefetch_ends(const T* row, ptrdiff_t n) {
  if (!begins_line(row)) __builtin_prefetch(row, 1);
  if (!begins_line(row + n)) __builtin_prefetch(row + n, 1);
}

/* Write vectors from i up to the first that begins a cache line, into the cache: a line that is
 * streamed only in part is moved twice. */
template <int Rows, class T, class Map>
BNCORE_INLINE ptrdiff_t write_to_line(const Map (&maps)[Rows], T* const (&out)[Rows], ptrdiff_t i,
                                      ptrdiff_t n) {
  constexpr int lanes = Element<T>::kLanes;
  for (; kVectorsInLine<T> > 1 && !begins_line(out[0] + i) && i + lanes <= n; i += lanes)
    write_vectors<false, Rows, 1>(maps, out, i);
  return i;
}

/* Write the elements from i, which begins a line where Stream is, to n: less than Unroll vectors
 * are done line by line, less than a line in the cache. */
template <bool Stream, int Rows, class T, class Map>
BNCORE_INLINE void write_rest(const Map (&maps)[Rows], T* const (&out)[Rows], ptrdiff_t i,
                              ptrdiff_t n) {
  constexpr int lanes = Element<T>::kLanes, in_line = kVectorsInLine<T>;
  for (; Stream && i + in_line * lanes <= n; i += in_line * lanes)
    write_vectors<Stream, Rows, in_line>(maps, out, i);
  for (; i + lanes <= n; i += lanes) write_vectors<false, Rows, 1>(maps, out, i);
  if (i < n) write_part(maps, out, i, static_cast<int>(n - i));
}

/* Write n elements of each map to its `out`, all of one alignment. Whole vectors are stored
 * aligned, whole lines past the cache where Stream says so; what stands before and after them in
 * part. The row written next is `ahead` elements on. */
template <bool Stream, int Rows, class T, class Map>
inline void write_rows(const Map (&maps)[Rows], T* const (&out)[Rows], ptrdiff_t n,
                       ptrdiff_t ahead) {
  constexpr int lanes = Element<T>::kLanes, unroll = Rows == 1 ? 4 : kVectorsInLine<T>;
  if (Stream)
    for (T* row : out) prefetch_ends(row + ahead, n);
  const int head = head_of<Stream>(out[0], n);
  ptrdiff_t i = head;
  if (head) write_part(maps, out, 0, head);
  if (Stream) i = write_to_line(maps, out, i, n);
  for (; i + unroll * lanes <= n; i += unroll * lanes)
    write_vectors<Stream, Rows, unroll>(maps, out, i);
  write_rest<Stream>(maps, out, i, n);
}

/* Write one row while another is summed: one waits for memory to be written, the other for memory
 * to be read, and neither keeps the other from it. The sums are those of add_row. */
template <bool Stream, class T, class Map, class Terms>
inline void write_and_add_row(const Map& map, T* out, const Terms& terms, ptrdiff_t n,
                              ptrdiff_t ahead_out, ptrdiff_t ahead, Accumulator* sums) {
  constexpr int lanes = Element<T>::kLanes, unroll = kStep / lanes < 4 ? 4 : kStep / lanes;
  static_assert(unroll * lanes % kStep == 0, "a stride of the map is whole steps of the sums");
  const Map maps[1] = {map};
  T* const outs[1] = {out};
  if (Stream) prefetch_ends(out + ahead_out, n);
  const int head = head_of<Stream>(out, n);
  ptrdiff_t i = head, j = 0;
  if (head) write_part(maps, outs, 0, head);
  if (Stream) i = write_to_line(maps, outs, i, n);
  Accumulator local = *sums;
  for (; i + unroll * lanes <= n; i += unroll * lanes) {
#pragma GCC unroll 4
    for (int step = 0; step < unroll * lanes; step += kStep)
      add_step(terms, j + step, ahead, &local);
    j += unroll * lanes;
    write_vectors<Stream, 1, unroll>(maps, outs, i);
  }
  for (; j + kStep <= n; j += kStep) add_step(terms, j, ahead, &local);
  add_rest(terms, j, n, &local);
  *sums = local;
  write_rest<Stream>(maps, outs, i, n);
}

} // namespace bncore

#endif
