/* Vectors and element types: the one place that knows the instruction set.
 *
 * Arithmetic is written with the compilers' vector extensions, which give AVX-512, AVX2, SSE or
 * NEON code from one source by the flags of the tier; intrinsics stand only where the extensions
 * have no word: partial loads and stores, streaming stores, half precision.
 *
 * An element type T (float, double, Half, BFloat16) has three vector views:
 *   Wide   - kWide elements as float64, for sums
 *   Vec    - kLanes elements in the type of the maps (float64 for double, else float32)
 *   Narrow - kWide elements in that type
 */
#ifndef BNCORE_SIMD_H
#define BNCORE_SIMD_H

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) || defined(_M_X64)
#if defined(__GNUC__) && !defined(__clang__)
/* gcc's own header starts some results as "undefined" and then warns of it. */
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#define BNCORE_X86 1
#endif

#define BNCORE_INLINE __attribute__((always_inline)) inline
/* For functions with tables of their own: inlined, several of them would be on the stack at
 * once. */
#define BNCORE_OWN_FRAME __attribute__((noinline))

namespace bncore {

#if defined(__AVX512F__) && defined(__AVX512VL__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int kWide = kVectorBytes / 8;   // float64 in a vector
constexpr int kFloats = kVectorBytes / 4; // float32 in a vector

constexpr int kCacheLine = 64; // bytes, of every x86-64 processor and of most others

typedef double Wide __attribute__((vector_size(kVectorBytes)));
typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef float HalfFloats __attribute__((vector_size(kVectorBytes / 2))); // kWide floats

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

template <class V, class T>
inline V load_unaligned(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class T>
inline void store_unaligned(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

/* a b + c, rounded once where the tier can. The kernels are compiled without contraction, so that
 * which products are fused is told here and not by the compiler's mood: code for whole vectors
 * and for what is left of them gives the same bits. */
BNCORE_INLINE Wide fma(Wide a, Wide b, Wide c) {
#if defined(__AVX512VL__)
  return (Wide)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (Wide)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

BNCORE_INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512VL__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

BNCORE_INLINE HalfFloats fma(HalfFloats a, HalfFloats b, HalfFloats c) {
#if defined(__AVX512VL__)
  return (HalfFloats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__AVX2__)
  return (HalfFloats)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#else
  return a * b + c;
#endif
}

/* The same of one element. */
template <class Real> BNCORE_INLINE std::enable_if_t<std::is_floating_point_v<Real>, Real> fma(
    Real a, Real b, Real c) {
#if defined(__AVX2__)
  if constexpr (sizeof(Real) == 8) return __builtin_fma(a, b, c);
  else return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

/* sum + v. In vectors of 256 bits as 1 v + sum, rounded once and so the same: AMD's processors have
 * units that add and units that multiply and add, and sums keep the first busy with conversions to
 * float64 already. */
BNCORE_INLINE Wide plus(Wide sum, Wide v) {
#if defined(__AVX2__) && !defined(__AVX512VL__)
  return (Wide)_mm256_fmadd_pd((__m256d)v, _mm256_set1_pd(1), (__m256d)sum);
#else
  return sum + v;
#endif
}

/* The greater and the lesser of two in each lane; where one is NaN it is v. */
template <class V> BNCORE_INLINE V most(V limit, V v) {
#if defined(__AVX512VL__)
  if constexpr (std::is_same_v<V, Floats>) return (V)_mm512_max_ps((__m512)limit, (__m512)v);
  if constexpr (std::is_same_v<V, Wide>) return (V)_mm512_max_pd((__m512d)limit, (__m512d)v);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<V, Floats>) return (V)_mm256_max_ps((__m256)limit, (__m256)v);
  if constexpr (std::is_same_v<V, Wide>) return (V)_mm256_max_pd((__m256d)limit, (__m256d)v);
#elif defined(BNCORE_X86)
  if constexpr (std::is_same_v<V, Floats>) return (V)_mm_max_ps((__m128)limit, (__m128)v);
  if constexpr (std::is_same_v<V, Wide>) return (V)_mm_max_pd((__m128d)limit, (__m128d)v);
#endif
  return limit > v ? limit : v;
}

template <class V> BNCORE_INLINE V least(V limit, V v) {
#if defined(__AVX512VL__)
  if constexpr (std::is_same_v<V, Floats>) return (V)_mm512_min_ps((__m512)limit, (__m512)v);
  if constexpr (std::is_same_v<V, Wide>) return (V)_mm512_min_pd((__m512d)limit, (__m512d)v);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<V, Floats>) return (V)_mm256_min_ps((__m256)limit, (__m256)v);
  if constexpr (std::is_same_v<V, Wide>) return (V)_mm256_min_pd((__m256d)limit, (__m256d)v);
#elif defined(BNCORE_X86)
  if constexpr (std::is_same_v<V, Floats>) return (V)_mm_min_ps((__m128)limit, (__m128)v);
  if constexpr (std::is_same_v<V, Wide>) return (V)_mm_min_pd((__m128d)limit, (__m128d)v);
#endif
  return limit < v ? limit : v;
}

/* gcc 12 splits __builtin_convertvector into halves, hence the intrinsics. */
inline Wide to_wide(HalfFloats v) {
#if defined(__AVX512VL__)
  return (Wide)_mm512_cvtps_pd((__m256)v);
#elif defined(__AVX2__)
  return (Wide)_mm256_cvtps_pd((__m128)v);
#else
  return __builtin_convertvector(v, Wide);
#endif
}

inline Wide to_wide(Wide v) { return v; }

/* 0 where x <= low or, if there is a high, x >= high, else v: a NaN closes nothing. */
template <class V> BNCORE_INLINE Wide to_wide_within(V v, V x, V low) {
#if defined(__AVX512VL__)
  if constexpr (std::is_same_v<V, HalfFloats>) {
    const __mmask8 open = _mm256_cmp_ps_mask((__m256)x, (__m256)low, _CMP_NLE_UQ);
    return (Wide)_mm512_maskz_cvtps_pd(open, (__m256)v);
  }
#endif
  return to_wide(x <= low ? V{} : v);
}
template <class V> BNCORE_INLINE Wide to_wide_within(V v, V x, V low, V high) {
#if defined(__AVX512VL__)
  if constexpr (std::is_same_v<V, HalfFloats>) {
    const __mmask8 above = _mm256_cmp_ps_mask((__m256)x, (__m256)low, _CMP_NLE_UQ);
    const __mmask8 open = _mm256_mask_cmp_ps_mask(above, (__m256)x, (__m256)high, _CMP_NGE_UQ);
    return (Wide)_mm512_maskz_cvtps_pd(open, (__m256)v);
  }
#endif
  return to_wide((x <= low) | (x >= high) ? V{} : v);
}

inline HalfFloats to_floats(Wide v) {
#if defined(__AVX512VL__)
  return (HalfFloats)_mm512_cvtpd_ps((__m512d)v);
#elif defined(__AVX2__)
  return (HalfFloats)_mm256_cvtpd_ps((__m256d)v);
#else
  return __builtin_convertvector(v, HalfFloats);
#endif
}

/* The first kWide of kFloats. */
inline HalfFloats low_half(Floats v) {
  HalfFloats low;
  std::memcpy(&low, &v, sizeof(low));
  return low;
}
inline Wide low_half(Wide v) { return v; }

/* kFloats from two halves, in registers: put together in memory they could not be read before both
 * had been written. */
inline Floats joined(HalfFloats low, HalfFloats high) {
#if defined(__AVX512VL__) && defined(__AVX512DQ__)
  return (Floats)_mm512_insertf32x8(_mm512_castps256_ps512((__m256)low), (__m256)high, 1);
#elif defined(__AVX2__)
  return (Floats)_mm256_set_m128((__m128)high, (__m128)low);
#else
  Floats both;
  for (int i = 0; i < kWide; ++i) both[i] = low[i], both[kWide + i] = high[i];
  return both;
#endif
}

template <class T>
inline void stream_vector(T* p, Floats v) {
#if defined(__AVX512F__) && defined(__AVX512VL__)
  _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
#elif defined(BNCORE_X86)
  _mm_stream_ps(reinterpret_cast<float*>(p), (__m128)v);
#else
  store_unaligned(p, v);
#endif
}

/* Whether the processor is one of AMD's. */
inline bool is_amd() {
#if defined(BNCORE_X86)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

/* Streaming stores are weakly ordered: a fence makes them visible before a barrier. */
inline void stream_fence() {
#if defined(BNCORE_X86)
  _mm_sfence();
#endif
}

#if defined(__AVX2__) && !defined(__AVX512VL__)
/* A mask of the first k of 8 (float32) or 4 (float64) lanes. */
inline __m256i first_lanes(int k, int bytes) {
  alignas(32) static const int32_t ones_then_zeros[16] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                                          0,  0,  0,  0,  0,  0,  0,  0};
  const int32_t* start = ones_then_zeros + 8 - k * (bytes / 4);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start));
}

/* Store the first k of 8 float32, by halves: masked stores take some processors dozens of steps. */
inline void store_first(float* p, __m256 v, int k) {
  if (k & 8) return _mm256_storeu_ps(p, v);
  __m128 half = _mm256_castps256_ps128(v);
  if (k & 4) {
    _mm_storeu_ps(p, half);
    half = _mm256_extractf128_ps(v, 1);
    p += 4;
  }
  if (k & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), half);
    half = _mm_movehl_ps(half, half);
    p += 2;
  }
  if (k & 1) _mm_store_ss(p, half);
}
#endif

