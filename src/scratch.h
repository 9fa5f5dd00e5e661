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
  static constexpr std::size_t kFew = 1024;
  double* heap_ = nullptr;
  double few_[kFew];
};

} // namespace bncore

#endif
