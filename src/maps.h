/* Maps: what is computed of every element once the sums are known, and how it is stored.
 *
 *   Normalize      y  = act(z)
 *   JustGate       dz = act'(z) dy
 *   Gradient       dx = scale ((dz - shift) - (x - mean) slope - rest)
 *   FixedGradient  dx = scale dz
 *
 * z is in activations.h. A table's mean is rounded to the type of the maps, and what was lost,
 * mean_lo, is part of the offset or the rest: elements are of that type too, so that x - mean is 0,
 * where the offset is exact, or at least as large as mean_lo. The mean itself is never folded into
 * the offset: x - mean is exact or nearly so where x is near the mean, which is where a x + b would
 * cancel.
 */
#ifndef BNCORE_MAPS_H
#define BNCORE_MAPS_H

#include "seams.h"

namespace bncore {

/* ------------------------------------------------------------------------------------- maps */

/* A map is computed in two steps, of which only this one tells the first from the second. */
template <class T> struct OneStep {
  typedef typename Element<T>::Vec Vec;
  static constexpr bool kKeepsGate = false;
  static constexpr int kArrays = 1; // that are read
  template <int Level> BNCORE_INLINE void prefetch_unkept(ptrdiff_t, ptrdiff_t) const {}
  template <bool Whole> BNCORE_INLINE Vec finish(Vec v, ptrdiff_t, int) const { return v; }
};

template <class T, class Latent, class Activation, class Weigh, bool Residual> struct Normalize {
  typedef typename Element<T>::Vec Vec;
  static constexpr bool kKeepsGate = Residual;
  static constexpr int kArrays = 1 + Residual;
  Latent latent;
  Activation activation;
  Weigh weigh;
  Gate<T> gate;
  uint8_t* bits;       // null: none are kept
  ptrdiff_t first_bit; // of this row

  template <int Level> BNCORE_INLINE void prefetch(ptrdiff_t i, ptrdiff_t n) const {
    prefetch_lines<Level>(latent.x + i, n);
    prefetch_unkept<Level>(i, n);
  }
  template <int Level> BNCORE_INLINE void prefetch_unkept(ptrdiff_t i, ptrdiff_t n) const {
    if (Residual) prefetch_lines<Level>(latent.residual + i, n);
  }
  template <bool Whole> BNCORE_INLINE Vec at(ptrdiff_t i, int k) const {
    return latent.template z<Vec, Whole>(i, k);
  }
  template <bool Whole> BNCORE_INLINE Vec finish(Vec z, ptrdiff_t i, int k) const {
    return weigh.template unmasked<Whole>(activation(z), i, k);
  }
};

/* Source gives dz, see gates.h. With weights the shift and the slope count w times. */
template <class T, template <class> class Coefficient, bool Scaled, class Source, class Weigh>
struct Gradient : OneStep<T> {
  typedef typename Element<T>::Vec Vec;
  static constexpr int kArrays = 2;
  Source source;
  const T* x;
  Coefficient<T> mean, shift, rest, slope, scale, unit;
  Weigh weigh;

  template <int Level> BNCORE_INLINE void prefetch(ptrdiff_t i, ptrdiff_t n) const {
    prefetch_lines<Level>(x + i, n);
    prefetch_lines<Level>(source.dy + i, n);
  }
  template <bool Whole> BNCORE_INLINE Vec at(ptrdiff_t i, int k) const {
    const Vec its_x = load_as<Vec, Whole>(x + i, k), dz = source.template dz<Whole>(i, k, its_x);
    const Vec latent = latent_of(source, its_x);
    const Vec d = (Scaled ? latent * unit.at(i) : latent) - mean.at(i);
    const Vec its_shift = weigh.template times<Whole>(shift.at(i), i, k);
    const Vec its_rest = weigh.template times<Whole>(rest.at(i), i, k);
    const Vec wd = weigh.template times<Whole>(d, i, k);
    const Vec dx = (fma(-wd, slope.at(i), dz - its_shift) - its_rest) * scale.at(i);
    return weigh.template unmasked<Whole>(dx, i, k);
  }
};

/* dz itself. */
template <class T, class Source, class Weigh> struct JustGate : OneStep<T> {
  typedef typename Element<T>::Vec Vec;
  Source source;
  const T* x;
  Weigh weigh;

  template <int Level> BNCORE_INLINE void prefetch(ptrdiff_t i, ptrdiff_t n) const {
    prefetch_lines<Level>(source.dy + i, n);
  }
  template <bool Whole> BNCORE_INLINE Vec at(ptrdiff_t i, int k) const {
    const Vec dz = source.template dz<Whole>(i, k, load_as<Vec, Whole>(x + i, k));
    return weigh.template unmasked<Whole>(dz, i, k);
  }
};

/* The statistics are constants: dx = scale dz. */
template <class T, template <class> class Coefficient, class Source>
struct FixedGradient : OneStep<T> {
  typedef typename Element<T>::Vec Vec;
  Source source;
  const T* x;
  Coefficient<T> scale;

