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

/* A value per place of a line from a value per channel: each channel's repeated `inner` times,
 * the whole `tile` times. */
template <class Real, class ValueOfChannel>
inline void fill_line(const Grid& grid, ptrdiff_t channels, const ValueOfChannel& value,
                      Real* line) {
  const ptrdiff_t repeat = grid.columns ? grid.inner : 1, places = channels * repeat;
  if (repeat == 1) {
    for (ptrdiff_t c = 0; c < channels; ++c) line[c] = static_cast<Real>(value(c));
  } else {
    for (ptrdiff_t c = 0; c < channels; ++c) {
      const Real v = static_cast<Real>(value(c));
      for (ptrdiff_t s = 0; s < repeat; ++s) line[c * repeat + s] = v;
    }
  }
  const ptrdiff_t end = grid.tile * places + (grid.gapless ? kOver : 0);
  for (ptrdiff_t done = places; done < end; done *= 2) // each time as much as there is already
    std::memcpy(line + done, line, (2 * done < end ? done : end - done) * sizeof(Real));
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

  /* Those from channel `first` on; `otherwise` where there are none. */
  void read(ptrdiff_t first, ptrdiff_t channels, double otherwise, double* __restrict to) const {
    if (doubles) {
      std::memcpy(to, doubles + first, channels * sizeof(double));
    } else if (floats) {
      for (ptrdiff_t c = 0; c < channels; ++c) to[c] = floats[first + c];
    } else {
      for (ptrdiff_t c = 0; c < channels; ++c) to[c] = otherwise;
    }
  }
};

/* Per-channel statistics and parameters; without mean_lo it is 0, without gamma 1, without beta 0. */
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

/* The nearest finite Real to a coefficient, lest it make a NaN of x - mean = 0 or of a product beyond
 * Real; a NaN stays one. */
template <class Real> inline double finite(double scale) {
  constexpr double most = std::numeric_limits<Real>::max();
  return scale > most ? most : scale < -most ? -most : scale;
}

/* 0 where a channel's unit is 1: an integer as wide as a double, so that many are told at once. */
template <class Real> inline int64_t is_unusual(double mean, double inv_std) {
  constexpr double large = sizeof(Real) == sizeof(double) ? 0x1p400 : 0x1p60, small = 1 / large;
  const double offset = std::fabs(mean);
  const auto unless = [](bool holds) { return holds ? int64_t(0) : int64_t(1); };
  return unless(inv_std > small) | unless(inv_std < large) | unless(offset < large) |
         (unless(offset >= small) & unless(offset == 0));
}

/* The coefficients all maps share, each channel's unit, and mean_lo: what the mean in the table is
 * less than mean times unit. True where a unit is not 1. */
template <class T, class Parameters>
inline bool fill_centre(const Grid& grid, const Parameters& p, ptrdiff_t first, ptrdiff_t last,
                        double* __restrict unit, double* __restrict mean_lo,
                        CoefficientTable<T>* table) {
  typedef typename Element<T>::Real Real;
  const ptrdiff_t channels = last - first;
  const double *mean = p.mean + first, *inv_std = p.inv_std + first;
  int64_t unusual = 0;
  for (ptrdiff_t c = 0; c < channels; ++c) unusual |= is_unusual<Real>(mean[c], inv_std[c]);
  const bool scaled = unusual != 0;
  for (ptrdiff_t c = 0; c < channels; ++c) unit[c] = 1;
  for (ptrdiff_t c = 0; scaled && c < channels; ++c) unit[c] = unit_of<Real>(mean[c], inv_std[c]);
  Real hi[max_line(sizeof(T))];
  for (ptrdiff_t c = 0; c < channels; ++c) {
    const double its_lo = p.mean_lo ? p.mean_lo[first + c] : 0;
    hi[c] = static_cast<Real>((mean[c] + its_lo) * unit[c]);
    mean_lo[c] = (mean[c] * unit[c] - hi[c]) + its_lo * unit[c];
  }
  fill_line(grid, channels, [&](ptrdiff_t c) { return hi[c]; }, table->row(kMean));
  if (scaled) fill_line(grid, channels, [&](ptrdiff_t c) { return unit[c]; }, table->row(kUnit));
  return scaled;
}

