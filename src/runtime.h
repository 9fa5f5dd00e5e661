/* What the machine gives: instruction sets, threads that can be created, the OpenMP runtime. */
#ifndef BNCORE_RUNTIME_H
#define BNCORE_RUNTIME_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* dladdr */
#endif
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>

#ifdef _OPENMP
#include <omp.h>
#endif

/* ------------------------------------------------------------------------------------- CPU */

/* The level of the x86-64 psABI that CPU and operating system support: 1 to 4; 0 elsewhere. Told by
 * features, as older compilers don't know the levels' names; those left out here came to processors
 * together with those named. */
static int x86_64_level(void) {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("popcnt")) return 1;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("bmi") || !__builtin_cpu_supports("bmi2"))
    return 2;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512cd") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl"))
    return 3;
  return 4;
#else
  return 0;
#endif
}

/* ---------------------------------------------------------------------------------- OpenMP */

/* The value of _OPENMP, year and month of the specification; 0 where built serial. */
static int openmp_date(void) {
#ifdef _OPENMP
  return _OPENMP;
#else
  return 0;
#endif
}

/* CPUs in the process's affinity mask; 0 without OpenMP. */
static int openmp_processors(void) {
#ifdef _OPENMP
  return omp_get_num_procs();
#else
  return 0;
#endif
}

/* The most threads that OpenMP's own settings allow the calling thread's next team. */
static int openmp_max_threads(void) {
#ifdef _OPENMP
  int threads = omp_get_max_threads(), limit = omp_get_thread_limit();
  return threads < limit ? threads : limit;
#else
  return 1;
#endif
}

/* The file the OpenMP runtime was loaded from, or NULL. */
static const char *openmp_library(void) {
#ifdef _OPENMP
  Dl_info info;
  if (dladdr((void *)omp_get_max_threads, &info)) return info.dli_fname;
#endif
  return NULL;
}

/* -------------------------------------------------------------------------------- fork guard */

/* A forked child has none of its parent's threads, and libgomp waits for them for ever. */
static int forked = 0;

static void mark_forked(void) { forked = 1; }

/* Returns 0, or an error number. */
static int guard_forks(void) { return pthread_atfork(NULL, NULL, mark_forked); }

/* ----------------------------------------------------------------------------- thread probe */

enum { kMaxThreads = 1024 };

/* Of the calling thread's teams: threads there was room for, and where room ended. */
static _Thread_local int proven_threads = 1, thread_limit = kMaxThreads;

static void *wait_at_gate(void *gate) {
  pthread_mutex_lock((pthread_mutex_t *)gate);
  pthread_mutex_unlock((pthread_mutex_t *)gate);
  return NULL;
}

/* The number of threads, at most `wanted` and the calling one included, that a team can have.
 * libgomp ends the process when it cannot create one, so they are all tried here first, at once
 * and with the stack it will give them (`stack_size` bytes; 0 for the system's default). */
static int possible_threads(int wanted, size_t stack_size) {
  pthread_t threads[kMaxThreads];
  pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
  pthread_attr_t attributes;
  int created = 0, i;

  if (wanted > thread_limit) wanted = thread_limit;
  if (wanted <= proven_threads) return wanted;
  if (pthread_attr_init(&attributes)) return 1;
  if (stack_size) pthread_attr_setstacksize(&attributes, stack_size);
  pthread_mutex_lock(&gate);
  while (created < wanted - 1 &&
         !pthread_create(&threads[created], &attributes, wait_at_gate, &gate))
    created++;
  pthread_mutex_unlock(&gate);
  for (i = 0; i < created; i++) pthread_join(threads[i], NULL);
  pthread_attr_destroy(&attributes);
  pthread_mutex_destroy(&gate);

  proven_threads = created + 1;
  if (proven_threads < wanted) thread_limit = proven_threads;
  return proven_threads;
}

/* Let the next `possible_threads` try again where room had ended. */
static void forget_thread_limit(void) { thread_limit = kMaxThreads; }

#endif
