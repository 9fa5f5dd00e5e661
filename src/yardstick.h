/* The memory's limit: passes that move what batch norm moves, and compute next to nothing. */
#ifndef BNCORE_YARDSTICK_H
#define BNCORE_YARDSTICK_H

#include "simd.h"

namespace bncore {

template <class T, bool Triad>
inline typename Element<T>::Vec passed(const T* x, const T* y) {
  return Triad ? Element<T>::load(x) + Element<T>::load(y) : Element<T>::load(x);
}

/* out = x, or x + y, over n elements from where `out` is aligned. */
template <bool Stream, bool Triad, class T>
inline void pass_aligned(const T* x, const T* y, T* out, ptrdiff_t n) {
  typedef Element<T> E;
  constexpr int lanes = E::kLanes, unroll = 4;
  ptrdiff_t i = 0;
  for (; i + unroll * lanes <= n; i += unroll * lanes) {
    typename E::Vec v[unroll];
#pragma GCC unroll 4
    for (int j = 0; j < unroll; ++j) {
      v[j] = passed<T, Triad>(x + i + j * lanes, y + i + j * lanes);
    }
#pragma GCC unroll 4
    for (int j = 0; j < unroll; ++j) {
      if (Stream) E::stream(out + i + j * lanes, v[j]);
      else E::store(out + i + j * lanes, v[j]);
    }
  }
  for (; i < n; ++i) out[i] = Triad ? x[i] + y[i] : x[i];
  if (Stream) stream_fence();
}

/* Part `part` of `parts` of a pass over n elements; a copy where y is null. */
template <class T>
inline void pass(const T* x, const T* y, T* out, ptrdiff_t n, bool stream, int part, int parts) {
  constexpr ptrdiff_t line = kCacheLine / sizeof(T);
  const ptrdiff_t past = reinterpret_cast<uintptr_t>(out) % kCacheLine / sizeof(T);
  const ptrdiff_t head = past ? line - past : 0;
  if (n <= head) return;
  const ptrdiff_t lines = (n - head) / line, first = head + lines * part / parts * line;
  const ptrdiff_t last = part + 1 == parts ? n : head + lines * (part + 1) / parts * line;
  const auto run = stream ? (y ? pass_aligned<true, true, T> : pass_aligned<true, false, T>)
                          : (y ? pass_aligned<false, true, T> : pass_aligned<false, false, T>);
  run(x + first, y + first, out + first, last - first);
}

} // namespace bncore

#endif
