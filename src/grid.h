/* The grid a tensor is cut into, and where its parts lie.
 *
 * A tensor (N, C, S) is cut into groups of channels times blocks of positions. The grid follows
 * from the shape alone, never from the number of threads, and a cell's sums go to a place of
 * their own, so the bits of a result do not depend on who computed which cell.
 *
 *   rows     each channel has contiguous rows of S values; a row is summed into one accumulator
 *   columns  channels lie side by side (S = 1), or planes so small that a group of them is taken
 *            as one line of memory: every place on the line has an accumulator of its own, and
 *            places of one channel are folded at the end. Lines shorter than a few vectors are
 *            taken several at a time.
 */
#ifndef BNCORE_GRID_H
#define BNCORE_GRID_H

#include "sums.h"

namespace bncore {

constexpr ptrdiff_t kMaxLine = 1024;     // places on a line of columns, half for float64
constexpr ptrdiff_t kSumLine = 512;      // the same where they are summed
constexpr ptrdiff_t kLongSumLine = 1024; // and where each line is a long stream from memory
constexpr ptrdiff_t kMaxRowsWidth = 16;  // channels of which rows are summed side by side
constexpr ptrdiff_t kPacked = 128;       // below this, rows or lines come without gaps between
constexpr ptrdiff_t kPad = 16;           // elements beyond a per-place array's end

/* Elements of p's cache line that lie before it. */
template <class T> inline int place_in_line(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % kCacheLine / sizeof(T));
}

/* Elements from p to where a cache line begins. */
template <class T> inline int to_next_line(const T* p) {
  constexpr int places = kCacheLine / sizeof(T);
  return (places - place_in_line(p)) % places;
}

inline ptrdiff_t clamp(ptrdiff_t v, ptrdiff_t low, ptrdiff_t high) {
  return v > high ? high : v < low ? low : v;
}

/* Tables of coefficients live on the stacks of threads, which may be as small as 128 KB. */
constexpr ptrdiff_t max_line(ptrdiff_t itemsize) { return itemsize == 8 ? kMaxLine / 2 : kMaxLine; }

struct Grid {
  ptrdiff_t outer, channels, inner;       // N, C, S
  ptrdiff_t width, groups;                // channels in a group; groups
  ptrdiff_t segment, segments, positions; // elements of a row taken at once; N * segments
  ptrdiff_t blocks;                       // parts of the positions
  ptrdiff_t tile;                         // lines taken at once
  ptrdiff_t strip;                        // such lines that are summed side by side
  ptrdiff_t step;                         // blocks begin at multiples of so many positions
  ptrdiff_t room;                         // channels that scratch has room for: all, or a group's
  bool columns, weighted;
  bool gapless; // lines of columns follow one another without gaps, in all arrays

  ptrdiff_t first_channel(ptrdiff_t group) const { return group * width; }
  ptrdiff_t last_channel(ptrdiff_t group) const {
    ptrdiff_t last = (group + 1) * width;
    return last < channels ? last : channels;
  }
  /* Whether one group can be written while another is summed. */
  bool pairs(ptrdiff_t group, ptrdiff_t next) const {
    return !columns && !weighted && next >= 0 && width <= kMaxRowsWidth &&
           last_channel(group) - first_channel(group) == width &&
           last_channel(next) - first_channel(next) == width;
  }
  ptrdiff_t first_position(ptrdiff_t block) const {
    return block == blocks ? positions : positions * block / blocks / step * step;
  }
  ptrdiff_t group_size() const { return outer * width * inner; } // elements

  /* Whether tiles of lines run on into one another, all alike as whole cache lines see them. */
  template <class T> bool run_on() const {
    return gapless && tile * channels % (kCacheLine / static_cast<ptrdiff_t>(sizeof(T))) == 0;
  }

  /* Cut for a given width: groups, segments, and blocks of about `cell` bytes. */
  void cut(ptrdiff_t itemsize, ptrdiff_t cell, ptrdiff_t max_blocks) {
    if (width > channels) width = channels;
    groups = (channels + width - 1) / width;
    room = channels;
    segment = columns ? inner : clamp(inner, 1, itemsize == 8 ? kChunk<double> : 8192);
    segments = (inner + segment - 1) / segment;
    positions = outer * segments;
    if (max_blocks > positions) max_blocks = positions;
    blocks = clamp(group_size() * itemsize / cell, 1, max_blocks);
  }
};

/* What a grid is for, besides its shape. */
struct Purpose {
  bool weighted; // positions have weights
  bool packed;   // gates are kept as bits: a cell's begin with a byte
  bool gapless;  // n_stride of all arrays is C
  int arrays;     // that are summed
};

