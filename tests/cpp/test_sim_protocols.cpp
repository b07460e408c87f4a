// The ring and request protocols under the deterministic simulator: thousands of interleavings, deaths, hangs, delays.
// A failure prints its seed; SIDP_SIM_SEED=<seed> runs that one again.
#include <gtest/gtest.h>

#include <cstdlib>

#include "sim_scenario.hpp"

namespace sidp::test {
namespace {

#if defined(__SANITIZE_THREAD__)
constexpr std::uint64_t kScale = 10;
#elif defined(__SANITIZE_ADDRESS__)
constexpr std::uint64_t kScale = 5;
#else
constexpr std::uint64_t kScale = 1;
#endif

// Only then do the counts below say whether the scenarios went where they should.
bool ran_all_seeds() { return std::getenv("SIDP_SIM_SEED") == nullptr && !::testing::Test::HasFailure(); }

// check(scenario, report): what has to hold beyond a run without failure.
template <typename Check>
void run_seeds(Fault fault, std::uint64_t count, Check check) {
  std::uint64_t first = 1, last = std::max<std::uint64_t>(count / kScale, 1);
  if (const char* seed = std::getenv("SIDP_SIM_SEED")) first = last = std::strtoull(seed, nullptr, 10);
  std::uint64_t choices = 0;
  for (std::uint64_t seed = first; seed <= last; ++seed) {
    const Scenario scenario = Scenario::random(seed, fault);
    RandomChooser chooser(seed);
    const RunReport report = run_scenario(scenario, chooser);
    choices += report.choices;
    SCOPED_TRACE("replay: SIDP_SIM_SEED=" + std::to_string(seed) +
                 " with --gtest_filter=" + ::testing::UnitTest::GetInstance()->current_test_info()->test_suite_name() +
                 "." + ::testing::UnitTest::GetInstance()->current_test_info()->name() + "\n  " + describe(scenario));
    EXPECT_EQ(report.failure, "");
    if (report.failure.empty()) check(scenario, report);
    if (::testing::Test::HasFailure()) return;
  }
  ::testing::Test::RecordProperty("choices", std::to_string(choices));
}

// Every rank but one that died ended its steps.
void expect_finished(const Scenario& scenario, const RunReport& report) {
  for (std::size_t r = 0; r < report.ranks.size(); ++r)
    if (scenario.faults.dies != static_cast<Rank>(r)) {
      EXPECT_TRUE(report.ranks[r].finished) << "rank " << r;
    }
}

std::uint64_t fallbacks(const RunReport& report) {
  std::uint64_t sum = 0;
  for (const RankReport& rank : report.ranks) sum += rank.stats.requester.fallbacks;
  return sum;
}

TEST(SimProtocols, AllInOrderWhenNothingFails) {
  std::uint64_t requests = 0, fetches = 0, drained = 0;
  run_seeds(Fault::kNone, 1500, [&](const Scenario& scenario, const RunReport& report) {
    expect_finished(scenario, report);
    EXPECT_EQ(report.expiries, 0u) << "a wait outlived its deadline: a wake-up was lost";
    EXPECT_EQ(fallbacks(report), 0u);
    for (std::size_t a = 0; a < report.ranks.size(); ++a) {
      const RuntimeStats& stats = report.ranks[a].stats;
      fetches += stats.prefetcher.fetches;
      drained += stats.prefetcher.drained;
      EXPECT_GE(stats.prefetcher.lane.copies, stats.prefetcher.fetches);
      for (std::size_t b = 0; b < report.ranks.size(); ++b) {
        requests += stats.requester.requests_by_peer[b];
        EXPECT_EQ(stats.requester.requests_by_peer[b], report.ranks[b].stats.service.served_by_peer[a]);
      }
    }
  });
  if (ran_all_seeds()) {
    EXPECT_TRUE(requests > 1000 / kScale && fetches > 1000 / kScale && drained > 0);
  }
}

TEST(SimProtocols, AllAskAllAtOnce) {
  for (Rank world_size = 2; world_size <= 4; ++world_size) {
    Scenario scenario;
    scenario.spec.world_size = world_size;
    scenario.spec.layer_bytes.assign(static_cast<std::size_t>(2 * world_size), 64);
    scenario.spec.max_rows = 3;
    scenario.fixed = Mode::kCas;
    scenario.steps.assign(static_cast<std::size_t>(world_size), {StepPlan{}, StepPlan{}});
    for (std::uint64_t seed = 1; seed <= 150 / kScale; ++seed) {
      scenario.seed = seed;
      RandomChooser chooser(seed);
      const RunReport report = run_scenario(scenario, chooser);
      ASSERT_EQ(report.failure, "") << "world_size " << world_size << ", seed " << seed;
      ASSERT_EQ(report.expiries, 0u) << "world_size " << world_size << ", seed " << seed;
      for (const RankReport& rank : report.ranks) ASSERT_TRUE(rank.finished);
    }
  }
}

TEST(SimProtocols, SurvivorsOfADeathFinish) {
  std::uint64_t seen = 0;
  run_seeds(Fault::kDeath, 1200, [&](const Scenario& scenario, const RunReport& report) {
    expect_finished(scenario, report);
    EXPECT_EQ(report.expiries, 0u) << "the death was known, yet a wait went on to its deadline";
    for (std::size_t r = 0; r < report.ranks.size(); ++r)
      if (scenario.faults.dies != static_cast<Rank>(r)) {
        EXPECT_GE(report.ranks[r].stats.requester.fallbacks, report.ranks[r].asked_dead) << "rank " << r;
      }
    seen += fallbacks(report);
  });
  if (ran_all_seeds()) {
    EXPECT_GT(seen, 100 / kScale);
  }
}

TEST(SimProtocols, HungOwnerIsPassedOverAndLateRepliesHarmNobody) {
  std::uint64_t seen = 0;
  run_seeds(Fault::kHang, 1000, [&](const Scenario& scenario, const RunReport& report) {
    expect_finished(scenario, report);
    if (report.expiries > 0) {
      EXPECT_GT(fallbacks(report), 0u);
    }
    seen += fallbacks(report);
  });
  if (ran_all_seeds()) {
    EXPECT_GT(seen, 100 / kScale);
  }
}

TEST(SimProtocols, HungLaneEndsItsOwnRuntimeOnly) {
  std::uint64_t seen = 0;
  run_seeds(Fault::kLaneHang, 600, [&](const Scenario& scenario, const RunReport& report) {
    expect_finished(scenario, report);
    for (std::size_t r = 0; r < report.ranks.size(); ++r) {
      if (scenario.faults.hangs != static_cast<Rank>(r)) {
        EXPECT_FALSE(report.ranks[r].lane_failed);
      }
      seen += report.ranks[r].lane_failed;
    }
    EXPECT_EQ(fallbacks(report), 0u);
  });
  if (ran_all_seeds()) {
    EXPECT_GT(seen, 50 / kScale);
  }
}

TEST(SimProtocols, RanksMayLeaveWhenTheyLike) {
  std::uint64_t seen = 0;
  run_seeds(Fault::kLeave, 600, [&](const Scenario& scenario, const RunReport& report) {
    expect_finished(scenario, report);
    EXPECT_EQ(report.expiries, 0u);
    seen += fallbacks(report);
  });
  if (ran_all_seeds()) {
    EXPECT_GT(seen, 20 / kScale);
  }
}

TEST(SimProtocols, SameSeedSameRun) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    const Scenario scenario = Scenario::random(seed, Fault::kHang);
    RandomChooser one(seed), two(seed);
    const RunReport a = run_scenario(scenario, one), b = run_scenario(scenario, two);
    EXPECT_EQ(a.choices, b.choices);
    EXPECT_EQ(a.expiries, b.expiries);
  }
}