/* -------------------------------------------------------------------------------- elements */

template <class T> struct Element;

template <> struct Element<float> {
  typedef float Real;
  typedef Floats Vec;
  typedef HalfFloats Narrow;
  static constexpr int kLanes = kFloats;

  static double wide(float v) { return v; }

  static Narrow load_narrow(const float* p) { return load_unaligned<Narrow>(p); }
  static Wide load_wide(const float* p) { return to_wide(load_narrow(p)); }
  static Vec load(const float* p) { return load_unaligned<Vec>(p); }
  static void store(float* p, Vec v) { store_unaligned(p, v); }
  static void stream(float* p, Vec v) { stream_vector(p, v); }

  /* The first k lanes; the others are 0. */
  static Vec load_part(const float* p, int k) {
#if defined(__AVX512VL__)
    return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << k) - 1), p);
#elif defined(__AVX2__)
    return (Vec)_mm256_maskload_ps(p, first_lanes(k, 4));
#else
    Vec v = {};
    for (int i = 0; i < k; ++i) v[i] = p[i];
    return v;
#endif
  }
  static void store_part(float* p, Vec v, int k) {
#if defined(__AVX512VL__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << k) - 1), (__m512)v);
#elif defined(__AVX2__)
    store_first(p, (__m256)v, k);
#else
    for (int i = 0; i < k; ++i) p[i] = v[i];
#endif
  }
};