/* Whether planes are so small, and so many to a channel, that columns serve them better. */
inline bool has_small_planes(ptrdiff_t outer, ptrdiff_t inner) {
  return inner > 1 && inner <= kMaxLine / 16 && outer >= 16;
}

/* Channels whose small planes make a line of so many places: a multiple of 8, for bytes of bits. */
inline ptrdiff_t planes_in(ptrdiff_t line, ptrdiff_t inner) { return line / inner / 8 * 8; }

/* Whether lines are so short that the bits of all follow one another. */
inline bool has_short_lines(ptrdiff_t channels, ptrdiff_t inner) {
  return inner == 1 && channels < kPacked / 2;
}

inline Grid uncut(ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, Purpose purpose) {
  Grid grid = {};
  grid.outer = outer, grid.channels = channels, grid.inner = inner, grid.tile = 1;
  grid.step = purpose.packed && has_short_lines(channels, inner) ? 8 : 1;
  grid.weighted = purpose.weighted;
  grid.columns = inner == 1 || has_small_planes(outer, inner);
  return grid;
}

/* Lines to take at once, given how many would be best: where bits are kept they end with a byte. */
inline ptrdiff_t tile_of(ptrdiff_t best, ptrdiff_t channels, Purpose purpose) {
  if (!purpose.packed || channels % 8 == 0) return best;
  return !has_short_lines(channels, 1) ? 1 : best < 8 ? 8 : best / 8 * 8;
}

/* Bytes in a cell: at most so many; four cells at least where there is more than one, but for
 * columns of few lines, as each cell finds the coefficients of all its channels. */
inline ptrdiff_t cell_of(const Grid& grid, ptrdiff_t itemsize, ptrdiff_t most) {
  constexpr ptrdiff_t small = 128 * 1024, few = 512;
  const ptrdiff_t bytes = grid.outer * grid.channels * grid.inner * itemsize;
  const bool large = bytes <= small || (grid.columns && grid.outer < few);
  return clamp(bytes / 4, large ? small : 1, most);
}

/* How lines of columns are summed: lines side by side spare the accumulators in memory, but each is
 * a stream of its own, and of those that come from memory a core follows few. Where they are far
 * apart they are long, so that each goes on where its last line ended, unless that would leave a
 * small tensor without groups for all threads. */
struct Strips {
  ptrdiff_t line, lines; // places at most, and how many side by side

  static Strips of(ptrdiff_t places, ptrdiff_t itemsize, ptrdiff_t bytes, Purpose purpose) {
    constexpr ptrdiff_t small = 1 << 20, cached = 48 << 20, run = 2048, few = 4;
    const bool is_short = purpose.weighted || itemsize == 8;
    if (kFarApart) return {is_short || bytes <= small ? kSumLine : kLongSumLine, few};
    if (purpose.arrays == 1) return {kSumLine, 8};
    if (is_short || 2 * bytes <= cached) return {kSumLine, few};
    const ptrdiff_t line = places < kLongSumLine ? places : kLongSumLine;
    return {kLongSumLine, clamp(run / (line * itemsize), 1, few)};
  }
};

/* Channels to a group of rows: as many as give a page of contiguous memory, and of small ones as
 * many as a first-level cache holds, which spares turns. Where there is one row to a channel it
 * is summed by itself, so that no accumulators limit their number. */
inline ptrdiff_t rows_width(ptrdiff_t outer, ptrdiff_t inner, ptrdiff_t itemsize) {
  constexpr ptrdiff_t page = 4096, cached = 16 * 1024;
  const ptrdiff_t row = inner * itemsize, in_page = (page + row - 1) / row;
  const ptrdiff_t in_cache = cached / (outer * row);
  return clamp(in_page < in_cache ? in_cache : in_page, 1, outer == 1 ? 64 : kMaxRowsWidth);
}

/* The grid for sums. Columns take a line as long as the accumulators' cache bears. */
inline Grid sum_grid(ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, ptrdiff_t itemsize,
                     Purpose purpose) {
  constexpr ptrdiff_t max_blocks = 64;
  const ptrdiff_t bytes = outer * channels * inner * itemsize;
  const Strips strips = Strips::of(channels * inner, itemsize, bytes, purpose);
  Grid grid = uncut(outer, channels, inner, purpose);
  const ptrdiff_t cell = cell_of(grid, itemsize, 256 * 1024);
  grid.strip = strips.lines;
  if (!grid.columns) {
    grid.width = rows_width(outer, inner, itemsize);
  } else if (inner > 1) {
    grid.width = planes_in(strips.line, inner);
  } else {
    grid.width = strips.line;
    if (channels < kPacked / 2)
      grid.tile = tile_of(clamp(kSumLine / 2 / channels, 1, outer), channels, purpose);
  }
  grid.cut(itemsize, cell, max_blocks);
  return grid;
}

