/* Coefficients: what a map multiplies and adds, from statistics and parameters, for the channels of
 * a group; and the powers of two that keep extreme channels within the range of the arithmetic.
 */
#ifndef BNCORE_COEFFICIENTS_H
#define BNCORE_COEFFICIENTS_H

#include <cmath>
#include <limits>

#include "grid.h"

namespace bncore {

/* Places of a line that stand in a table once more, behind its end, where lines run on. */
constexpr ptrdiff_t kOver = kCacheLine / 2;

/* A value per place of a line from a value per channel, which stand at its beginning: each
 * channel's repeated `inner` times, the whole `tile` times. */
template <class Real> inline void spread_line(const Grid& grid, ptrdiff_t channels, Real* line) {
  const ptrdiff_t repeat = grid.columns ? grid.inner : 1, places = channels * repeat;
  for (ptrdiff_t c = repeat > 1 ? channels - 1 : -1; c >= 0; --c) { // the last first: they move up
    const Real v = line[c];
    for (ptrdiff_t s = 0; s < repeat; ++s) line[c * repeat + s] = v;
  }
  const ptrdiff_t end = grid.tile * places + (grid.gapless ? kOver : 0);
  for (ptrdiff_t done = places; done < end; done *= 2) // each time as much as there is already
    std::memcpy(line + done, line, (2 * done < end ? done : end - done) * sizeof(Real));
}

/* The same from a function of the channel. */
template <class Real, class ValueOfChannel>
inline void fill_line(const Grid& grid, ptrdiff_t channels, const ValueOfChannel& value,
                      Real* line) {
  for (ptrdiff_t c = 0; c < channels; ++c) line[c] = static_cast<Real>(value(c));
  spread_line(grid, channels, line);
}

/* Coefficients of a group, one per channel (rows) or per place of a line (columns). For y they
 * are mean, scale, offset and unit; for dx mean, shift, rest, slope, scale and unit; for dz
 * gate_low and gate_high. */
enum { kMean, kScale, kOffset, kShift = kOffset, kRest, kSlope, kUnit, kGateLow, kGateHigh, kRows };

template <class T> struct CoefficientTable {
  typedef typename Element<T>::Real Real;
  static constexpr ptrdiff_t kPlaces = max_line(sizeof(T)) + Element<T>::kLanes + kOver;
  alignas(64) Real rows[kRows][kPlaces];
  ptrdiff_t phase; // where in a vector a line begins

  /* For a cell whose results go to `out`: what vectors of columns read is aligned as they are. */
  CoefficientTable(const Grid& grid, const T* out)
      : phase(grid.columns ? place_in_line(out) % Element<T>::kLanes : 0) {}

  Real* row(int which) { return rows[which] + phase; }
  const Real* row(int which) const { return rows[which] + phase; }
};

/* The gates alone, of a group that is summed. */
template <class T> struct GateTable {
  typedef typename Element<T>::Real Real;
  alignas(64) Real rows[2][kLongSumLine + kPad];

  Real* row(int which) { return rows[which - kGateLow]; }
  const Real* row(int which) const { return rows[which - kGateLow]; }
};

/* A coefficient as a map, or a sum, takes it. */
template <class T, class Table = CoefficientTable<T>> struct PickUniform {
  template <class U> using Coefficient = Uniform<U>;
  const Table* table;
  ptrdiff_t c;
  Uniform<T> operator()(int which) const { return {table->row(which)[c]}; }
};

template <class T, class Table = CoefficientTable<T>> struct PickPerPlace {
  template <class U> using Coefficient = PerPlace<U>;
  const Table* table;
  PerPlace<T> operator()(int which) const { return {table->row(which)}; }
};

/* A value per channel as the caller has them: float32, float64, or none. */
struct Values {
  const float* floats;
  const double* doubles;

