/* Scratch: the numbers a call needs while it runs; on its stack where they are few, which spares
 * an allocation, else from the heap. */
#ifndef BNCORE_SCRATCH_H
#define BNCORE_SCRATCH_H

#include <cstddef>
#include <cstdlib>

namespace bncore {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(heap_); }

  /* Room for `count` numbers, uninitialized, as long as this lives; null where there is none. To
   * be called once. */
  double* take(std::size_t count) {
    if (count <= kFew) return few_;
    return heap_ = static_cast<double*>(std::malloc(count * sizeof(double)));
  }

 private:
  static constexpr std::size_t kFew = 512;
  double* heap_ = nullptr;
  double few_[kFew];
};

/* Memory for rows that are kept (see Kept in grid.h), a piece for each thread of a team. Where it
 * can't be had nothing is kept. */
template <class T> class KeptMemory {
 public:
  KeptMemory() = default;
  KeptMemory(const KeptMemory&) = delete;
  KeptMemory& operator=(const KeptMemory&) = delete;
  ~KeptMemory() { std::free(data_); }

  /* `size` elements for each of so many threads; once. */
  void allocate(std::ptrdiff_t size, int threads) {
    constexpr std::size_t line = 64;
    size_ = size;
    const std::size_t bytes = size * sizeof(T) * threads;
    data_ = static_cast<T*>(std::aligned_alloc(line, (bytes + line - 1) / line * line));
  }
  T* of(int thread) const { return data_ ? data_ + thread * size_ : nullptr; }

 private:
  T* data_ = nullptr;
  std::ptrdiff_t size_ = 0;
};

} // namespace bncore

#endif
