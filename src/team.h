/* What a team of threads has to agree on. */
#ifndef BNCORE_TEAM_H
#define BNCORE_TEAM_H

#ifdef _OPENMP
#include <omp.h>
#endif

namespace bncore {

/* Wait for the others of the team. Cython's prange lets a thread go on to what follows it (from 3.3
 * on), so that one phase of a kernel ends where this is called, and nowhere else. */
inline void join_team() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

/* The calling thread's number in its team. */
inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

} // namespace bncore

#endif