template <> struct Element<double> {
  typedef double Real;
  typedef Wide Vec;
  typedef Wide Narrow;
  static constexpr int kLanes = kWide;

  static double wide(double v) { return v; }

  static Narrow load_narrow(const double* p) { return load_unaligned<Wide>(p); }
  static Wide load_wide(const double* p) { return load_narrow(p); }
  static Vec load(const double* p) { return load_unaligned<Vec>(p); }
  static void store(double* p, Vec v) { store_unaligned(p, v); }
  static void stream(double* p, Vec v) { stream_vector(p, (Floats)v); }

  static Vec load_part(const double* p, int k) {
#if defined(__AVX512VL__)
    return (Vec)_mm512_maskz_loadu_pd((__mmask8)((1u << k) - 1), p);
#elif defined(__AVX2__)
    return (Vec)_mm256_maskload_pd(p, first_lanes(k, 8));
#else
    Vec v = {};
    for (int i = 0; i < k; ++i) v[i] = p[i];
    return v;
#endif
  }
  static void store_part(double* p, Vec v, int k) {
#if defined(__AVX512VL__)
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << k) - 1), (__m512d)v);
#elif defined(__AVX2__)
    store_first(reinterpret_cast<float*>(p), (__m256)v, 2 * k);
#else
    for (int i = 0; i < k; ++i) p[i] = v[i];
#endif
  }
};

/* Half formats: computed as float32, rounded to nearest even on the way out.  B gives the two
 * conversions of a vector of kFloats 16-bit patterns. */

typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));

/* Each 16 bits in 32, and back where the upper half is 0. */
inline Bits32 spread(Bits16 v) {
#if defined(__AVX512VL__)
  return (Bits32)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (Bits32)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, Bits32);
#endif
}

inline Bits16 gather(Bits32 v) {
#if defined(__AVX512VL__)
  return (Bits16)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
  const __m256i all = (__m256i)v;
  return (Bits16)_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
#else
  return __builtin_convertvector(v, Bits16);
#endif
}

inline Floats widen(Bits16 v, BFloat16) { return (Floats)(spread(v) << 16); }

/* A NaN made quiet, with nothing in the half that rounding takes away. */
inline Floats settled(Floats v) {
  return v != v ? (Floats)(((Bits32)v & 0xffff0000) | 0x400000) : v;
}