// Every schedule with up to two departures from the default.
void run_exhaustively(const Scenario& scenario, std::size_t budget, std::uint64_t max_runs) {
  ExhaustiveChooser chooser(budget);
  std::uint64_t runs = 0;
  bool more = true;
  for (; more && runs < max_runs / kScale; ++runs) {
    const RunReport report = run_scenario(scenario, chooser);
    ASSERT_EQ(report.failure, "") << "schedule " << runs;
    ASSERT_EQ(report.expiries, 0u) << "schedule " << runs;
    for (const RankReport& rank : report.ranks) ASSERT_TRUE(rank.finished) << "schedule " << runs;
    more = chooser.next();
  }
  ::testing::Test::RecordProperty("schedules", std::to_string(runs) + (more ? " (bound)" : " (all)"));
  std::printf("  %llu schedules, %s\n", static_cast<unsigned long long>(runs), more ? "stopped at the bound" : "all");
}

TEST(SimExhaustive, RingOfOneSlot) {
  Scenario scenario;
  scenario.spec = {.world_size = 2, .layer_bytes = {40, 300, 64, 20}, .ring_slots = 1};
  scenario.fixed = Mode::kWas;
  scenario.steps = {{StepPlan{}}, {StepPlan{}}};
  run_exhaustively(scenario, 2, 6000);
}

TEST(SimExhaustive, RequestsBothWays) {
  Scenario scenario;
  scenario.spec = {.world_size = 2, .layer_bytes = {40, 300}, .ring_slots = 1};
  scenario.fixed = Mode::kCas;
  scenario.steps = {{StepPlan{}}, {StepPlan{}}};
  run_exhaustively(scenario, 2, 6000);
}

}  // namespace
}  // namespace sidp::test
