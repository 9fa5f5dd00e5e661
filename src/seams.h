/* Seams: whole lines of memory for stores that go past the cache, though rows begin and end
 * anywhere.
 */
#ifndef BNCORE_SEAMS_H
#define BNCORE_SEAMS_H

#include "grid.h"

namespace bncore {

/* A line of memory in which one row ends and the next begins. What is stored past the cache has to
 * be whole lines, as a line of which one part is streamed and one is not is moved twice: so the end
 * of one row waits here for the beginning of the other, whichever is written first. */
template <class T> struct Seam {
  static constexpr int kPlaces = kCacheLine / sizeof(T);
  alignas(kCacheLine) T line[kPlaces];
  T* at;          // the line in memory; null: nothing waits
  int begin, end; // the places that wait

  /* Make room for places [first, last) of the line at `to`. */
  void open(T* to, int first, int last) {
    if (to == at && (first == end || last == begin)) return;
    flush();
    at = to;
    begin = end = first;
  }
  /* They have been written. */
  void close(int first, int last) {
    begin = first < begin ? first : begin;
    end = last > end ? last : end;
    if (end - begin == kPlaces) stream();
  }
  void stream() {
    constexpr int lanes = kVectorBytes / sizeof(T);
#pragma GCC unroll 4
    for (int i = 0; i < kPlaces; i += lanes)
      stream_vector(at + i, load_unaligned<Floats>(line + i));
    at = nullptr;
  }
  void flush() {
    if (at) std::memcpy(at + begin, line + begin, (end - begin) * sizeof(T));
    at = nullptr;
  }
};

/* The seams of a thread. Where a group has all channels each of its rows or lines goes on where the
 * one before has ended; else a row of the next group does, so that each outer position has a seam
 * of its own, as far as they go. */
template <class T> struct Seams {
  static constexpr ptrdiff_t kCount = 64;
  Seam<T> seams[kCount];
  ptrdiff_t used = 0;

  Seam<T>* of(const Grid& grid, ptrdiff_t n) {
    const ptrdiff_t i = grid.groups == 1 ? 0 : n % kCount;
    for (; used <= i; ++used) seams[used].at = nullptr;
    return &seams[i];
  }
  /* Nothing waits any more, and what was streamed can be read. */
  ~Seams() {
    for (ptrdiff_t i = 0; i < used; ++i) seams[i].flush();
    if (used) stream_fence();
  }
};

} // namespace bncore

#endif
