// Mode policy: a pure function of a snapshot to a mode and a reason. No clock, no memory: what it needs to know of the
// past is in the snapshot, and StepHistory keeps it. docs/model.md derives the formulas; the planner calls them too.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sidp/types.hpp"

namespace sidp {

// What a machine does, measured once (sidp calibrate); all rates above 0.
struct MachineProfile {
  double copy_bytes_per_s = 0;     // one lane, peer to local
  double round_trip_us = 0;        // a request of one row and its reply, without the op itself
  double memory_bytes_per_s = 0;   // weights through a matrix product of few rows
  double flops_per_s = 0;          // a matrix product of many rows
  double copy_latency_us = 0;      // what a copy costs besides its bytes; may be 0
  double request_bytes_per_s = 0;  // many rows of requests and their replies; 0: as copies
  // Measured products: rows, ascending, and seconds for each byte of weights, never falling. Empty: the roofline.
  std::vector<std::pair<double, double>> products{};
};

// What a step of this pool asks of the machine.
struct StepShape {
  ByteCount total_bytes = 0;     // all pooled layers
  ByteCount streamed_bytes = 0;  // of those, owned elsewhere
  ByteCount resident_bytes = 0;  // of those, held by every replica
  std::int32_t streamed_layers = 0;
  std::int32_t ops_per_layer = 0;  // remote_compute calls a layer
  ByteCount row_bytes = 0;         // moved there and back for one row of one layer, all ops together
  std::int32_t element_bytes = 4;  // of a weight
  Rank world_size = 2;             // replicas that pull from each other
};

// Seconds of products of so many rows with weights of so many bytes: between measured rows the line through them,
// below the first one its time, beyond the last one in proportion; else the longer of reading the weights and
// multiplying them. No rows take no time.
double products_s(double num_bytes, double rows, const MachineProfile& profile, std::int32_t element_bytes);

// A WaS step in units of the stream's time on a link of its own, with `work` such units of compute beside it. From
// three replicas on pulls meet at the owners' links; csrc/core/contention.cpp has what the simulator says of that.
double step_over_stream(Rank world_size, double work);
inline constexpr Rank kLargestSimulated = 16;  // more replicas are taken for so many

// Predicted seconds of a step.
struct StepTimes {
  double local_s = 0;      // every weight here
  double copy_s = 0;       // the stream on a link of its own
  double work_s = 0;       // local, beside a stream that is written to the same memory
  double was_floor_s = 0;  // WaS if nobody else used the link
  double was_s = 0;
  double cas_s = 0;  // the replicas follow each other through the owners, the better the fewer layers are resident
};

// In CaS an owner that computes a resident layer shares its GPU with what is asked of it, and the asker's has nothing
// to do; and the more layers are resident, the less do replicas fall into step. A remote layer then waits for this
// share of its products, times the square of the resident layers' share. Fitted to decode steps of vLLM
// (docs/model.md).
inline constexpr double kResidentWait = 1.5;

// other_s: work of the step besides the pool's products (attention, head); 0 where nobody knows.
StepTimes predict_step(double rows, const MachineProfile& profile, const StepShape& shape, double other_s = 0);

struct PolicyConfig {
  std::optional<Mode> fixed{};  // always this mode
  // By batch size, ascending: a step takes the mode of the first size that holds it. Beyond the last the policy
  // decides.
  std::vector<std::pair<std::int64_t, Mode>> fixed_sizes{};
  double hysteresis = 0.10;  // the other mode must be faster by this share to be chosen
};

// What steps of one mode and about one size took, against what was predicted for them.
struct Correction {
  double factor = 1;        // measured over predicted, the median of recent steps; 1 until enough were timed
  std::uint32_t timed = 0;  // steps that it rests on; 0: of the other mode, if it is not 1
};

struct PolicySnapshot {
  std::int64_t num_tokens = 0;             // rows of this step
  std::int64_t max_rows = 0;               // a request slot's; 0: no ops declared
  std::optional<Rank> unavailable_peer{};  // an owner of a streamed layer that is dead or silent
  // Of the last step of about this size, and how often the mode of this size changed of late, but for trials.
  std::optional<Mode> previous{};
  std::uint32_t recent_changes = 0;
  Correction was{};
  Correction cas{};
};

enum class Reason : std::uint8_t {
  kAllLocal,  // nothing is streamed
  kFixed,
  kPeerUnavailable,  // WaS needs nothing of a dead owner
  kRowsBeyondSlot,
  kFaster,
  kHysteresis,  // the other mode looks faster, but not by enough
};
inline constexpr std::size_t kNumReasons = 6;

std::string_view to_string(Reason reason);

struct Decision {
  Mode mode = Mode::kWas;
  Reason reason = Reason::kAllLocal;
  // What was compared, corrected by measurements; 0 where nothing had to be.
  double was_ms = 0;
  double cas_ms = 0;
  Correction was{};
  Correction cas{};
  double margin = 0;  // by which the other mode had to be faster
  std::int64_t num_tokens = 0;
  std::int64_t max_rows = 0;
  Rank unavailable_peer = -1;
};

// The decision in words, with its figures.
std::string explain(const Decision& decision);

// Share by which the other mode must be faster: the configured one, and more the more often the mode changed of late,
// up to a half. So noise cannot keep the mode swinging, and a real difference still gets through.
double change_margin(double hysteresis, std::uint32_t recent_changes);

// Throws Error(kConfig) for a profile with a rate at or below 0, or a config that makes no sense.
void check_policy(const StepShape& shape, const MachineProfile& profile, const PolicyConfig& config);
// Expects what check_policy accepts.
Decision decide(const PolicySnapshot& snapshot, const StepShape& shape, const MachineProfile& profile,
                const PolicyConfig& config);

// What the policy knows of the past, by mode and size; sizes of one power of two are one. Not thread-safe.
//
// A prediction stands until kEnough steps of a mode and size were timed; then it is multiplied by the median of
// measured over predicted of the last kWindow, which single outliers do not move. Where a size was not timed, its
// neighbours are asked. A mode that is not in use keeps its correction: nothing is tried on a timer, except that after
// kForgetAfter steps without it (each time twice as many) its correction is forgotten. It is then tried again, for as
// many steps as it takes to time kEnough, and only if it looks faster at its best: as predicted, or corrected as the
// other mode is where that took less than predicted. So a machine that is faster than its profile rules out no mode
// that nobody tried, and steps spent on trials grow with the logarithm of the steps.
class StepHistory {
 public:
  static constexpr std::uint32_t kEnough = 3;
  static constexpr std::uint32_t kWindow = 15;
  static constexpr std::uint64_t kForgetAfter = 100;