/* The upper halves, rounded, of what is settled. */
inline Bits32 upper_halves(Floats v) {
  const Bits32 bits = (Bits32)v;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline Bits16 narrow(Floats v, BFloat16) { return gather(upper_halves(settled(v))); }

inline Floats widen(Bits16 v, Half) {
#if defined(__AVX512VL__)
  return (Floats)_mm512_cvtph_ps((__m256i)v);
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtph_ps((__m128i)v);
#else
  /* Place exponent and mantissa, then let one multiplication renormalize, subnormals included. */
  Bits32 bits = __builtin_convertvector(v, Bits32);
  Bits32 magnitude = (bits & 0x7fff) << 13;
  Bits32 is_special = (Bits32)((bits & 0x7c00) == 0x7c00);
  Floats scaled = (Floats)magnitude * 0x1p112f;
  Bits32 special = magnitude | 0x7f800000;
  Bits32 value = (is_special & special) | (~is_special & (Bits32)scaled);
  return (Floats)(value | ((bits & 0x8000) << 16));
#endif
}

inline Bits16 narrow(Floats v, Half) {
#if defined(__AVX512VL__)
  return (Bits16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (Bits16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  Bits32 bits = (Bits32)v, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  /* Normal results round in integers; subnormal ones by adding a number whose last place is
   * theirs; from 65520 on the result is infinite. */
  Bits32 normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  Bits32 subnormal = (Bits32)((Floats)magnitude + 0.5f) - 0x3f000000;
  Bits32 is_small = (Bits32)(magnitude < 0x38800000), is_large = (Bits32)(magnitude >= 0x477ff000);
  Bits32 is_nan = (Bits32)(magnitude > 0x7f800000);
  Bits32 half = (is_small & subnormal) | (~is_small & normal);
  half = (is_large & 0x7c00) | (~is_large & half);
  half = (is_nan & (0x7e00 | ((magnitude >> 13) & 0x3ff))) | (~is_nan & half);
  return __builtin_convertvector(half | sign, Bits16);
#endif
}

#if defined(__AVX2__) && !defined(__AVX512VL__)
/* Two whole vectors in one of 32 bytes: fewer steps than one after the other. */
inline __m256i narrow_two(Floats a, Floats b, BFloat16) {
  const bool any_nan = _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q));
  if (__builtin_expect(any_nan, 0)) a = settled(a), b = settled(b);
  const __m256i by_lanes = _mm256_packus_epi32((__m256i)upper_halves(a), (__m256i)upper_halves(b));
  return _mm256_permute4x64_epi64(by_lanes, 0xd8);
}

inline __m256i narrow_two(Floats a, Floats b, Half) {
  return _mm256_set_m128i((__m128i)narrow(b, Half()), (__m128i)narrow(a, Half()));
}
#endif

/* kWide elements at p. */
inline HalfFloats widen_narrow(const BFloat16* p) {
#if defined(__AVX512VL__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (HalfFloats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#elif defined(__AVX2__)
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (HalfFloats)_mm_unpacklo_epi16(_mm_setzero_si128(), bits);
#else
  Bits16 bits = {};
  std::memcpy(&bits, p, kWide * sizeof(*p));
  return low_half(widen(bits, BFloat16()));
#endif
}

inline HalfFloats widen_narrow(const Half* p) {
#if defined(__AVX512VL__)
  return (HalfFloats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (HalfFloats)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  Bits16 bits = {};
  std::memcpy(&bits, p, kWide * sizeof(*p));
  return low_half(widen(bits, Half()));
#endif
}

template <class T> struct SixteenBit {
  typedef float Real;
  typedef Floats Vec;
  typedef HalfFloats Narrow;
  static constexpr int kLanes = kFloats;

  static Vec load(const T* p) { return widen(load_unaligned<Bits16>(p), T()); }
  static void store(T* p, Vec v) { store_unaligned(p, bncore::narrow(v, T())); }
  static void stream(T* p, Vec v) {
    Bits16 bits = bncore::narrow(v, T());
#if defined(__AVX512VL__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)bits);
#elif defined(__AVX2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)bits);
#else
    store_unaligned(p, bits);
#endif
  }
#if defined(__AVX2__) && !defined(__AVX512VL__)
  static void store_two(T* p, Vec a, Vec b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_two(a, b, T()));
  }
  static void stream_two(T* p, Vec a, Vec b) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_two(a, b, T()));
  }