/* Lines to take at once: as many as make a line of 16 vectors, of whole vectors if may be. */
inline ptrdiff_t line_tile(ptrdiff_t channels, ptrdiff_t itemsize) {
  const ptrdiff_t enough = (256 + channels - 1) / channels;
  ptrdiff_t whole = 16;
  for (ptrdiff_t c = channels; c % 2 == 0 && whole > 1; c /= 2) whole /= 2;
  return clamp((enough + whole - 1) / whole * whole, 1, max_line(itemsize) / channels);
}

/* The grid for maps alone: no sums to keep together, so cells are as contiguous as can be. */
inline Grid map_grid(ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, ptrdiff_t itemsize,
                     Purpose purpose) {
  const ptrdiff_t most = (inner == 1 ? 512 : 128) * 1024; // columns have a table to fill
  Grid grid = uncut(outer, channels, inner, purpose);
  const ptrdiff_t cell = cell_of(grid, itemsize, most);
  if (!grid.columns) {
    grid.width = clamp(cell / (inner * itemsize), 1, max_line(itemsize));
  } else if (inner > 1) {
    grid.width = planes_in(max_line(itemsize), inner);
  } else {
    grid.width = max_line(itemsize);
    grid.gapless = purpose.gapless && channels <= grid.width;
    if (channels < kPacked || grid.gapless)
      grid.tile = tile_of(clamp(line_tile(channels, itemsize), 1, outer), channels, purpose);
  }
  grid.cut(itemsize, cell, outer * inner);
  return grid;
}

/* x[n, c, s] = data[n * n_stride + c * c_stride + s] */
template <class T> struct View {
  T* data;
  ptrdiff_t n_stride, c_stride;
  T* at(ptrdiff_t n, ptrdiff_t c) const { return data + n * n_stride + c * c_stride; }
};

/* Rows of a group kept from their first reading to the second, in memory that every group uses
 * again: so they stay in a core's cache, where rows read from all over a tensor drive one another
 * out. */
template <class T> struct Kept {
  T* data = nullptr; // of the group's first channel; null: nothing is kept
  ptrdiff_t n_stride = 0, c_stride = 0;
  ptrdiff_t first = 0; // the group's first channel

  /* Rows begin with a cache line. */
  static ptrdiff_t row_size(const Grid& grid) {
    constexpr ptrdiff_t line = kCacheLine / sizeof(T);
    return (grid.inner + line - 1) / line * line;
  }
  static ptrdiff_t size(const Grid& grid) { return grid.outer * grid.width * row_size(grid); }

  static Kept of(const Grid& grid, T* data, ptrdiff_t group) {
    const ptrdiff_t row = row_size(grid);
    return {data, grid.width * row, row, grid.first_channel(group)};
  }
  T* at(ptrdiff_t n, ptrdiff_t c, ptrdiff_t s) const {
    return data ? data + n * n_stride + (c - first) * c_stride + s : nullptr;
  }
  /* The group's rows where they are kept. */
  View<const T> view() const { return {data - first * c_stride, n_stride, c_stride}; }
};

/* The piece of a row at a position. */
struct Piece {
  ptrdiff_t n, s, length;

  static Piece at(const Grid& grid, ptrdiff_t position) {
    const ptrdiff_t s = position % grid.segments * grid.segment, rest = grid.inner - s;
    return {position / grid.segments, s, rest < grid.segment ? rest : grid.segment};
  }
};

/* A bit for each element: those of a row, or of all channels' places in a line, begin with a byte;
 * short lines follow one another. No two cells of a grid write to one byte. */
template <class Byte> struct GateBits {
  Byte* data; // null: none are kept
  ptrdiff_t n_stride, c_stride; // bits

  static GateBits of(const Grid& grid, Byte* data) {
    const auto whole_bytes = [](ptrdiff_t bits) { return (bits + 7) / 8 * 8; };
    const ptrdiff_t row = whole_bytes(grid.inner), line = grid.channels * grid.inner;
    if (!grid.columns) return {data, grid.channels * row, row};
    return {data, has_short_lines(grid.channels, grid.inner) ? line : whole_bytes(line),
            grid.inner};
  }
  ptrdiff_t at(ptrdiff_t n, ptrdiff_t c, ptrdiff_t s) const {
    return n * n_stride + c * c_stride + s;
  }
};

} // namespace bncore

#endif
