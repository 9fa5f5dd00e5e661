/* Gates: where an activation hands its gradient on, so that
 *
 *   dz = dy             where z is between low and high
 *        dy * outside   elsewhere, or 0 whatever dy is
 *
 * z is not kept for it. Without a residual z is monotone in x, rounding included, so that the gate
 * is an interval of x, found once for each channel: exact but where a finite x gives a z that is
 * NaN, and two comparisons for an element. With a residual the forward pass keeps a bit for each
 * element.
 */
#ifndef BNCORE_GATES_H
#define BNCORE_GATES_H

#include <limits>

#include "activations.h"

namespace bncore {

template <class T> struct Gate {
  typename Element<T>::Real low, high, outside;
  explicit Gate(Epilogue e)
      : low(static_cast<decltype(low)>(e.activation == 1 ? e.a : 0)),
        high(static_cast<decltype(high)>(e.activation == 1 ? e.b : HUGE_VAL)),
        outside(static_cast<decltype(outside)>(e.activation == 1 ? 0 : e.a)) {}

  /* Where it is closed: not for a NaN. */
  template <class V> static auto closed(V z, V low, V high) { return (z <= low) | (z >= high); }
  template <class V> auto closed(V z) const { return closed(z, low - V{}, high - V{}); }
  template <class V> uint32_t closed_bits(V z) const {
    return bits_outside(z, low - V{}, high - V{});
  }
  template <class Lanes, class V> V apply(Lanes closed, V dy) const {
    const V otherwise = outside == 0 ? V{} : dy * outside;
    return closed ? otherwise : dy;
  }
};

/* ------------------------------------------------------------------------------- where dz is */

/* A source gives dz of the elements at i, or of the k that are left, whose x are `x`; `dz` in
 * vectors of x's type, `wide_dz` as float64. */

/* Elements, or bits, from one row to the next. */
struct Strides {
  ptrdiff_t dy, bits;
};

/* dz = dy, where there is no activation. */
template <class T> struct PlainSource {
  const T* dy;

  template <bool Whole, class V> BNCORE_INLINE V dz(ptrdiff_t i, int k, V) const {
    return load_as<V, Whole>(dy + i, k);
  }
  template <bool Whole, class V> BNCORE_INLINE Wide wide_dz(ptrdiff_t i, int k, V) const {
    return load_wide<Whole>(dy + i, k);
  }
  PlainSource row(ptrdiff_t r, Strides strides) const { return {dy + r * strides.dy}; }
};

/* How an interval of x gates dy: elsewhere it gives 0, or dy times a slope. */
enum class Interval { kZero, kSloped, kZeroBelow /* where no channel's interval ends above */ };

/* The gate is an interval of x. */
template <class T, template <class> class Coefficient, Interval Kind> struct IntervalSource {
  const T* dy;
  Coefficient<T> low, high;
  Gate<T> gate;

  template <bool Whole, class V> BNCORE_INLINE V dz(ptrdiff_t i, int k, V x) const {
    const V g = load_as<V, Whole>(dy + i, k);
    if constexpr (Kind == Interval::kZeroBelow) return x <= low.template as<V>(i) ? V{} : g;
    const auto closed = gate.closed(x, low.template as<V>(i), high.template as<V>(i));
    if constexpr (Kind == Interval::kSloped) return gate.apply(closed, g);
    else return closed ? V{} : g;
  }
  template <bool Whole, class V> BNCORE_INLINE Wide wide_dz(ptrdiff_t i, int k, V x) const {
    if constexpr (Kind == Interval::kSloped) return to_wide(dz<Whole>(i, k, x));
    const V g = load_as<V, Whole>(dy + i, k);
    if constexpr (Kind == Interval::kZeroBelow)
      return to_wide_within(g, x, low.template as<V>(i));
    else return to_wide_within(g, x, low.template as<V>(i), high.template as<V>(i));
  }
  IntervalSource row(ptrdiff_t r, Strides strides) const {
    return {dy + r * strides.dy, low, high, gate};
  }
};

/* The gate was kept as a bit for each element, 1 where it is closed. */
template <class T> struct BitSource {
  const T* dy;
  const uint8_t* bits;
  ptrdiff_t first; // the bit of the first element
  Gate<T> gate;

  template <bool Whole, class V> BNCORE_INLINE V dz(ptrdiff_t i, int k, V) const {
    return gate.apply(lanes_of_bits<V>(bits, first + i), load_as<V, Whole>(dy + i, k));
  }
  template <bool Whole, class V> BNCORE_INLINE Wide wide_dz(ptrdiff_t i, int k, V x) const {
    return to_wide(dz<Whole>(i, k, x));
  }
  BitSource row(ptrdiff_t r, Strides strides) const {
    return {dy + r * strides.dy, bits, first + r * strides.bits, gate};
  }
};

/* z is computed again. */
template <class T, class Latent> struct LatentSource {
  const T* dy;
  Latent latent;
  Gate<T> gate;

  template <bool Whole, class V> BNCORE_INLINE V dz(ptrdiff_t i, int k, V) const {
    return gate.apply(gate.closed(latent.template z<V, Whole>(i, k)), load_as<V, Whole>(dy + i, k));
  }
};

/* In the place of x is y, what a leaky ReLU has made of z: dz and z follow from it, and z takes
 * the place of x. Activation 3, of slope a. */
template <class T> struct OutputSource {
  typedef typename Element<T>::Real Real;
  const T* dy;
  Real slope, inverse;

  template <class V> BNCORE_INLINE V z(V y) const { return y < V{} ? y * inverse : y; }
  template <bool Whole, class V> BNCORE_INLINE V dz(ptrdiff_t i, int k, V y) const {
    const V g = load_as<V, Whole>(dy + i, k);
    return y <= V{} ? g * slope : g;
  }
  template <bool Whole, class V> BNCORE_INLINE Wide wide_dz(ptrdiff_t i, int k, V y) const {
    return to_wide(dz<Whole>(i, k, y));
  }
  OutputSource row(ptrdiff_t r, Strides strides) const {
    return {dy + r * strides.dy, slope, inverse};
  }
};

/* What the statistics are of: x itself, but for a source that makes it of x. */
template <class Source, class V> BNCORE_INLINE V latent_of(const Source&, V x) { return x; }
template <class T, class V> BNCORE_INLINE V latent_of(const OutputSource<T>& source, V y) {
  return source.z(y);
}

/* Keep `count` bits, 64 or at most 57, from bit i of p on; those before it are there already,
 * and the last byte begun is filled up with 0. Where count is a constant so are the sizes of the
 * stores. */
BNCORE_INLINE void keep_bits(uint8_t* p, ptrdiff_t i, uint64_t bits, int count) {
  uint8_t* const byte = p + i / 8;
  const int before = static_cast<int>(i % 8), whole = count / 8;
  uint64_t word = bits << before;
  if (before) word |= *byte & ((1u << before) - 1);
  std::memcpy(byte, &word, whole);
  const int left = before + count % 8; // bits after the whole bytes
  const uint64_t rest = whole < 8 ? word >> 8 * whole : before ? bits >> (64 - before) : 0;
  if (left > 0) byte[whole] = static_cast<uint8_t>(rest);
  if (left > 8) byte[whole + 1] = static_cast<uint8_t>(rest >> 8);
}

/* ------------------------------------------------------------------------ intervals of x */

/* z of some channels as the maps compute it. */
template <class Real> struct Ramps {
  const Real *mean, *scale, *offset, *unit;

  Real z(ptrdiff_t c, Real x) const { return fma(x * unit[c] - mean[c], scale[c], offset[c]); }
  /* About where z is at a level. */
  Real guess(ptrdiff_t c, Real level) const {
    return ((level - offset[c]) / scale[c] + mean[c]) / unit[c];
  }
};

/* Floating-point numbers in their order, as integers. */
template <class Real> struct Ordinal {
  typedef std::conditional_t<sizeof(Real) == 8, uint64_t, uint32_t> Int;
  static constexpr Int kSign = Int(1) << (8 * sizeof(Int) - 1);

  static Int of(Real x) {
    Int bits;
    std::memcpy(&bits, &x, sizeof(x));
    return bits & kSign ? ~bits : bits | kSign;
  }
  static Real at(Int ordinal) {
    const Int bits = ordinal & kSign ? ordinal ^ kSign : ~ordinal;
    Real x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  }
};

/* The greatest finite x for which `holds`, which holds up to some number and not beyond: infinity
 * where it always does, NaN where it never does. Searched from a guess on, in growing steps. */
template <class Real, class Holds> inline Real greatest(Real guess, const Holds& holds) {
  typedef Ordinal<Real> O;
  typedef typename O::Int Int;
  constexpr Real most = std::numeric_limits<Real>::max();
  const Int first = O::of(-most), last = O::of(most);
  const auto grown = [](Int step) { return step & O::kSign ? step : 2 * step; };
  Int yes = guess - guess == 0 ? O::of(guess) : O::kSign, no = yes;
  if (holds(O::at(yes))) {
    for (Int step = 1;; step = grown(step)) {
      if (yes == last) return std::numeric_limits<Real>::infinity();
      no = step < last - yes ? yes + step : last;
      if (!holds(O::at(no))) break;
      yes = no;
    }
  } else {
    for (Int step = 1;; step = grown(step)) {
      if (no == first) return std::numeric_limits<Real>::quiet_NaN();
      yes = step < no - first ? no - step : first;
      if (holds(O::at(yes))) break;
      no = yes;
    }
  }
  while (no - yes > 1) {
    const Int middle = yes + (no - yes) / 2;
    (holds(O::at(middle)) ? yes : no) = middle;
  }
  return O::at(yes);
}

/* The same of some channels. Most guesses are off by a number or two, which is told of many
 * channels at once; the others are searched from. */
template <class Real, class Holds>
inline void greatest_of(ptrdiff_t channels, const Real* guess, const Holds& holds, Real* found) {
  typedef Ordinal<Real> O;
  typedef typename O::Int Int;
  constexpr Real far = std::numeric_limits<Real>::max() / 2;
  for (ptrdiff_t c = 0; c < channels; ++c) {
    const Int before = O::of(guess[c]) - 2;
    const auto held = [&](Int on) { return static_cast<Int>(holds(c, O::at(before + on))); };
    const Int held_by = held(1) + held(2) + held(3) + held(4);
    const bool near = held(0) && !held(5) && std::fabs(guess[c]) < far;
    found[c] = near ? O::at(before + held_by) : std::numeric_limits<Real>::quiet_NaN();
  }
  for (ptrdiff_t c = 0; c < channels; ++c)
    if (found[c] != found[c])
      found[c] = greatest(guess[c], [&](Real x) { return holds(c, x); });
}

/* The number after x, for what `greatest` gives: infinity and NaN change places with their
 * meaning, as nothing is beyond all numbers and everything beyond none. */
template <class Real> inline Real beyond(Real x) {
  if (x != x) return -std::numeric_limits<Real>::infinity();
  if (x > std::numeric_limits<Real>::max()) return std::numeric_limits<Real>::quiet_NaN();
  return Ordinal<Real>::at(Ordinal<Real>::of(x) + 1);
}

/* Channels whose gates are found together. */
constexpr ptrdiff_t kGatesAtOnce = 64;

/* The intervals of x for which channels' z pass the gate; a limit that is NaN bounds nothing.
 * Where z falls with x its lower level is the upper end of the interval. */
template <class T, class Real = typename Element<T>::Real>
inline void gate_intervals(const Gate<T>& gate, const Ramps<Real>& ramps, ptrdiff_t channels,
                           double* low, double* high) {
  Real guess[kGatesAtOnce], at_low[kGatesAtOnce], at_high[kGatesAtOnce];
  const auto falls = [&](ptrdiff_t c) { return ramps.scale[c] < 0; };
  for (ptrdiff_t c = 0; c < channels; ++c) guess[c] = ramps.guess(c, gate.low);
  greatest_of(channels, guess, [&](ptrdiff_t c, Real x) {
    return (ramps.z(c, x) <= gate.low) != falls(c);
  }, at_low);
  const bool bounded = !(gate.high > std::numeric_limits<Real>::max());
  for (ptrdiff_t c = 0; bounded && c < channels; ++c) guess[c] = ramps.guess(c, gate.high);
  if (bounded)
    greatest_of(channels, guess, [&](ptrdiff_t c, Real x) {
      return (ramps.z(c, x) >= gate.high) == falls(c);
    }, at_high);
  constexpr Real nan = std::numeric_limits<Real>::quiet_NaN();
  for (ptrdiff_t c = 0; c < channels; ++c) {
    const Real its_low = falls(c) ? (bounded ? at_high[c] : nan) : at_low[c];
    const Real its_high = falls(c) ? beyond(at_low[c]) : bounded ? beyond(at_high[c]) : nan;
    low[c] = its_low, high[c] = its_high;
  }
}

} // namespace bncore

#endif
