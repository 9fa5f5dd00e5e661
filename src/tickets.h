/* Tickets: which thread computes which group or cell. The bits of a result do not depend on it. */
#ifndef BNCORE_TICKETS_H
#define BNCORE_TICKETS_H

#include <atomic>

#include "grid.h"
#include "team.h"

namespace bncore {

/* Hands out groups, or cells, to the threads of a team, each once, whoever comes. Every thread has
 * a share, the same part of memory in each pass and in each call, as that is what its core's own
 * cache holds; who has done his own takes from the others'. Neighbours go together, many at first
 * and fewer as they run out. */
class Tickets {
 public:
  /* Groups; of small ones several at a time, lest two cores write to one line of statistics. */
  void hand_out_groups(const Grid& grid, ptrdiff_t itemsize, int threads) {
    constexpr ptrdiff_t worth = 128 * 1024; // bytes
    share_out(grid.groups, threads, false);
    least_ = clamp(worth / (grid.group_size() * itemsize), 1, 1 + grid.groups / (kParts * threads));
  }
  /* Cells, from the last one of a share on where so is wanted. */
  void hand_out_cells(const Grid& grid, int threads, bool from_last) {
    share_out(grid.groups * grid.blocks, threads, from_last);
  }

 private:
  friend struct Turns;
  static constexpr int kMost = 64;      // shares; of more threads several have one together
  static constexpr ptrdiff_t kParts = 4; // of what is left of a share, taken one at a time

  struct alignas(kCacheLine) Share {
    std::atomic<ptrdiff_t> taken;
    ptrdiff_t begin, end;
  };
  Share shares_[kMost];
  ptrdiff_t least_;
  int count_; // of shares
  bool reversed_;

  void share_out(ptrdiff_t turns, int threads, bool from_last) {
    count_ = threads < kMost ? threads : kMost;
    least_ = 1, reversed_ = from_last;
    for (int i = 0; i < count_; ++i) {
      Share& share = shares_[i];
      share.begin = turns * i / count_, share.end = turns * (i + 1) / count_;
      share.taken.store(share.begin, std::memory_order_relaxed);
    }
  }
};

/* The turns of the thread that makes it. */
struct Turns {
  /* A group or cell, or -1 where none is left. */
  ptrdiff_t take(Tickets* tickets) {
    for (; next_ == end_; ++helped_) {
      if (helped_ == tickets->count_) return -1;
      if (claim(*tickets, tickets->shares_[(thread_ + helped_) % tickets->count_])) break;
    }
    const ptrdiff_t turn = next_++;
    return tickets->reversed_ ? mirror_ - turn : turn;
  }

 private:
  int thread_ = thread_number(), helped_ = 0;
  ptrdiff_t next_ = 0, end_ = 0, mirror_ = 0;

  bool claim(const Tickets& tickets, Tickets::Share& share) {
    next_ = share.taken.load(std::memory_order_relaxed);
    do {
      const ptrdiff_t left = share.end - next_;
      if (left == 0) return end_ = next_, false;
      const ptrdiff_t least = tickets.least_ < left ? tickets.least_ : left;
      end_ = next_ + clamp(left / Tickets::kParts, least, left);
    } while (!share.taken.compare_exchange_weak(next_, end_, std::memory_order_relaxed));
    mirror_ = share.begin + share.end - 1;
    return true;
  }
};

} // namespace bncore

#endif