  template <int Level> BNCORE_INLINE void prefetch(ptrdiff_t i, ptrdiff_t n) const {
    prefetch_lines<Level>(source.dy + i, n);
  }
  template <bool Whole> BNCORE_INLINE Vec at(ptrdiff_t i, int k) const {
    return source.template dz<Whole>(i, k, load_as<Vec, Whole>(x + i, k)) * scale.at(i);
  }
};

/* Vectors of T that fill a line of the cache. A line stored past the cache wants to be stored
 * whole before another is begun: few of them can be open at a time. */
template <class T>
constexpr int kVectorsInLine = kCacheLine / (Element<T>::kLanes * static_cast<int>(sizeof(T)));

/* Keep the gates of Vectors vectors of a row from element i on, k elements of the last one. */
template <int Vectors, class T, class Map, class Vec>
BNCORE_INLINE void keep_gates(const Map& map, const Vec (&z)[Vectors], ptrdiff_t i, int k) {
  constexpr int lanes = Element<T>::kLanes, together = 64 / lanes < Vectors ? 64 / lanes : Vectors;
  if constexpr (Map::kKeepsGate) {
    if (!map.bits) return;
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; j += together) {
      uint64_t closed = 0;
#pragma GCC unroll 4
      for (int v = 0; v < together; ++v)
        closed |= static_cast<uint64_t>(map.gate.closed_bits(z[j + v])) << v * lanes;
      const int count = (together - 1) * lanes + k;
      if (k < lanes) closed &= (uint64_t(1) << count) - 1;
      keep_bits(map.bits, map.first_bit + i + j * lanes, closed, count);
    }
  }
}

/* Unroll vectors of the map from element i of a row on. */
template <bool Stream, int Unroll, class T, class Map>
BNCORE_INLINE void write_vectors(const Map& map, T* out, ptrdiff_t i) {
  typedef Element<T> E;
  constexpr bool in_twos = kStoredInTwos<T> && Unroll % 2 == 0;
  typename E::Vec v[Unroll];
#pragma GCC unroll 4
  for (int j = 0; j < Unroll; ++j) v[j] = map.template at<true>(i + j * E::kLanes, E::kLanes);
  keep_gates<Unroll, T>(map, v, i, E::kLanes);
#pragma GCC unroll 4
  for (int j = 0; j < Unroll; j += 1 + in_twos) {
    const ptrdiff_t at = i + j * E::kLanes;
    const typename E::Vec y = map.template finish<true>(v[j], at, E::kLanes);
    if constexpr (in_twos) {
      const typename E::Vec z = map.template finish<true>(v[j + 1], at + E::kLanes, E::kLanes);
      if (Stream) E::stream_two(out + at, y, z);
      else E::store_two(out + at, y, z);
    } else if (Stream) {
      E::stream(out + at, y);
    } else {
      E::store(out + at, y);
    }
  }
}

/* The elements from i to n, vector by vector, into the cache. */
template <class T, class Map>
BNCORE_INLINE void write_cached(const Map& map, T* out, ptrdiff_t i, ptrdiff_t n) {
  typedef Element<T> E;
  for (; i + E::kLanes <= n; i += E::kLanes) write_vectors<false, 1>(map, out, i);
  const int k = static_cast<int>(n - i);
  if (k == 0) return;
  const typename E::Vec v[1] = {map.template at<false>(i, k)};
  keep_gates<1, T>(map, v, i, k);
  E::store_part(out + i, map.template finish<false>(v[0], i, k), k);
}

/* Write the elements from i on that stand before the first line that is the row's own; the next. */
template <class T, class Map>
BNCORE_INLINE ptrdiff_t write_first_line(const Map& map, T* out, ptrdiff_t i, ptrdiff_t n,
                                         Seam<T>* seam) {
  const int place = place_in_line(out + i);
  if (place == 0) return i;
  const ptrdiff_t rest = Seam<T>::kPlaces - place, left = n - i;
  const int count = static_cast<int>(rest < left ? rest : left);
  seam->open(out + i - place, place, place + count);
  write_cached(map, seam->line + place - i, i, i + count);
  seam->close(place, place + count);
  return i + count;
}

