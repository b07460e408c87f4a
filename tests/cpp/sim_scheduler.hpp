// A deterministic scheduler: real threads, of which exactly one runs. Every primitive of the simulated backend hands
// control back here, and a Chooser says who goes on, so a run is a function of the choices alone.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <semaphore>
#include <string>
#include <thread>
#include <vector>

#include "sidp/types.hpp"

namespace sidp::test {

enum class ThreadKind : std::uint8_t { kEngine, kLane, kService };

// Thrown out of a primitive to unwind a thread that shall never run again. Not a std::exception: nobody handles it.
struct SimKilled {};

class Chooser {
 public:
  virtual ~Chooser() = default;
  // Which of `count` (> 1) threads goes on; 0 is the one that ran last if it still can, else the next by number.
  virtual std::size_t choose(std::size_t count) = 0;
};

class RandomChooser final : public Chooser {
 public:
  explicit RandomChooser(std::uint64_t seed);
  std::size_t choose(std::size_t count) override;

 private:
  std::mt19937_64 random_;
  std::uint64_t stay_percent_;  // some seeds switch at every primitive, some rarely
};

// Depth-first over all schedules with at most `budget` departures from the default; picking option i costs i.
class ExhaustiveChooser final : public Chooser {
 public:
  explicit ExhaustiveChooser(std::size_t budget) : budget_(budget) {}
  std::size_t choose(std::size_t count) override;
  bool next();  // prepares the next schedule; false when all were run

 private:
  std::size_t budget_;
  std::size_t position_ = 0;
  std::size_t spent_ = 0;
  struct Choice {
    std::size_t picked;
    std::size_t options;
  };
  std::vector<Choice> path_;
};

// What goes wrong in a run, counted in choices since arm().
struct FaultPlan {
  std::optional<Rank> dies;  // none of its threads is chosen from choice die_at on
  std::uint64_t die_at = 0;
  std::uint64_t detect_after = 0;  // choices until alive() turns false
  std::optional<Rank> hangs;
  std::optional<ThreadKind> hangs_only{};  // of that rank; empty: all its threads
  std::uint64_t hang_at = 0;
  std::uint64_t resume_after = 0;      // choices after the first wait that gave up meanwhile
  std::uint32_t delays_per_mille = 0;  // of choices, after which some thread is left out for 1 to 40 choices
  std::uint64_t seed = 0;              // of the delays
};

class Scheduler {
 public:
  Scheduler(Chooser& chooser, const FaultPlan& faults) : chooser_(chooser), faults_(faults), delays_(faults.seed) {}

  // From the test's thread before run(), or from a simulated thread.
  std::thread start(Rank rank, ThreadKind kind, std::function<void()> body);
  void run();  // returns when no thread is left

  // From simulated threads. `what` must be a literal. Once the run is over these throw SimKilled, except when `quiet`.
  void yield(const char* what, bool quiet = false);
  // True when ready(), false when the deadline passed: only once nothing else can run. Negative: no deadline.
  bool block(const char* what, std::function<bool()> ready, std::int64_t deadline_ms, bool quiet = false);
  void arm() { armed_at_ = choices_; }  // choices and faults start here; set-up runs in the default order
  [[nodiscard]] bool armed() const { return armed_at_.has_value(); }
  void fail(const std::string& what);  // the first failure is kept and the run ends

  [[nodiscard]] bool dead(Rank rank) const { return died_at_ && faults_.dies == rank; }
  [[nodiscard]] bool seen_dead(Rank rank) const { return dead(rank) && detected_; }
  // True when no thread of that kind and rank is left.
  [[nodiscard]] bool finished(Rank rank, ThreadKind kind) const;
  [[nodiscard]] const std::string& failure() const { return failure_; }
  [[nodiscard]] std::uint64_t choices() const { return choices_; }
  [[nodiscard]] std::uint64_t expiries() const { return expiries_; }

 private:
  struct Thread {
    Rank rank;
    ThreadKind kind;
    std::size_t number;
    std::binary_semaphore go{0};
    const char* at = "start";
    std::function<bool()> ready;  // empty: not blocked
    std::int64_t expires_at = -1;
    bool expired = false;
    bool finished = false;
    std::uint64_t not_before = 0;
  };

  void switch_from(Thread& self);
  Thread* pick(const Thread& self);
  Thread* pick_for_teardown();
  void apply_faults();
  bool advance();
  [[nodiscard]] bool hung(const Thread& thread) const;
  [[nodiscard]] std::string describe(const Thread& thread) const;
  void remember(const Thread& thread);

  Chooser& chooser_;
  FaultPlan faults_;
  std::mt19937_64 delays_;
  std::deque<std::unique_ptr<Thread>> threads_;
  std::binary_semaphore over_{0};
  std::uint64_t choices_ = 0;
  std::optional<std::uint64_t> armed_at_;
  std::optional<std::uint64_t> died_at_;
  bool detected_ = false;
  enum class Hang : std::uint8_t { kBefore, kNow, kOver } hang_ = Hang::kBefore;
  std::optional<std::uint64_t> gave_up_at_;  // first expiry during the hang
  std::int64_t now_ms_ = 0;                  // virtual; moves only when nothing can run
  std::uint64_t expiries_ = 0;
  bool teardown_ = false;
  std::string failure_;
  std::deque<std::string> trace_;
};

}  // namespace sidp::test
