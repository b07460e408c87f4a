// One reader of an owner's link at a time. Where two read at once each takes twice as long and both leave as far apart
// as they came, so three or more ranks move in a convoy in which most links idle: on four H200 a WaS step took 1.65 to
// 1.85 times what the links allow. One at a time, readers part: each finds its next owner free.
//
// The words lie in memory that all ranks' processes map. Nothing is protected here, only ordered, so a wait ends in any
// case: a link whose holder has died, or has held it for long, is taken from it.
#pragma once

#include <functional>
#include <optional>

#include "sidp/types.hpp"

namespace sidp {

class LinkQueue {
 public:
  struct Words {                                                   // all 0 at first
    std::function<std::uint32_t*(Rank owner)> holder;              // reader + 1, or 0: the link is free
    std::function<std::uint32_t*(Rank owner)> last;                // holder before, likewise
    std::function<std::uint32_t*(Rank owner, Rank reader)> waits;  // 1: this reader does
  };
  static constexpr Milliseconds kLivenessCheck{2};  // apart; also how long who comes next has to take a free link
  static constexpr Milliseconds kLongestHold{100};  // of 1 GB at 10 GB/s

  // alive: the rank may still leave a link or take one.
  LinkQueue(Rank rank, Rank world_size, Words words, std::function<bool(Rank)> alive,
            std::function<Clock::time_point()> now = Clock::now)
      : rank_(rank),
        world_size_(world_size),
        words_(std::move(words)),
        alive_(std::move(alive)),
        now_(std::move(now)) {}

  // For one owner's link at a time: asks, looks whether this reader may have it, and leaves it, granted or not.
  void ask(Rank owner);
  [[nodiscard]] bool granted();
  void leave();

  [[nodiscard]] std::uint64_t taken() const { return taken_; }  // links, from holders that had died or held them long

 private:
  [[nodiscard]] std::uint32_t mine() const { return static_cast<std::uint32_t>(rank_) + 1; }

  Rank rank_;
  Rank world_size_;
  Words words_;
  std::function<bool(Rank)> alive_;
  std::function<Clock::time_point()> now_;
  Rank owner_ = -1;
  std::optional<std::uint32_t> seen_;  // holder
  Clock::time_point since_;            // it was that, or this reader has held the link
  Clock::duration checked_{0};         // after that, whether the holder lives
  Clock::duration grace_{0};
  std::uint64_t taken_ = 0;
};

}  // namespace sidp
