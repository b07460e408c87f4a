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

PolicySnapshot snapshot(std::optional<Mode> previous, std::optional<double> was_ms, std::optional<double> cas_ms) {
  return {.num_tokens = 8, .max_rows = 64, .previous = previous, .was_ms = was_ms, .cas_ms = cas_ms};
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
  dead.peers_available = false;
  dead_many.num_tokens = 65;
  dead_many.peers_available = false;
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
      {"a tie goes to WaS", snapshot({}, 10, 10), kShape, {}, was, Reason::kFaster},
      {"a tie with CaS before", snapshot(cas, 10, 10), kShape, {}, cas, Reason::kHysteresis},
      {"CaS 9 % faster, WaS before", snapshot(was, 100, 91), kShape, {}, was, Reason::kHysteresis},
      {"CaS 10 % faster, WaS before", snapshot(was, 100, 90), kShape, {}, cas, Reason::kFaster},
      {"WaS 9 % faster, CaS before", snapshot(cas, 91, 100), kShape, {}, cas, Reason::kHysteresis},
      {"WaS 10 % faster, CaS before", snapshot(cas, 90, 100), kShape, {}, was, Reason::kFaster},
      {"no hysteresis", snapshot(was, 100, 99.9), kShape, {.hysteresis = 0}, cas, Reason::kFaster},
      {"the same mode before", snapshot(cas, 100, 99.9), kShape, {}, cas, Reason::kFaster},
      {"wide hysteresis", snapshot(was, 100, 31), kShape, {.hysteresis = 0.7}, was, Reason::kHysteresis},
      {"a dead owner overrides CaS before",
       [] {
         PolicySnapshot s = snapshot(Mode::kCas, 100, 1);
         s.peers_available = false;
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
  EXPECT_EQ(measured.was_ms, 12);
  EXPECT_EQ(measured.cas_ms, 34);
  const Decision mixed = decide(snapshot({}, 12, {}), kShape, kProfile, {});
  EXPECT_EQ(mixed.was_ms, 12);
  EXPECT_DOUBLE_EQ(mixed.cas_ms, predict_step_ms(Mode::kCas, 8, kProfile, kShape));
}

TEST(ModePolicy, PredictionFollowsTheRoofline) {
  // One token: 1 GB of weights at 10 GB/s, 0.5 GB over a link of 1 GB/s, 16 round trips.
  EXPECT_DOUBLE_EQ(predict_step_ms(Mode::kWas, 1, kProfile, kShape), 500.0);
  EXPECT_NEAR(predict_step_ms(Mode::kCas, 1, kProfile, kShape), 100.0 + 0.8 + 0.131072, 1e-9);
  // 1000 tokens: 2 * 1000 * 250e6 flop at 1e11 flop/s hide the link.
  EXPECT_DOUBLE_EQ(predict_step_ms(Mode::kWas, 1000, kProfile, kShape), 5000.0);
  for (const Mode mode : {Mode::kWas, Mode::kCas})
    for (std::int64_t tokens = 1; tokens < 100000; tokens *= 3)
      EXPECT_LE(predict_step_ms(mode, tokens, kProfile, kShape), predict_step_ms(mode, 3 * tokens, kProfile, kShape));
}

TEST(ModePolicy, CrossesFromCasToWasOnceAsTokensGrow) {
  int changes = 0;
  std::optional<Mode> previous;
  for (std::int64_t tokens = 1; tokens <= 1 << 20; tokens *= 2) {
    const Mode mode = decide({.num_tokens = tokens, .max_rows = 1 << 20}, kShape, kProfile, {}).mode;
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

TEST(ModePolicy, RefusesBadProfiles) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const double bad : {0.0, -1.0, nan})
    for (int field = 0; field < 4; ++field) {
      MachineProfile profile = kProfile;
      double* fields[] = {&profile.copy_bytes_per_s, &profile.round_trip_us, &profile.memory_bytes_per_s,
                          &profile.flops_per_s};
      *fields[field] = bad;
      EXPECT_THROW(decide(snapshot({}, {}, {}), kShape, profile, {}), Error) << field << " " << bad;
      EXPECT_THROW(decide(snapshot({}, {}, {}), kShape, profile, {.fixed = Mode::kWas}), Error) << field << " " << bad;
    }
  for (const double bad : {-0.01, 1.0, 2.0, nan})
    EXPECT_THROW(decide(snapshot({}, {}, {}), kShape, kProfile, {.hysteresis = bad}), Error) << bad;
  try {
    decide(snapshot({}, {}, {}), kShape, {}, {});
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kConfig);
  }
}

TEST(ModePolicy, EveryReasonHasAName) {
  for (int reason = 0; reason < 6; ++reason) EXPECT_NE(to_string(static_cast<Reason>(reason)), "unknown");
}

}  // namespace
}  // namespace sidp
