/* Blocks: the work of one cell of the grid. */
#ifndef BNCORE_BLOCKS_H
#define BNCORE_BLOCKS_H

#include "maps.h"
#include "reductions.h"

namespace bncore {

/* Write `count` lines of a group from position t on as one: from element `done` of it to so many
 * `over` its end. */
template <class T, class Writer>
inline void write_lines(const Grid& grid, const CoefficientTable<T>& table, const Writer& writer,
                        ptrdiff_t group, ptrdiff_t t, ptrdiff_t count, ptrdiff_t done,
                        ptrdiff_t over, Seams<T>* seams) {
  typedef decltype(writer.weights) Positions;
  Spread<Positions, 1, max_line(sizeof(T))> spread;
  const ptrdiff_t c = grid.first_channel(group), channels = grid.last_channel(group) - c;
  const auto weights = spread.lines(writer.weights, {t, 1, count, channels, grid.inner});
  const auto map = writer.map(PickPerPlace<T>{&table}, t, c, 0, weights.row(0));
  constexpr ptrdiff_t enough = kMapAhead<T, std::decay_t<decltype(map)>>, few = 64;
  const ptrdiff_t places = count * channels * grid.inner, next = count * writer.out.n_stride;
  /* What is read next follows, or stands in the next line where lines have gaps: there the next
   * group follows, which does not come soon unless it is of few lines. To the second level, as
   * coefficients take much of the first. */
  const bool follows = next == places || grid.outer <= few;
  const ptrdiff_t ahead = follows ? enough : clamp(enough / places, 1, enough) * next;
  write_row<Writer::kStream, kSecondLevel>(map, writer.out.at(t, c), done, places + over, ahead,
                                           Writer::kStream ? seams->of(grid, t) : nullptr);
}

/* Write lines [t, end) of columns; where they run on, each up to the first cache line that begins
 * in the next. */
template <class T, class Writer>
inline void write_columns(const Grid& grid, const CoefficientTable<T>& table, const Writer& writer,
                          ptrdiff_t group, ptrdiff_t t, ptrdiff_t end, Seams<T>* seams) {
  const bool on = !Writer::kWeighted && grid.template run_on<T>();
  const ptrdiff_t over = on ? to_next_line(writer.out.at(t, grid.first_channel(group))) : 0;
  for (ptrdiff_t done = 0, next_done, count; t < end; t += count, done = next_done) {
    count = grid.tile < end - t ? grid.tile : end - t;
    next_done = clamp((end - t - count) * grid.channels, 0, over);
    write_lines(grid, table, writer, group, t, count, done, next_done, seams);
  }
}

/* Write 0 to lines [t, end) of columns. */
template <class T>
inline void clear_columns(const Grid& grid, View<T> out, ptrdiff_t group, ptrdiff_t t,
                          ptrdiff_t end) {
  const ptrdiff_t first = grid.first_channel(group), channels = grid.last_channel(group) - first;
  for (; t < end; ++t) std::memset(out.at(t, first), 0, channels * grid.inner * sizeof(T));
}

/* Write every row or line of one cell. */
template <class T, class Writer>
inline void write_cell(const Grid& grid, ptrdiff_t group, ptrdiff_t block,
                       const CoefficientTable<T>& table, const Writer& writer,
                       Seams<T>* seams) {
  const ptrdiff_t first = grid.first_channel(group), last = grid.last_channel(group);
  const ptrdiff_t end = grid.first_position(block + 1);
  ptrdiff_t t = grid.first_position(block);
  for (Run run; grid.columns && t < end; t = run.end) {
    run = writer.weights.run(t, end);
    if (run.counts) write_columns(grid, table, writer, group, t, run.end, seams);
    else clear_columns(grid, writer.out, group, t, run.end);
  }
  for (; t < end; ++t) {
    const Piece piece = Piece::at(grid, t);
    const auto weigh = writer.weights.row(piece.n, piece.s);
    for (ptrdiff_t c = first; c < last; ++c) {
      const auto map = writer.map(PickUniform<T>{&table, c - first}, piece.n, c, piece.s, weigh);
      constexpr ptrdiff_t ahead = kMapAhead<T, std::decay_t<decltype(map)>>;
      write_row<Writer::kStream, kFirstLevel>(map, writer.out.at(piece.n, c) + piece.s, 0,
                                              piece.length, ahead,
                                              Writer::kStream ? seams->of(grid, piece.n) : nullptr);
    }
  }
}

/* Write one cell of a group while the same cell of group `next`, as wide, is summed (rows only). */
template <class T, class Writer, class Terms>
inline void write_and_sum_cell(const Grid& grid, ptrdiff_t group, ptrdiff_t next, ptrdiff_t block,
                               const CoefficientTable<T>& table, const Writer& writer,
                               const Terms& terms, double* partial, Seams<T>* seams) {
  const ptrdiff_t written = grid.first_channel(group), summed = grid.first_channel(next);
  const SumTable sums = SumTable::of(grid, partial, block);
  sums.clear(summed, summed + grid.width);
  Accumulator accumulators[kMaxRowsWidth];
  for (ptrdiff_t i = 0; i < grid.width; ++i) accumulators[i] = Accumulator();
  const Route<T, Terms> route(grid, terms);
  const ptrdiff_t end = grid.first_position(block + 1);
  ptrdiff_t filled = 0;
  for (ptrdiff_t t = grid.first_position(block); t < end; ++t) {
    const Piece piece = Piece::at(grid, t);
    for (ptrdiff_t i = 0; i < grid.width; ++i)
      write_and_add_row<Writer::kStream>(
          writer.map(PickUniform<T>{&table, i}, piece.n, written + i, piece.s, Unweighted()),
          writer.out.at(piece.n, written + i) + piece.s, terms.row(piece.n, summed + i, piece.s),
          piece.length, route.from(piece, i), Writer::kStream ? seams->of(grid, piece.n) : nullptr,
          &accumulators[i]);
    filled += piece.length;
    if (filled < kChunk<T> && t + 1 < end) continue;
    filled = 0;
    for (ptrdiff_t i = 0; i < grid.width; ++i) flush(&accumulators[i], sums, summed + i);
  }
}

/* Where a cell's results begin. */
template <class T>
inline const T* start_of(const Grid& grid, View<T> out, ptrdiff_t group, ptrdiff_t block) {
  return out.at(grid.first_position(block) / grid.segments, grid.first_channel(group));
}

/* Writers: the map of a row and where it goes. */
template <class T, class Activation, bool Residual, bool Scaled, class Positions, bool Stream>
struct NormalizeWriter {
  static constexpr bool kStream = Stream, kWeighted = Positions::kAny;
  View<const T> x, residual;
  View<T> out;
  Activation activation;
  Gate<T> gate;
  GateBits<uint8_t> bits;
  Positions weights;