/* The scales of channels' z, and of their gradients: gamma inv_std. */
template <class Parameters>
inline void read_scales(const Parameters& p, ptrdiff_t first, ptrdiff_t channels,
                        double* __restrict scale) {
  p.gamma.read(first, channels, 1, scale);
  for (ptrdiff_t c = 0; c < channels; ++c) scale[c] *= p.inv_std[first + c];
}

/* The coefficients of z in a group; whether a unit is not 1. */
template <class T, class Parameters>
inline bool fill_normalize(const Grid& grid, const Parameters& p, ptrdiff_t group, bool with_unit,
                           CoefficientTable<T>* table) {
  typedef typename Element<T>::Real Real;
  const ptrdiff_t first = grid.first_channel(group), channels = grid.last_channel(group) - first;
  double unit[max_line(sizeof(T))], mean_lo[max_line(sizeof(T))], scale[max_line(sizeof(T))];
  const bool scaled = fill_centre<T>(grid, p, first, first + channels, unit, mean_lo, table);
  if (with_unit && !scaled)
    fill_line(grid, channels, [](ptrdiff_t) { return 1; }, table->row(kUnit));
  read_scales(p, first, channels, scale);
  for (ptrdiff_t c = 0; scaled && c < channels; ++c) scale[c] /= unit[c];
  for (ptrdiff_t c = 0; c < channels; ++c) scale[c] = finite<Real>(scale[c]);
  fill_line(grid, channels, [&](ptrdiff_t c) { return scale[c]; }, table->row(kScale));
  double* beta = unit; // which is in the table by now
  p.beta.read(first, channels, 0, beta);
  fill_line(grid, channels, [&](ptrdiff_t c) {
    return beta[c] - finite<Real>(mean_lo[c] * scale[c]);
  }, table->row(kOffset));
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

/* The coefficients of dx in a group; whether a unit is not 1. */
template <class T>
inline bool fill_gradient(const Grid& grid, const GradientParameters& p, ptrdiff_t group,
                          bool gated, bool with_unit, CoefficientTable<T>* table) {
  typedef typename Element<T>::Real Real;
  const ptrdiff_t first = grid.first_channel(group), channels = grid.last_channel(group) - first;
  double unit[max_line(sizeof(T))], mean_lo[max_line(sizeof(T))];
  double shift[max_line(sizeof(T))], slope[max_line(sizeof(T))];
  const bool scaled = fill_centre<T>(grid, p, first, first + channels, unit, mean_lo, table);
  if (with_unit && !scaled)
    fill_line(grid, channels, [](ptrdiff_t) { return 1; }, table->row(kUnit));
  for (ptrdiff_t c = 0; c < channels; ++c) {
    shift[c] = p.sum_dy[first + c] / p.count;
    slope[c] = p.inv_std[first + c] * p.sum_dy_xhat[first + c] / p.count;
  }
  for (ptrdiff_t c = 0; scaled && c < channels; ++c) slope[c] /= unit[c];
  const auto shift_hi = [&](ptrdiff_t c) { return static_cast<Real>(shift[c]); };
  double* scale = unit; // which is in the table by now
  read_scales(p, first, channels, scale);
  fill_line(grid, channels, [&](ptrdiff_t c) { return finite<Real>(scale[c]); },
            table->row(kScale));
  fill_line(grid, channels, shift_hi, table->row(kShift));
  fill_line(grid, channels, [&](ptrdiff_t c) {
    return (shift[c] - shift_hi(c)) - finite<Real>(mean_lo[c] * slope[c]);
  }, table->row(kRest));
  fill_line(grid, channels, [&](ptrdiff_t c) { return slope[c]; }, table->row(kSlope));
  if (gated) fill_gates(grid, p, group, table);
  return scaled;
}

} // namespace bncore

#endif
