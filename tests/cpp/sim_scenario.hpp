// Randomised scenarios of N ranks on the simulator, a function of one seed.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "sidp/error.hpp"
#include "sim_scheduler.hpp"
#include "workload.hpp"

namespace sidp::test {

enum class Fault : std::uint8_t { kNone, kDeath, kHang, kLaneHang, kLeave };

struct Scenario {
  WorkloadSpec spec;
  std::optional<Mode> fixed{};
  std::vector<std::vector<StepPlan>> steps;  // by rank
  bool linger = true;  // a rank that has finished stays until the others have; otherwise it leaves at once
  FaultPlan faults{};
  std::uint64_t seed = 0;  // of inputs, rows and holding times

  static Scenario random(std::uint64_t seed, Fault fault);
};

struct RankReport {
  bool finished = false;         // all steps, or refused them as it has to after a fetch that outlived its deadline
  bool lane_failed = false;      // such a fetch
  std::uint64_t asked_dead = 0;  // requests begun when the owner was dead
  RuntimeStats stats{};
};

struct RunReport {
  std::string failure;  // empty: none
  std::vector<RankReport> ranks;
  std::uint64_t choices = 0;
  std::uint64_t expiries = 0;  // waits that outlived their deadline
};

RunReport run_scenario(const Scenario& scenario, Chooser& chooser);
std::string describe(const Scenario& scenario);

}  // namespace sidp::test