  template <class Pick, class Weigh>
  auto map(const Pick& pick, ptrdiff_t n, ptrdiff_t c, ptrdiff_t s, Weigh weigh) const {
    typedef Latent<T, Pick::template Coefficient, Residual, Scaled> Z;
    const Z z = {x.at(n, c) + s, Residual ? residual.at(n, c) + s : nullptr, pick(kMean),
                 pick(kScale), pick(kOffset), pick(kUnit)};
    return Normalize<T, Z, Activation, Weigh, Residual>{z, activation, weigh, gate, bits.data,
                                                        bits.at(n, c, s)};
  }
};

template <class T, bool Scaled, bool Stream, class From, class Positions> struct GradientWriter {
  static constexpr bool kStream = Stream, kWeighted = Positions::kAny;
  From from;
  View<const T> x;
  View<T> out;
  Positions weights;

  template <class Pick, class Weigh>
  auto map(const Pick& pick, ptrdiff_t n, ptrdiff_t c, ptrdiff_t s, Weigh weigh) const {
    const auto source = from.source(pick, n, c, s);
    return Gradient<T, Pick::template Coefficient, Scaled, decltype(source), Weigh>{
        {}, source, x.at(n, c) + s, pick(kMean), pick(kShift), pick(kRest), pick(kSlope),
        pick(kScale), pick(kUnit), weigh};
  }
};

template <class T, bool Stream, class From, class Positions> struct GateWriter {
  static constexpr bool kStream = Stream, kWeighted = Positions::kAny;
  From from;
  View<const T> x;
  View<T> out;
  Positions weights;

  template <class Pick, class Weigh>
  auto map(const Pick& pick, ptrdiff_t n, ptrdiff_t c, ptrdiff_t s, Weigh weigh) const {
    const auto source = from.source(pick, n, c, s);
    return JustGate<T, decltype(source), Weigh>{{}, source, x.at(n, c) + s, weigh};
  }
};

template <class T, bool Stream, class From> struct FixedGradientWriter {
  static constexpr bool kStream = Stream, kWeighted = false;
  From from;
  View<const T> x;
  View<T> out;
  EveryPosition weights;

  template <class Pick, class Weigh>
  auto map(const Pick& pick, ptrdiff_t n, ptrdiff_t c, ptrdiff_t s, Weigh) const {
    const auto source = from.source(pick, n, c, s);
    return FixedGradient<T, Pick::template Coefficient, decltype(source)>{
        {}, source, x.at(n, c) + s, pick(kScale)};
  }
};

/* What a cell does: write, or write while another channel is summed. */
template <class T> struct JustWrite {
  const Grid& grid;
  ptrdiff_t group, block;
  Seams<T>* seams;

  template <class Writer>
  void operator()(const CoefficientTable<T>& table, const Writer& writer) const {
    write_cell(grid, group, block, table, writer, seams);
  }
};

template <class T, class Terms> struct WriteAndSum {
  const Grid& grid;
  ptrdiff_t group, block, next;
  Terms terms;
  double* partial;
  Seams<T>* seams;

  template <class Writer>
  void operator()(const CoefficientTable<T>& table, const Writer& writer) const {
    write_and_sum_cell(grid, group, next, block, table, writer, terms, partial, seams);
  }
};

/* Whether lines of so many channels follow one another; those of no array do. */
template <class T> inline bool is_gapless(ptrdiff_t channels, View<T> view) {
  return !view.data || view.n_stride == channels;
}

/* What a forward pass reads, and the gates it keeps. The grid for its sums follows from the shape
 * alone, that for its maps may look at where arrays lie. */
template <class T> struct ForwardInput {
  View<const T> x, residual; // no residual: null
  Epilogue epilogue;
  Weights weights;
  uint8_t* bits; // null: none are kept
  T* keep;       // where a group's rows are kept from the sums on, see Kept; null: nowhere

  Purpose to_sum() const { return {weights.any(), bits != nullptr, false, 1}; }
  Purpose to_map(ptrdiff_t channels, View<T> y) const {
    const bool gapless =
        is_gapless(channels, x) && is_gapless(channels, residual) && is_gapless(channels, y);
    return {weights.any(), bits != nullptr, gapless, 0};
  }
  /* What is read of a group once it has been summed. */
  ForwardInput again(const Grid& grid, ptrdiff_t group) const {
    ForwardInput input = *this;
    if (keep) input.x = Kept<T>::of(grid, keep, group).view();
    return input;
  }
};

/* A unit is always multiplied in beside a residual, an activation or weights, where 1 changes
 * nothing and another instance would cost more than it saves. */
template <class T, class Activation, bool Residual, bool Scaled, class Positions, class Work>
inline void normalize_with(const Work& work, const CoefficientTable<T>& table,
                           const ForwardInput<T>& input, Positions weights, View<T> y,
                           bool stream) {
  const Activation activation(input.epilogue);
  const Gate<T> gate(input.epilogue);
  const auto bits = GateBits<uint8_t>::of(work.grid, input.bits);
  if (stream)
    work(table, NormalizeWriter<T, Activation, Residual, Scaled, Positions, true>{
                    input.x, input.residual, y, activation, gate, bits, weights});
  else
    work(table, NormalizeWriter<T, Activation, Residual, Scaled, Positions, false>{
                    input.x, input.residual, y, activation, gate, bits, weights});
}

/* y of one cell; masked, if at all, by lines of columns. */
template <class T, class Work>
BNCORE_OWN_FRAME void normalize_work(const Work& work, const ForwardInput<T>& input, View<T> y,
                                     const NormalizeParameters& p, bool stream) {
  typedef EveryPosition Every;
  CoefficientTable<T> table(work.grid, start_of(work.grid, y, work.group, work.block));
  const int activation = input.epilogue.activation;
  const bool plain = !input.residual.data && activation == 0;
  const bool scaled = fill_normalize<T>(work.grid, p, work.group, !plain, &table);
  const Every lines = input.weights.lines(work.grid.columns);
  const auto with = [&](auto normalize) { normalize(work, table, input, lines, y, stream); };
  if (plain) {
    if (scaled) with(normalize_with<T, Identity<T>, false, true, Every, Work>);
    else with(normalize_with<T, Identity<T>, false, false, Every, Work>);
  } else if (input.residual.data) {
    if (activation == 1) with(normalize_with<T, Clip<T>, true, true, Every, Work>);
    else if (activation == 2) with(normalize_with<T, LeakyRelu<T>, true, true, Every, Work>);
    else with(normalize_with<T, Identity<T>, true, true, Every, Work>);
  } else {
    if (activation == 1 && !scaled) with(normalize_with<T, Clip<T>, false, false, Every, Work>);
    else if (activation == 1) with(normalize_with<T, Clip<T>, false, true, Every, Work>);
    else with(normalize_with<T, LeakyRelu<T>, false, true, Every, Work>);
  }
}

/* y of one cell, each position of which may be masked. */
template <class T>
BNCORE_OWN_FRAME void normalize_masked(const JustWrite<T>& work, const ForwardInput<T>& input,
                                       View<T> y, const NormalizeParameters& p, bool stream) {
  CoefficientTable<T> table(work.grid, start_of(work.grid, y, work.group, work.block));
  fill_normalize<T>(work.grid, p, work.group, true, &table);
  input.weights.visit_some([&](auto weights) {
    if (input.residual.data)
      normalize_with<T, AnyActivation<T>, true, true>(work, table, input, weights, y, stream);
    else
      normalize_with<T, AnyActivation<T>, false, true>(work, table, input, weights, y, stream);
  });
}

template <class T>
inline void normalize_block(const Grid& grid, const ForwardInput<T>& input, View<T> y,
                            const NormalizeParameters& p, bool stream, ptrdiff_t group,
                            ptrdiff_t block, Seams<T>* seams) {
  const JustWrite<T> work = {grid, group, block, seams};
  if (input.weights.masking && !input.weights.by_line(grid.columns))
    normalize_masked(work, input, y, p, stream);
  else normalize_work(work, input.again(grid, group), y, p, stream);
}

/* y of one cell, and the moments' sums of the same cell of group `next`; no weights, and the rows
 * are kept. */
template <class T>
inline void normalize_and_sum_block(const Grid& grid, const ForwardInput<T>& input, View<T> y,
                                    const NormalizeParameters& p, bool stream, ptrdiff_t group,
                                    ptrdiff_t block, ptrdiff_t next, const double* shift,
                                    double* partial, Seams<T>* seams) {
  typedef MomentTerms<T, false, EveryPosition> Terms;
  const Terms terms = {input.x, shift, nullptr, {}, Kept<T>::of(grid, input.keep, next)};
  normalize_work(WriteAndSum<T, Terms>{grid, group, block, next, terms, partial, seams},
                 input.again(grid, group), y, p, stream);
}

/* What a backward pass writes; dz, the gradient of what was added to z, only where asked for. */
template <class T> struct BackwardOutput {
  View<T> dx, dz;
};

/* What a backward pass reads. The gates of an activation are given as bits, or as intervals of x
 * among the parameters; only where dz alone is computed, a residual may tell them. */
template <class T> struct BackwardInput {
  View<const T> dy, x, residual; // no residual: null
  Epilogue epilogue;
  Weights weights;
  const uint8_t* bits; // null: none were kept
  T* keep;             // as in ForwardInput: dy, then x

  Purpose to_sum() const { return {weights.any(), bits != nullptr, false, 2}; }
  Purpose to_map(ptrdiff_t channels, const BackwardOutput<T>& output) const {
    return {weights.any(), bits != nullptr,
            is_gapless(channels, dy) && is_gapless(channels, x) && is_gapless(channels, residual) &&
                is_gapless(channels, output.dx) && is_gapless(channels, output.dz), 0};
  }
  Kept<T> kept_dy(const Grid& grid, ptrdiff_t group) const {
    return Kept<T>::of(grid, keep, group);
  }
  Kept<T> kept_x(const Grid& grid, ptrdiff_t group) const {
    return Kept<T>::of(grid, keep ? keep + Kept<T>::size(grid) : nullptr, group);
  }
  BackwardInput again(const Grid& grid, ptrdiff_t group) const {
    BackwardInput input = *this;
    if (keep) input.dy = kept_dy(grid, group).view(), input.x = kept_x(grid, group).view();
    return input;
  }
  /* Whether x is y of a leaky ReLU, see OutputSource; for sums, and dx, by themselves. */
  bool is_output() const { return epilogue.activation == 3; }
  /* Whether the gates are intervals of x. */
  bool by_interval() const { return epilogue.activation != 0 && !bits && !is_output(); }
  /* Whether one comparison tells each gate of a group: no interval ends above, as with a ReLU and
   * no gamma below 0. */
  bool gates_below(const Grid& grid, const GradientParameters& p, ptrdiff_t group) const {
    if (!by_interval()) return false;
    for (ptrdiff_t c = grid.first_channel(group); c < grid.last_channel(group); ++c)
      if (p.gate_high[c] == p.gate_high[c]) return false;
    return true;
  }
  /* Calls visit with where dz comes from; below: gates_below of all groups it is for. Beside
   * weights all intervals are taken as sloped ones: more instances would cost more than they
   * save. */
  template <bool Weighted, class Visit>
  void visit(const Grid& grid, bool below, const Visit& visit_from) const {
    const Gate<T> gate(epilogue);
    const auto its_bits = GateBits<const uint8_t>::of(grid, bits);
    if (epilogue.activation == 0) visit_from(PlainGradient<T>{dy});
    else if (bits) visit_from(BitGradient<T>{dy, its_bits, gate});
    else if (Weighted || gate.outside != 0)
      visit_from(IntervalGradient<T, Interval::kSloped>{dy, gate});
    else if constexpr (!Weighted) {
      if (below) visit_from(IntervalGradient<T, Interval::kZeroBelow>{dy, gate});
      else visit_from(IntervalGradient<T, Interval::kZero>{dy, gate});
    }
  }
  /* Calls visit with where dz of one group comes from, and with the weights of its positions. */
  template <class Visit>
  void visit_all(const Weights& its_weights, const Grid& grid, const GradientParameters& p,
                 ptrdiff_t group, const Visit& visit_both) const {
    const bool below = gates_below(grid, p, group);
    its_weights.visit(grid.columns, [&](auto positions) {
      visit<decltype(positions)::kAny>(grid, below, [&](const auto& from) {
        visit_both(from, positions);
      });
    });
  }
};

/* The gates of a part of the channels as intervals of x. */
template <class T>
BNCORE_OWN_FRAME void find_gates(const BackwardInput<T>& input, const GradientParameters& p,
                                 ptrdiff_t channels, ptrdiff_t part, double* gate_low,
                                 double* gate_high) {
  typedef typename Element<T>::Real Real;
  const Gate<T> gate(input.epilogue);
  Grid parts = {};
  parts.inner = parts.tile = parts.step = 1;
  parts.channels = channels, parts.width = kGatesAtOnce;
  CoefficientTable<T> table(parts, nullptr);
  fill_normalize<T>(parts, p, part, true, &table);
  const ptrdiff_t first = parts.first_channel(part);
  const Ramps<Real> ramps = {table.row(kMean), table.row(kScale), table.row(kOffset),
                             table.row(kUnit)};
  gate_intervals(gate, ramps, parts.last_channel(part) - first, gate_low + first,
                 gate_high + first);
}

/* The sums of one cell: dz and dz (x - mean). */
template <class T>
inline void reduce_block(const Grid& grid, const BackwardInput<T>& input,
                         const GradientParameters& p, ptrdiff_t group, ptrdiff_t block,
                         double* partial) {
  GateTable<T> table;
  if (input.by_interval()) fill_gates(grid, p, group, &table);
  const auto sum = [&](const auto& from, auto positions) {
    typedef BackwardTerms<T, std::decay_t<decltype(from)>, decltype(positions)> Terms;
    const Terms terms = {from, positions, input.x, p.mean, p.mean_lo, &table,
                         grid.first_channel(group), input.kept_dy(grid, group),
                         input.kept_x(grid, group)};
    sum_block<T>(grid, terms, group, block, partial);
  };
  if (input.is_output()) sum(OutputGradient<T>(input.dy, input.epilogue), EveryPosition());
  else input.visit_all(input.weights.just_masks(), grid, p, group, sum);
}

/* dz of one cell. */
template <class T>
BNCORE_OWN_FRAME void gate_block(const Grid& grid, const BackwardInput<T>& input, View<T> dz,
                                 const GradientParameters& p, bool stream, ptrdiff_t group,
                                 ptrdiff_t block, Seams<T>* seams) {
  CoefficientTable<T> table(grid, start_of(grid, dz, group, block));
  const JustWrite<T> work = {grid, group, block, seams};
  const auto write = [&](const auto& from, auto positions) {
    typedef std::decay_t<decltype(from)> From;
    typedef decltype(positions) Positions;
    if (stream) work(table, GateWriter<T, true, From, Positions>{from, input.x, dz, positions});
    else work(table, GateWriter<T, false, From, Positions>{from, input.x, dz, positions});
  };
  if (!input.residual.data || input.epilogue.activation == 0) {
    if (input.by_interval()) fill_gates(grid, p, group, &table);
    return input.visit_all(input.weights.just_masks(), grid, p, group, write);
  }
  fill_normalize(grid, p, group, true, &table);
  input.weights.just_masks().visit(grid.columns, [&](auto positions) {
    const Gate<T> gate(input.epilogue);
    write(LatentGradient<T>{input.dy, input.x, input.residual, gate}, positions);
  });
}

/* dx of one cell. */
template <class T, class Work, class From, class Positions>
BNCORE_OWN_FRAME void gradient_work(const Work& work, const From& from, Positions weights,
                                    View<const T> x, View<T> dx, const GradientParameters& p,
                                    bool stream) {
  constexpr bool gated = kHasInterval<From>;
  constexpr bool with_unit = Positions::kAny || kIsOutput<From>;
  CoefficientTable<T> table(work.grid, start_of(work.grid, dx, work.group, work.block));
  const bool scaled = fill_gradient<T>(work.grid, p, work.group, gated, with_unit, &table);
  if (scaled || with_unit) {
    if (stream) work(table, GradientWriter<T, true, true, From, Positions>{from, x, dx, weights});
    else work(table, GradientWriter<T, true, false, From, Positions>{from, x, dx, weights});
  } else {
    typedef GradientWriter<T, with_unit, true, From, Positions> Streamed;
    typedef GradientWriter<T, with_unit, false, From, Positions> Cached;
    if (stream) work(table, Streamed{from, x, dx, weights});
    else work(table, Cached{from, x, dx, weights});
  }
}

template <class T>
inline void gradient_block(const Grid& grid, const BackwardInput<T>& first_input,
                           const BackwardOutput<T>& output, const GradientParameters& p,
                           bool stream, ptrdiff_t group, ptrdiff_t block, Seams<T>* seams) {
  const BackwardInput<T> input = first_input.again(grid, group);
  if (output.dz.data) gate_block(grid, input, output.dz, p, stream, group, block, seams);
  const auto write = [&](const auto& from, auto positions) {
    gradient_work(JustWrite<T>{grid, group, block, seams}, from, positions, input.x, output.dx, p,
                  stream);
  };
  if (input.is_output()) write(OutputGradient<T>(input.dy, input.epilogue), EveryPosition());
  else input.visit_all(input.weights, grid, p, group, write);
}

/* dx of one cell, and the gradient's sums of the same cell of group `next`; no weights, and the
 * rows are kept. */
template <class T>
inline void gradient_and_sum_block(const Grid& grid, const BackwardInput<T>& input,
                                   const BackwardOutput<T>& output, const GradientParameters& p,
                                   bool stream, ptrdiff_t group, ptrdiff_t block, ptrdiff_t next,
                                   double* partial, Seams<T>* seams) {
  const BackwardInput<T> kept = input.again(grid, group);
  if (output.dz.data) gate_block(grid, kept, output.dz, p, stream, group, block, seams);
  const bool below = input.gates_below(grid, p, group) && input.gates_below(grid, p, next);
  GateTable<T> table;
  if (input.by_interval()) fill_gates(grid, p, next, &table);
  input.template visit<false>(grid, below, [&](const auto& from) {
    typedef BackwardTerms<T, std::decay_t<decltype(from)>, EveryPosition> Terms;
    const Terms terms = {from, {}, input.x, p.mean, p.mean_lo, &table, grid.first_channel(next),
                         input.kept_dy(grid, next), input.kept_x(grid, next)};
    gradient_work(WriteAndSum<T, Terms>{grid, group, block, next, terms, partial, seams},
                  from.of(kept), EveryPosition(), kept.x, output.dx, p, stream);
  });
}

/* dx = gamma inv_std dz of one cell: the statistics were constants. */
template <class T>
BNCORE_OWN_FRAME void fixed_gradient_block(const Grid& grid, const BackwardInput<T>& input,
                                           View<T> dx, const GradientParameters& p, bool stream,
                                           ptrdiff_t group, ptrdiff_t block, Seams<T>* seams) {
  const ptrdiff_t first = grid.first_channel(group), last = grid.last_channel(group);
  CoefficientTable<T> table(grid, start_of(grid, dx, group, block));
  double room[max_line(sizeof(T))];
  const double* gamma = p.gamma.as_doubles(first, last - first, 1, room);
  by_vectors(last - first, [&](auto whole, ptrdiff_t c, int k) {
    const auto load = [&](const double* from) { return load_wide<whole>(from, k); };
    const Wide scale = load(gamma + c) * load(p.inv_std + first + c);
    store_as(table.row(kScale) + c, finite<typename Element<T>::Real>(scale));
  });
  spread_line(grid, last - first, table.row(kScale));
  const JustWrite<T> work = {grid, group, block, seams};
  if (input.by_interval()) fill_gates(grid, p, group, &table);
  input.template visit<false>(grid, input.gates_below(grid, p, group), [&](const auto& from) {
    typedef std::decay_t<decltype(from)> From;
    if (stream) work(table, FixedGradientWriter<T, true, From>{from, input.x, dx, {}});
    else work(table, FixedGradientWriter<T, false, From>{from, input.x, dx, {}});
  });
}

} // namespace bncore

#endif