#endif
  static Vec load_part(const T* p, int k) {
    Bits16 bits = {};
    std::memcpy(&bits, p, k * sizeof(T));
    return widen(bits, T());
  }
  static void store_part(T* p, Vec v, int k) {
    Bits16 bits = bncore::narrow(v, T());
    std::memcpy(p, &bits, k * sizeof(T));
  }
  static Narrow load_narrow(const T* p) { return widen_narrow(p); }
  static Wide load_wide(const T* p) { return to_wide(load_narrow(p)); }
  static double wide(T v) {
    Bits16 bits = {};
    bits[0] = v.bits;
    return widen(bits, T())[0];
  }
};

template <> struct Element<Half> : SixteenBit<Half> {};
template <> struct Element<BFloat16> : SixteenBit<BFloat16> {};

/* Whether two vectors are stored as one. */
#if defined(__AVX2__) && !defined(__AVX512VL__)
template <class T> constexpr bool kStoredInTwos = sizeof(T) == 2;
#else
template <class T> constexpr bool kStoredInTwos = false;
#endif

/* The first k of kWide elements as float64; the others are 0. */
template <class T>
inline Wide load_wide_part(const T* p, int k) {
  Wide v = {};
  for (int i = 0; i < k; ++i) v[i] = Element<T>::wide(p[i]);
  return v;
}

/* What the instruction sets have for it; and keep_first: v in the first k lanes, 0 in the others. */
#if defined(__AVX512VL__)
template <>
inline Wide load_wide_part<float>(const float* p, int k) {
  return (Wide)_mm512_cvtps_pd(_mm256_maskz_loadu_ps((__mmask8)((1u << k) - 1), p));
}
template <>
inline Wide load_wide_part<double>(const double* p, int k) {
  return Element<double>::load_part(p, k);
}
inline Wide keep_first(Wide v, int k) {
  return (Wide)_mm512_maskz_mov_pd((__mmask8)((1u << k) - 1), (__m512d)v);
}
#elif defined(__AVX2__)
template <>
inline Wide load_wide_part<float>(const float* p, int k) {
  return (Wide)_mm256_cvtps_pd(_mm_maskload_ps(p, _mm256_castsi256_si128(first_lanes(k, 4))));
}
template <>
inline Wide load_wide_part<double>(const double* p, int k) {
  return Element<double>::load_part(p, k);
}
inline Wide keep_first(Wide v, int k) {
  return (Wide)_mm256_and_pd((__m256d)v, _mm256_castsi256_pd(first_lanes(k, 8)));
}
#else
inline Wide keep_first(Wide v, int k) {
  for (int i = k; i < kWide; ++i) v[i] = 0;
  return v;
}
#endif

template <bool Whole, class T>
inline Wide load_wide(const T* p, int k) {
  return Whole ? Element<T>::load_wide(p) : load_wide_part(p, k);
}

/* Float64 values in vectors V of another type; the first k of them where not Whole, then 0. */
template <class V, bool Whole>
inline V load_doubles(const double* p, int k) {
  if constexpr (std::is_same_v<V, Wide>) return load_wide<Whole>(p, k);
  else if constexpr (std::is_same_v<V, HalfFloats>) return to_floats(load_wide<Whole>(p, k));
  else {
    HalfFloats low = to_floats(load_wide<Whole>(p, k < kWide ? k : kWide)), high = {};
    if (Whole || k > kWide) high = to_floats(load_wide<Whole>(p + kWide, k - kWide));
    return joined(low, high);
  }
}

/* Comparisons give vectors of integers, -1 where true: those of V from bytes that are -1 or 0. */
template <class V> inline auto widen_lanes(const int8_t* p) {
  typedef decltype(V{} < V{}) Lanes;
  constexpr size_t count = sizeof(V) / sizeof(V{}[0]);
  constexpr bool is_double = sizeof(V{}[0]) == 8;
#if defined(BNCORE_X86) && defined(__SSE4_1__)
  if constexpr (sizeof(V) >= 16) {
    __m128i bytes = {};
    std::memcpy(&bytes, p, count);
#if defined(__AVX512VL__)
    if constexpr (sizeof(V) == 64)
      return is_double ? (Lanes)_mm512_cvtepi8_epi64(bytes) : (Lanes)_mm512_cvtepi8_epi32(bytes);
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(V) == 32)
      return is_double ? (Lanes)_mm256_cvtepi8_epi64(bytes) : (Lanes)_mm256_cvtepi8_epi32(bytes);
#endif
    if constexpr (sizeof(V) == 16)
      return is_double ? (Lanes)_mm_cvtepi8_epi64(bytes) : (Lanes)_mm_cvtepi8_epi32(bytes);
  }