  void fill(PolicySnapshot& snapshot) const;  // previous, recent_changes, was, cas of num_tokens
  // A step of this decision ran. Where the mode was forced (fixed, too many rows, a dead owner) it says nothing of what
  // the policy wants: no swing, and no step that the other mode was passed over for.
  void ran(const Decision& decision);
  void timed(Mode mode, std::int64_t num_tokens, double predicted_ms, double measured_ms);
  // Whether the next such step should be timed: all until the window is full, then one in four.
  [[nodiscard]] bool wants(Mode mode, std::int64_t num_tokens) const;

  struct Entry {
    Mode mode;
    std::int64_t from_tokens;  // sizes that it stands for
    std::int64_t to_tokens;
    std::uint64_t steps;  // timed since the start
    double predicted_ms;  // medians of recent steps
    double measured_ms;
    double correction;
  };
  [[nodiscard]] std::vector<Entry> entries() const;
  [[nodiscard]] std::uint64_t changes() const { return changes_; }

 private:
  struct Samples {
    std::array<double, kWindow> predicted_ms{}, measured_ms{};
    std::uint32_t count = 0;  // in the window
    std::uint32_t next = 0;
    std::uint64_t total = 0;
    double factor = 1;
    std::uint64_t idle = 0;  // choices of the other mode since this one was used
    std::uint32_t forgotten = 0;
  };
  struct Size {
    std::array<Samples, 2> by_mode{};
    std::optional<Mode> previous{};
    bool trying = false;  // previous was not timed yet when the mode changed to it
    std::uint32_t recent_changes = 0;
    std::uint64_t steps = 0;   // in either mode, forced or not
    std::uint64_t chosen = 0;  // of those, not forced
  };
  static std::size_t size_of(std::int64_t num_tokens);

  std::vector<Size> sizes_ = std::vector<Size>(64);  // by bit width of the token count
  std::uint64_t changes_ = 0;
};

}  // namespace sidp
