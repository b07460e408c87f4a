// Mode policy: a table of every reason, the edges of hysteresis, and no oscillation under noise.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "sidp/error.hpp"
#include "sidp/mode_policy.hpp"

namespace sidp {
namespace {

const MachineProfile kProfile{
    .copy_bytes_per_s = 1e9, .round_trip_us = 50, .memory_bytes_per_s = 1e10, .flops_per_s = 1e11};
const StepShape kShape{.total_bytes = 1'000'000'000,
                       .streamed_bytes = 500'000'000,
                       .streamed_layers = 16,
                       .ops_per_layer = 1,
                       .row_bytes = 8192,
                       .element_bytes = 4};

// With corrections that make the estimates of 8 tokens what is given.
PolicySnapshot snapshot(std::optional<Mode> previous, std::optional<double> was_ms, std::optional<double> cas_ms) {
  const StepTimes times = predict_step(8, kProfile, kShape);
  PolicySnapshot s{.num_tokens = 8, .max_rows = 64, .previous = previous};
  if (was_ms) s.was = {*was_ms / (1e3 * times.was_s), 3};
  if (cas_ms) s.cas = {*cas_ms / (1e3 * times.cas_s), 3};
  return s;
}

struct Row {
  const char* name;
  PolicySnapshot snapshot;
  StepShape shape;
  PolicyConfig config;
  Mode mode;
  Reason reason;
};

TEST(ModePolicy, Table) {
  const auto was = Mode::kWas, cas = Mode::kCas;
  StepShape local = kShape;
  local.streamed_layers = 0;
  PolicySnapshot many = snapshot({}, {}, {}), dead = many, full = many, none = many, dead_many = many;
  many.num_tokens = 65;
  full.num_tokens = 64;
  none.max_rows = 0;
  dead.unavailable_peer = 1;
  dead_many.num_tokens = 65;
  dead_many.unavailable_peer = 1;
  const Row rows[] = {
      {"all local", snapshot({}, 9, 1), local, {}, was, Reason::kAllLocal},
      {"all local before fixed", snapshot({}, 9, 1), local, {.fixed = cas}, was, Reason::kAllLocal},
      {"fixed CaS", snapshot(was, 1, 9), kShape, {.fixed = cas}, cas, Reason::kFixed},
      {"fixed WaS", snapshot(cas, 9, 1), kShape, {.fixed = was}, was, Reason::kFixed},
      {"fixed CaS stays with a dead owner", dead, kShape, {.fixed = cas}, cas, Reason::kFixed},
      {"fixed CaS is never replaced", many, kShape, {.fixed = cas}, cas, Reason::kFixed},
      {"rows beyond the slot", many, kShape, {}, was, Reason::kRowsBeyondSlot},
      {"rows fill the slot", full, kShape, {}, cas, Reason::kFaster},
      {"no ops", none, kShape, {}, was, Reason::kRowsBeyondSlot},
      {"owner dead", dead, kShape, {}, was, Reason::kPeerUnavailable},
      {"owner dead, rows too many", dead_many, kShape, {}, was, Reason::kRowsBeyondSlot},
      {"predicted CaS", snapshot({}, {}, {}), kShape, {}, cas, Reason::kFaster},
      {"measured WaS faster", snapshot({}, 10, 11), kShape, {}, was, Reason::kFaster},
      {"measured CaS faster", snapshot({}, 11, 10), kShape, {}, cas, Reason::kFaster},
      {"nearly a tie with CaS before", snapshot(cas, 10, 10.001), kShape, {}, cas, Reason::kHysteresis},
      {"a size fixed to CaS",
       snapshot(was, 1, 9),
       kShape,
       {.fixed_sizes = {{4, was}, {8, cas}, {16, was}}},
       cas,
       Reason::kFixed},
      {"a size between fixed ones takes the next",
       snapshot(was, 1, 9),
       kShape,
       {.fixed_sizes = {{4, was}, {9, cas}}},
       cas,
       Reason::kFixed},
      {"beyond the fixed sizes", snapshot({}, 1, 9), kShape, {.fixed_sizes = {{7, cas}}}, was, Reason::kFaster},
      {"CaS 9 % faster, WaS before", snapshot(was, 100, 91), kShape, {}, was, Reason::kHysteresis},
      {"CaS 11 % faster, WaS before", snapshot(was, 100, 89), kShape, {}, cas, Reason::kFaster},
      {"WaS 9 % faster, CaS before", snapshot(cas, 91, 100), kShape, {}, cas, Reason::kHysteresis},
      {"WaS 11 % faster, CaS before", snapshot(cas, 89, 100), kShape, {}, was, Reason::kFaster},
      {"no hysteresis", snapshot(was, 100, 99.9), kShape, {.hysteresis = 0}, cas, Reason::kFaster},
      {"the same mode before", snapshot(cas, 100, 99.9), kShape, {}, cas, Reason::kFaster},
      {"wide hysteresis", snapshot(was, 100, 31), kShape, {.hysteresis = 0.7}, was, Reason::kHysteresis},
      {"a dead owner overrides CaS before",
       [] {
         PolicySnapshot s = snapshot(Mode::kCas, 100, 1);
         s.unavailable_peer = 1;
         return s;
       }(),
       kShape,
       {},
       was,
       Reason::kPeerUnavailable},
  };
  for (const Row& row : rows) {
    const Decision decision = decide(row.snapshot, row.shape, kProfile, row.config);
    EXPECT_EQ(decision.mode, row.mode) << row.name;
    EXPECT_EQ(to_string(decision.reason), to_string(row.reason)) << row.name;
  }
}

TEST(ModePolicy, SaysWhatItCompared) {
  const Decision measured = decide(snapshot({}, 12, 34), kShape, kProfile, {});
  EXPECT_NEAR(measured.was_ms, 12, 1e-9);
  EXPECT_NEAR(measured.cas_ms, 34, 1e-9);
  EXPECT_EQ(explain(measured),
            "WaS for 8 tokens: faster, WaS 12 ms (predicted 500 ms x 0.024 of 3 timed steps) against CaS 34 ms "
            "(predicted 102 ms x 0.334 of 3 timed steps)");
  const Decision mixed = decide(snapshot({}, 12, {}), kShape, kProfile, {});
  EXPECT_DOUBLE_EQ(mixed.cas_ms, 1e3 * predict_step(8, kProfile, kShape).cas_s);
  EXPECT_NE(explain(mixed).find("CaS 102 ms (predicted 102 ms, not timed yet)"), std::string::npos);
  PolicySnapshot dead = snapshot({}, {}, {});
  dead.unavailable_peer = 3;
  EXPECT_EQ(explain(decide(dead, kShape, kProfile, {})),
            "WaS for 8 tokens: rank 3 is dead or silent, and WaS needs nothing of it");
  EXPECT_NE(explain(decide(snapshot(Mode::kCas, 95, 100), kShape, kProfile, {}))
                .find("CaS for 8 tokens: the other mode looks 5 % faster, a change needs 10 %"),
            std::string::npos);
}

TEST(ModePolicy, ResidentLayersMakeRemoteOnesWait) {
  // 16 of 80 layers are streamed by one of two, so 48 are resident: 0.6. A layer's products take 0.1 s / 80.
  StepShape most = kShape;
  most.streamed_bytes = 200'000'000;
  most.resident_bytes = 600'000'000;
  const StepTimes times = predict_step(1, kProfile, most);
  EXPECT_NEAR(times.cas_s, 0.1 + 0.0008 + 0.000131072 + 16 * kResidentWait * 0.6 * 0.6 * 0.1 / 80, 1e-12);
  EXPECT_NEAR(predict_step(1, kProfile, most, 0.5).cas_s, times.cas_s + 0.5, 1e-12);  // of other work nobody waits
  // A stream that hides behind the products is then better than to ask, which without residents is the faster.
  EXPECT_EQ(decide({.num_tokens = 100, .max_rows = 512}, most, kProfile, {}).mode, Mode::kWas);
  EXPECT_EQ(decide({.num_tokens = 100, .max_rows = 512}, kShape, kProfile, {}).mode, Mode::kCas);
}

TEST(ModePolicy, PredictionFollowsTheRoofline) {
  // One token: 1 GB of weights at 10 GB/s, 0.5 GB over a link of 1 GB/s, 16 round trips.
  StepTimes times = predict_step(1, kProfile, kShape);
  EXPECT_DOUBLE_EQ(times.was_s, 0.5);
  EXPECT_NEAR(times.cas_s, 0.1 + 0.0008 + 0.000131072, 1e-12);
  // 1000 tokens: 2 * 1000 * 250e6 flop at 1e11 flop/s hide the link, and the stream is written to memory beside them.
  times = predict_step(1000, kProfile, kShape);
  EXPECT_DOUBLE_EQ(times.local_s, 5.0);
  EXPECT_DOUBLE_EQ(times.was_s, 5.05);
  EXPECT_DOUBLE_EQ(predict_step(1, kProfile, kShape, 1.0).was_s, 1.15);  // a second of other work hides the link too
  StepShape eight = kShape;
  eight.world_size = 8;
  EXPECT_NEAR(predict_step(1, kProfile, eight).was_s, 0.5 * step_over_stream(8, 0.3), 1e-12);
  EXPECT_GT(step_over_stream(8, 0.3), 1.05);
  MachineProfile slow = kProfile;
  slow.copy_latency_us = 1000;
  EXPECT_DOUBLE_EQ(predict_step(1, slow, kShape).was_s, 0.516);
  for (std::int64_t tokens = 1; tokens < 100000; tokens *= 3) {
    const StepTimes few = predict_step(static_cast<double>(tokens), kProfile, eight);
    const StepTimes many = predict_step(3.0 * static_cast<double>(tokens), kProfile, eight);
    EXPECT_LE(few.was_s, many.was_s);
    EXPECT_LE(few.cas_s, many.cas_s);
  }
}

TEST(ModePolicy, MeasuredProductsReplaceTheRoofline) {
  MachineProfile profile = kProfile;
  profile.products = {{1, 2e-10}, {64, 4e-10}, {128, 6e-10}};
  EXPECT_DOUBLE_EQ(products_s(1e9, 0.5, profile, 4), 0.2);
  EXPECT_DOUBLE_EQ(products_s(1e9, 64, profile, 4), 0.4);
  EXPECT_DOUBLE_EQ(products_s(1e9, 96, profile, 4), 0.5);
  EXPECT_DOUBLE_EQ(products_s(1e9, 256, profile, 4), 1.2);
  EXPECT_EQ(products_s(1e9, 0, profile, 4), 0);
  profile.products = {{1, 2e-10}, {64, 1e-10}};
  EXPECT_THROW(check_policy(kShape, profile, {}), Error);
}

TEST(ModePolicy, CrossesFromCasToWasOnceAsTokensGrow) {
  int changes = 0;
  std::optional<Mode> previous;
  for (std::int64_t tokens = 1; tokens <= 1 << 20; tokens *= 2) {
    const Mode mode = decide({.num_tokens = tokens, .max_rows = 1 << 20, .previous = {}}, kShape, kProfile, {}).mode;
    if (previous && mode != *previous) ++changes;
    previous = mode;
  }
  EXPECT_EQ(changes, 1);
  EXPECT_EQ(previous, Mode::kWas);
}

TEST(ModePolicy, DoesNotOscillateUnderNoise) {
  std::mt19937_64 random(7);
  std::uniform_real_distribution<double> noise(0.95, 1.05);
  for (double ratio = 0.5; ratio <= 2.0; ratio += 0.005) {
    for (const Mode start : {Mode::kWas, Mode::kCas}) {
      Mode mode = start;
      int changes = 0;
      for (int step = 0; step < 2000; ++step) {
        const Decision d =
            decide(snapshot(mode, 100 * ratio * noise(random), 100 * noise(random)), kShape, kProfile, {});
        changes += d.mode != mode;
        mode = d.mode;
      }
      EXPECT_LE(changes, 1) << "ratio " << ratio;
    }
  }
}

// A runtime's loop without one: decide, choose, time.
Mode run_step(StepHistory& history, double was_ms, double cas_ms, std::int64_t num_tokens = 8) {
  PolicySnapshot s{.num_tokens = num_tokens, .max_rows = 64};
  history.fill(s);
  const Decision decision = decide(s, kShape, kProfile, {});
  const Mode mode = decision.mode;
  history.ran(decision);
  const StepTimes times = predict_step(static_cast<double>(num_tokens), kProfile, kShape);
  if (history.wants(mode, num_tokens))
    history.timed(mode, num_tokens, 1e3 * (mode == Mode::kWas ? times.was_s : times.cas_s),
                  mode == Mode::kWas ? was_ms : cas_ms);
  return mode;
}

TEST(StepHistory, CorrectsAPredictionThatWasWrong) {
  StepHistory history;  // predicted: WaS 550 ms, CaS 102 ms
  int cas_steps = 0;
  for (int i = 0; i < 100; ++i) cas_steps += run_step(history, 300, 900) == Mode::kCas;
  EXPECT_EQ(cas_steps, 3) << "as many as it takes to know better";
  EXPECT_EQ(history.changes(), 1);
  const auto entries = history.entries();
  ASSERT_EQ(entries.size(), 2);
  EXPECT_EQ(entries[0].from_tokens, 8);
  EXPECT_EQ(entries[0].to_tokens, 15);
  EXPECT_DOUBLE_EQ(entries[0].measured_ms, 300);
  EXPECT_DOUBLE_EQ(entries[1].measured_ms, 900);
  EXPECT_NEAR(entries[1].correction, 900 / entries[1].predicted_ms, 1e-12);
  // The next size borrows what this one knows.
  EXPECT_EQ(run_step(history, 300, 900, 16), Mode::kWas);
  EXPECT_EQ(run_step(history, 300, 900, 7), Mode::kWas);
}

// The profile makes the machine twice as slow as it is, so neither figure may be held against the other one's.
TEST(StepHistory, AModeThatWasNotTimedIsComparedWithTheOtherAsItIsCorrected) {
  StepHistory history;
  const StepTimes times = predict_step(8, kProfile, kShape);
  for (std::uint32_t i = 0; i < StepHistory::kEnough; ++i)
    history.timed(Mode::kWas, 8, 1e3 * times.was_s, 0.1 * 1e3 * times.was_s);
  PolicySnapshot s{.num_tokens = 8, .max_rows = 64, .previous = {}};
  history.fill(s);
  EXPECT_LT(0.1 * times.was_s, times.cas_s);
  const Decision decision = decide(s, kShape, kProfile, {});
  EXPECT_EQ(decision.mode, Mode::kCas);
  EXPECT_NE(explain(decision).find("CaS 10.2 ms (predicted 102 ms x 0.1 as the other, not timed yet)"),
            std::string::npos)
      << explain(decision);
  // Slower than predicted is no reason to expect the same of the other mode: three steps tell.
  StepHistory slow;
  for (std::uint32_t i = 0; i < StepHistory::kEnough; ++i)
    slow.timed(Mode::kCas, 8, 1e3 * times.cas_s, 9 * 1e3 * times.cas_s);
  slow.fill(s);
  EXPECT_EQ(s.was.factor, 1);
  EXPECT_EQ(decide(s, kShape, kProfile, {}).mode, Mode::kWas);
}

TEST(StepHistory, ForcedStepsAreNoSwings) {
  StepHistory history;
  Decision forced{.mode = Mode::kWas, .num_tokens = 8};
  for (int i = 0; i < 1000; ++i) {
    EXPECT_EQ(run_step(history, 500, 100), Mode::kCas);
    forced.reason = i % 3 == 0 ? Reason::kPeerUnavailable : i % 3 == 1 ? Reason::kRowsBeyondSlot : Reason::kFixed;
    history.ran(forced);
  }
  EXPECT_EQ(history.changes(), 0);
  PolicySnapshot s{.num_tokens = 8, .max_rows = 64};
  history.fill(s);
  EXPECT_EQ(s.recent_changes, 0);
  EXPECT_EQ(s.previous, Mode::kCas);
  // Yet they are steps: where all are forced, one in four is timed as elsewhere.
  StepHistory fixed;
  for (int i = 0; i < 415; ++i) {
    if (fixed.wants(Mode::kWas, 8)) fixed.timed(Mode::kWas, 8, 1, 1);
    fixed.ran(forced);
  }
  EXPECT_LE(fixed.entries()[0].steps, 15U + 101U);
}

// If trials widened the margin, the slower mode would be kept after one.
TEST(StepHistory, TrialsWidenNoMargin) {
  StepHistory history;
  int cas_steps = 0;
  for (int i = 0; i < 2000; ++i) {
    PolicySnapshot s{.num_tokens = 8, .max_rows = 64};
    history.fill(s);
    EXPECT_EQ(s.recent_changes, 0U) << i;
    cas_steps += run_step(history, 320, 600) == Mode::kCas;
  }
  EXPECT_LE(cas_steps, 6 * 3);
  EXPECT_GT(history.changes(), 6U);
}

TEST(StepHistory, OneOutlierDecidesNothing) {
  StepHistory history;
  for (int i = 0; i < 200; ++i) EXPECT_EQ(run_step(history, 500, i % 5 == 0 ? 90000 : 100), Mode::kCas) << i;
}

TEST(StepHistory, TrialsBecomeRare) {
  StepHistory history;
  int trials = 0;
  for (int i = 0; i < 100000; ++i) trials += run_step(history, 300, 900) == Mode::kCas;
  EXPECT_GE(trials, 2 * 3);
  EXPECT_LE(trials, 11 * 3) << "100, 200, 400, ... steps apart";
  // What has become true is found.
  for (int i = 0; i < 200000; ++i) trials += run_step(history, 300, 100) == Mode::kCas;
  EXPECT_EQ(run_step(history, 300, 100), Mode::kCas);
}

TEST(StepHistory, TimesOneStepInFourOnceItKnows) {
  StepHistory history;
  for (int i = 0; i < 415; ++i) run_step(history, 500, 100);
  EXPECT_EQ(history.entries()[0].steps, 15U + 100U);
}

TEST(ModePolicy, RowsOfRequestsGoAtTheirOwnRate) {
  MachineProfile profile = kProfile;
  const double as_copies = predict_step(64, profile, kShape).cas_s;
  profile.request_bytes_per_s = profile.copy_bytes_per_s;
  EXPECT_EQ(predict_step(64, profile, kShape).cas_s, as_copies);
  profile.request_bytes_per_s = profile.copy_bytes_per_s / 4;
  const double rows_s = kShape.streamed_layers * 64 * static_cast<double>(kShape.row_bytes) / profile.copy_bytes_per_s;
  EXPECT_GT(rows_s, 0);
  EXPECT_NEAR(predict_step(64, profile, kShape).cas_s - as_copies, 3 * rows_s, 1e-9);
  EXPECT_EQ(predict_step(64, profile, kShape).was_s, predict_step(64, kProfile, kShape).was_s);
}

TEST(ModePolicy, RefusesBadProfiles) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const double bad : {0.0, -1.0, nan})
    for (int field = 0; field < 4; ++field) {
      MachineProfile profile = kProfile;
      double* fields[] = {&profile.copy_bytes_per_s, &profile.round_trip_us, &profile.memory_bytes_per_s,
                          &profile.flops_per_s};
      *fields[field] = bad;
      EXPECT_THROW(check_policy(kShape, profile, {}), Error) << field << " " << bad;
    }
  for (const double bad : {-1.0, nan}) {
    MachineProfile profile = kProfile;
    profile.request_bytes_per_s = bad;
    EXPECT_THROW(check_policy(kShape, profile, {}), Error) << bad;
  }
  for (const double bad : {-0.01, 1.0, 2.0, nan})
    EXPECT_THROW(check_policy(kShape, kProfile, {.hysteresis = bad}), Error) << bad;
  EXPECT_THROW(check_policy(kShape, kProfile, {.fixed_sizes = {{8, Mode::kWas}, {8, Mode::kCas}}}), Error);
  EXPECT_THROW(check_policy(kShape, kProfile, {.fixed_sizes = {{0, Mode::kWas}}}), Error);
  try {
    check_policy(kShape, {}, {});
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kConfig);
  }
}

TEST(ModePolicy, EveryReasonHasAName) {
  for (int reason = 0; reason < static_cast<int>(kNumReasons); ++reason)
    EXPECT_NE(to_string(static_cast<Reason>(reason)), "unknown");
}

}  // namespace
}  // namespace sidp