  /* Those from channel `first` on as float64, where they are so or in `room`; `otherwise` where
   * there are none. */
  const double* as_doubles(ptrdiff_t first, ptrdiff_t channels, double otherwise,
                           double* __restrict room) const {
    if (doubles) return doubles + first;
    for (ptrdiff_t c = 0; c < channels; ++c) room[c] = floats ? floats[first + c] : otherwise;
    return room;
  }
};

/* Per-channel statistics and parameters; without mean_lo it is 0, without gamma 1, without beta
 * 0. */
struct NormalizeParameters {
  const double *mean, *mean_lo, *inv_std;
  Values gamma, beta;
};

struct GradientParameters {
  const double *mean, *mean_lo, *inv_std;
  Values gamma, beta;
  const double *sum_dy, *sum_dy_xhat;
  const double *gate_low, *gate_high; // intervals of x, see gates.h
  double count;
};

/* Maps compute in Real. Channels whose mean or deviations are beyond 2^+-kOrdinary of it have a
 * unit other than 1. */
template <class Real> constexpr int kOrdinary = sizeof(Real) == sizeof(double) ? 400 : 60;

/* The power of two that brings a channel's values into the middle of Real's range. With it no
 * subtraction overflows, no part of the mean is lost below the smallest number, and scaling the
 * data by a power of two leaves the bits of y as they are. */
template <class Real> inline double unit_of(double mean, double inv_std) {
  constexpr int most = kOrdinary<Real>;
  const double large = std::ldexp(1.0, most), small = 1 / large;
  const double deviation = 1 / inv_std, offset = std::fabs(mean);
  double size = offset > deviation ? offset : deviation;
  int greatest = 2 * most; // a Real itself
  if (size >= small && size < large) {
    /* With eps above the variance, a tiny mean may still be all there is. If it is not, x may be as
     * large as deviations are, and must not overflow. */
    if (offset >= small || offset == 0 || deviation > 0x1p20) return 1;
    size = offset, greatest = most - std::ilogb(deviation);
  }
  if (!(size > 0 && std::isfinite(size))) return 1;
  int exponent;
  std::frexp(size, &exponent);
  const int power = (exponent > 0 ? most : -most) - exponent;
  return std::ldexp(1.0, power < greatest ? power : greatest);
}

/* The nearest finite Real to a coefficient, lest it make a NaN of x - mean = 0 or of a product
 * beyond Real; a NaN stays one. */
template <class Real> BNCORE_INLINE Wide finite(Wide v) {
  constexpr double greatest = std::numeric_limits<Real>::max();
  return most(-greatest - Wide{}, least(greatest - Wide{}, v));
}

/* 0 where a channel's unit is 1: an integer as wide as a double, so that many are told at once. */
template <class Real> inline int64_t is_unusual(double mean, double inv_std) {
  constexpr double large = sizeof(Real) == sizeof(double) ? 0x1p400 : 0x1p60, small = 1 / large;
  const double offset = std::fabs(mean);
  const auto unless = [](bool holds) { return holds ? int64_t(0) : int64_t(1); };
  return unless(inv_std > small) | unless(inv_std < large) | unless(offset < large) |
         (unless(offset >= small) & unless(offset == 0));
}

/* Coefficients are found for vectors of channels, as float64, from what the caller has and a
 * unit each. Rows of a table have room for whole vectors. */
template <class Real> BNCORE_INLINE void store_as(Real* to, Wide v) {
  if constexpr (sizeof(Real) == sizeof(double)) store_unaligned(to, v);
  else store_unaligned(to, to_floats(v));
}

template <class Real> BNCORE_INLINE Wide rounded_to(Wide v) {
  return sizeof(Real) == sizeof(double) ? v : to_wide(to_floats(v));
}

/* Calls find with one vector of channels after the other and with what is left: whether it is
 * whole (a type, for templates), its first channel, and how many there are. */
template <class Find> inline void by_vectors(ptrdiff_t channels, const Find& find) {
  ptrdiff_t c = 0;
  for (; c + kWide <= channels; c += kWide) find(std::true_type(), c, kWide);
  if (c < channels) find(std::false_type(), c, static_cast<int>(channels - c));
}

/* The same with the channels' units and their inverses, 1 for most; whether one is not 1. */
template <class T, class Parameters, class Find>
inline bool by_vectors_with_units(const Parameters& p, ptrdiff_t first, ptrdiff_t channels,
                                  const Find& find) {
  typedef typename Element<T>::Real Real;
  const double *mean = p.mean + first, *inv_std = p.inv_std + first;
  int64_t unusual = 0;
  for (ptrdiff_t c = 0; c < channels; ++c) unusual |= is_unusual<Real>(mean[c], inv_std[c]);
  const Wide one = 1 - Wide{};
  if (!unusual) {
    by_vectors(channels, [&](auto whole, ptrdiff_t c, int k) { find(whole, c, k, one, one); });
    return false;
  }
  by_vectors(channels, [&](auto whole, ptrdiff_t c, int k) {
    Wide unit = one;
    for (int i = 0; i < k; ++i) unit[i] = unit_of<Real>(mean[c + i], inv_std[c + i]);
    find(whole, c, k, unit, one / unit);
  });
  return true;
}

/* Write the means of k channels times their units, rounded; what they are less than the means. */
template <bool Whole, class Parameters, class Real>
BNCORE_INLINE Wide write_means(const Parameters& p, ptrdiff_t channel, int k, Wide unit, Real* to) {
  const Wide mean = load_wide<Whole>(p.mean + channel, k) * unit;
  const Wide mean_lo = p.mean_lo ? load_wide<Whole>(p.mean_lo + channel, k) * unit : Wide{};
  const Wide rounded = rounded_to<Real>(mean + mean_lo);
  store_as(to, rounded);
  return (mean - rounded) + mean_lo;
}

/* The coefficients of z in a group; whether a unit is not 1. Where none is, units stand at each
 * place of a line only if with_unit asks for them. */
template <class T, class Parameters>
inline bool fill_normalize(const Grid& grid, const Parameters& p, ptrdiff_t group, bool with_unit,
                           CoefficientTable<T>* table) {
  typedef typename Element<T>::Real Real;
  const ptrdiff_t first = grid.first_channel(group), channels = grid.last_channel(group) - first;
  double gamma_room[max_line(sizeof(T))], beta_room[max_line(sizeof(T))];
  const double* gamma = p.gamma.as_doubles(first, channels, 1, gamma_room);
  const double* beta = p.beta.as_doubles(first, channels, 0, beta_room);
  const auto find = [&](auto whole, ptrdiff_t c, int k, Wide unit, Wide per_unit) {
    const auto load = [&](const double* from) { return load_wide<whole>(from, k); };
    const Wide mean_lo = write_means<whole>(p, first + c, k, unit, table->row(kMean) + c);
    const Wide scale = finite<Real>(load(gamma + c) * load(p.inv_std + first + c) * per_unit);
    store_as(table->row(kScale) + c, scale);
    store_as(table->row(kOffset) + c, load(beta + c) - finite<Real>(mean_lo * scale));
    store_as(table->row(kUnit) + c, unit);
  };
  const bool scaled = by_vectors_with_units<T>(p, first, channels, find);
  for (int which : {kMean, kScale, kOffset}) spread_line(grid, channels, table->row(which));
  if (with_unit || scaled) spread_line(grid, channels, table->row(kUnit));
  return scaled;
}

/* The coefficients of dz in a group. */
template <class Table>
inline void fill_gates(const Grid& grid, const GradientParameters& p, ptrdiff_t group,
                       Table* table) {
  const ptrdiff_t first = grid.first_channel(group), channels = grid.last_channel(group) - first;
  fill_line(grid, channels, [&](ptrdiff_t c) { return p.gate_low[first + c]; },
            table->row(kGateLow));
  fill_line(grid, channels, [&](ptrdiff_t c) { return p.gate_high[first + c]; },
            table->row(kGateHigh));
}

/* The coefficients of dx in a group, as for z. */
template <class T>
inline bool fill_gradient(const Grid& grid, const GradientParameters& p, ptrdiff_t group,
                          bool gated, bool with_unit, CoefficientTable<T>* table) {
  typedef typename Element<T>::Real Real;
  const ptrdiff_t first = grid.first_channel(group), channels = grid.last_channel(group) - first;
  double gamma_room[max_line(sizeof(T))];
  const double* gamma = p.gamma.as_doubles(first, channels, 1, gamma_room);
  const Wide count = p.count - Wide{};
  const auto find = [&](auto whole, ptrdiff_t c, int k, Wide unit, Wide per_unit) {
    const auto load = [&](const double* from) { return load_wide<whole>(from, k); };
    const Wide mean_lo = write_means<whole>(p, first + c, k, unit, table->row(kMean) + c);
    const Wide inv_std = load(p.inv_std + first + c);
    const Wide shift = load(p.sum_dy + first + c) / count, shift_hi = rounded_to<Real>(shift);
    const Wide slope = inv_std * load(p.sum_dy_xhat + first + c) / count * per_unit;
    store_as(table->row(kShift) + c, shift_hi);
    store_as(table->row(kRest) + c, (shift - shift_hi) - finite<Real>(mean_lo * slope));
    store_as(table->row(kSlope) + c, slope);
    store_as(table->row(kScale) + c, finite<Real>(load(gamma + c) * inv_std));
    store_as(table->row(kUnit) + c, unit);
  };
  const bool scaled = by_vectors_with_units<T>(p, first, channels, find);
  for (int which : {kMean, kShift, kRest, kSlope, kScale})
    spread_line(grid, channels, table->row(which));
  if (with_unit || scaled) spread_line(grid, channels, table->row(kUnit));
  if (gated) fill_gates(grid, p, group, table);
  return scaled;
}

} // namespace bncore

#endif