#endif
  Lanes lanes;
  for (size_t lane = 0; lane < count; ++lane) lanes[lane] = p[lane];
  return lanes;
}

/* The first k of them where not Whole, then 0. */
template <class V, bool Whole> inline auto load_lanes(const int8_t* p, int k) {
  if constexpr (Whole) return widen_lanes<V>(p);
  int8_t some[sizeof(V) / sizeof(V{}[0])] = {};
  if (k < 0) __builtin_unreachable();
  std::memcpy(some, p, k);
  return widen_lanes<V>(some);
}

/* kWide elements in the type of the maps; the first k of them where not Whole, then 0. */
template <bool Whole, class T>
inline typename Element<T>::Narrow load_narrow(const T* p, int k) {
  return Whole ? Element<T>::load_narrow(p) : low_half(Element<T>::load_part(p, k));
}

/* Results of comparisons as bits, lane 0 the lowest. */
template <class Lanes> inline uint32_t bits_of_lanes(Lanes v) {
  constexpr bool is_double = sizeof(v[0]) == 8;
#if defined(__AVX512VL__) && defined(__AVX512DQ__)
  if constexpr (sizeof(v) == 64)
    return is_double ? _mm512_movepi64_mask((__m512i)v) : _mm512_movepi32_mask((__m512i)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(v) == 32)
    return is_double ? _mm256_movemask_pd((__m256d)v) : _mm256_movemask_ps((__m256)v);
#elif defined(BNCORE_X86)
  if constexpr (sizeof(v) == 16)
    return is_double ? _mm_movemask_pd((__m128d)v) : _mm_movemask_ps((__m128)v);
#endif
  uint32_t bits = 0;
  for (size_t lane = 0; lane < sizeof(v) / sizeof(v[0]); ++lane) bits |= (v[lane] & 1u) << lane;
  return bits;
}

/* A bit for each lane, 1 where v <= low or v >= high. */
template <class V> inline uint32_t bits_outside(V v, V low, V high) {
#if defined(__AVX512VL__)
  if constexpr (std::is_same_v<V, Floats>)
    return _mm512_cmp_ps_mask((__m512)v, (__m512)low, _CMP_LE_OQ) |
           _mm512_cmp_ps_mask((__m512)v, (__m512)high, _CMP_GE_OQ);
  if constexpr (std::is_same_v<V, Wide>)
    return _mm512_cmp_pd_mask((__m512d)v, (__m512d)low, _CMP_LE_OQ) |
           _mm512_cmp_pd_mask((__m512d)v, (__m512d)high, _CMP_GE_OQ);
#endif
  return bits_of_lanes((v <= low) | (v >= high));
}

alignas(64) inline constexpr int32_t kBitOfLane[16] = {
    1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
alignas(64) inline constexpr int64_t kBitOfWideLane[8] = {1, 2, 4, 8, 16, 32, 64, 128};

/* The same from bits that begin i bits after p; up to 3 bytes more than needed are read. */
template <class V> inline auto lanes_of_bits(const uint8_t* p, ptrdiff_t i) {
  typedef decltype(V{} < V{}) Lanes;
  uint32_t word;
  std::memcpy(&word, p + i / 8, sizeof(word));
  const int bits = static_cast<int>(word >> i % 8 & 0xffff);
  Lanes lane;
  if constexpr (sizeof(lane[0]) == 8) lane = load_unaligned<Lanes>(kBitOfWideLane);
  else lane = load_unaligned<Lanes>(kBitOfLane);
  return ((bits - Lanes{}) & lane) == lane;
}

/* The lanes' sum, in halves: a fixed order. */
#if defined(__AVX2__)
inline double sum_of_four(__m256d v) {
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
inline double lane_sum(Wide v) {
#if defined(__AVX512VL__)
  const __m512d all = (__m512d)v;
  return sum_of_four(_mm256_add_pd(_mm512_castpd512_pd256(all), _mm512_extractf64x4_pd(all, 1)));
#else
  return sum_of_four((__m256d)v);
#endif
}
#else
inline double lane_sum(Wide v) {
  double parts[kWide];
  std::memcpy(parts, &v, sizeof(v));
  for (int half = kWide / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}
#endif

} // namespace bncore

#endif