/* Write the elements from i, which begins a line, to n: whole lines past the cache. */
template <class T, class Map>
BNCORE_INLINE void write_last_lines(const Map& map, T* out, ptrdiff_t i, ptrdiff_t n,
                                    Seam<T>* seam) {
  constexpr int in_line = kVectorsInLine<T>;
  for (; i + Seam<T>::kPlaces <= n; i += Seam<T>::kPlaces)
    write_vectors<true, in_line>(map, out, i);
  if (i == n) return;
  const int count = static_cast<int>(n - i);
  seam->open(out + i, 0, count);
  write_cached(map, seam->line - i, i, n);
  seam->close(0, count);
}

/* Elements before the first aligned vector of a row that is long enough for it to be worth it. */
template <class T> inline int head_of(const T* out, ptrdiff_t n) {
  constexpr int lanes = Element<T>::kLanes;
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(out) % (lanes * sizeof(T)));
  return past && n >= 2 * lanes ? lanes - past / static_cast<int>(sizeof(T)) : 0;
}

/* Write the elements from i on up to where whole vectors can be stored; the next. */
template <bool Stream, class T, class Map>
BNCORE_INLINE ptrdiff_t write_head(const Map& map, T* out, ptrdiff_t i, ptrdiff_t n,
                                   Seam<T>* seam) {
  if (Stream) return write_first_line(map, out, i, n, seam);
  const ptrdiff_t start = i + head_of(out + i, n - i);
  write_cached(map, out, i, start);
  return start;
}

template <bool Stream, class T, class Map>
BNCORE_INLINE void write_tail(const Map& map, T* out, ptrdiff_t i, ptrdiff_t n, Seam<T>* seam) {
  if (Stream) write_last_lines(map, out, i, n, seam);
  else write_cached(map, out, i, n);
}

/* Whether a map fetches what it reads next to a cache of this Level, which is the second for
 * columns. Two arrays of columns are not fetched where vectors are shorter than a cache line: such
 * cores bring them sooner by themselves. */
template <class Map, int Level>
constexpr bool kFetches = Level == kFirstLevel || Map::kArrays == 1 || kVectorBytes == kCacheLine;

/* Elements that a map fetches ahead. */
template <class T, class Map>
constexpr ptrdiff_t kMapAhead = kFetchAhead / (Map::kArrays * static_cast<ptrdiff_t>(sizeof(T)));

/* Write elements [i, n) of the map to `out`, whole lines past the cache where Stream says so;
 * what is read then comes from memory, and is fetched so many elements ahead to a cache of this
 * Level. */
template <bool Stream, int Level, class T, class Map>
BNCORE_INLINE void write_row(const Map& map, T* out, ptrdiff_t i, ptrdiff_t n, ptrdiff_t ahead,
                             Seam<T>* seam) {
  constexpr int unroll = 4, turn = unroll * Element<T>::kLanes;
  i = write_head<Stream>(map, out, i, n, seam);
  for (; i + turn <= n; i += turn) {
    if (Stream && kFetches<Map, Level>) map.template prefetch<Level>(i + ahead, turn);
    write_vectors<Stream, unroll>(map, out, i);
  }
  write_tail<Stream>(map, out, i, n, seam);
}

/* Write one row while another is summed: one waits for memory to be written, the other for memory
 * to be read, and neither keeps the other from it. The sums are those of add_row. The map reads
 * kept rows; the other row is kept in their place, so never before they have been read. */
template <bool Stream, class T, class Map, class Terms>
BNCORE_INLINE void write_and_add_row(const Map& map, T* out, const Terms& terms, ptrdiff_t n,
                                     Onward onward, Seam<T>* seam, Accumulator* sums) {
  constexpr int lanes = Element<T>::kLanes, unroll = kStep / lanes < 4 ? 4 : kStep / lanes;
  constexpr int turn = unroll * lanes;
  static_assert(turn % kStep == 0, "a turn of the map is whole steps of the sums");
  ptrdiff_t i = write_head<Stream>(map, out, 0, n, seam), j = 0;
  Accumulator local = *sums;
  for (; i + turn <= n; i += turn, j += turn) {
#pragma GCC unroll 4
    for (int step = 0; step < turn; step += kStep) add_step(terms, j + step, onward, &local);
    map.template prefetch_unkept<kSecondLevel>(i + onward.from(j), turn);
    write_vectors<Stream, unroll>(map, out, i);
    terms.keep(j, turn);
  }
  write_tail<Stream>(map, out, i, n, seam);
  terms.keep(j, n - j);
  for (; j + kStep <= n; j += kStep) add_step(terms, j, onward, &local);
  add_rest(terms, j, n, &local);
  *sums = local;
}

} // namespace bncore

#endif
