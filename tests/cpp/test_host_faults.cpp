// The host backend with real processes that are killed, stopped or leave early, in the middle of their peers' steps.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <random>
#include <thread>

#include "rank_group.hpp"

namespace sidp::test {
namespace {

using ::testing::IsEmpty;

constexpr int kRounds = 24;

void sleep_us(std::uint64_t us) { std::this_thread::sleep_for(std::chrono::microseconds(us)); }

void expect_survived(RankGroup& group, Rank rank, bool asked) {
  ASSERT_EQ(group.wait(rank), 0) << "rank " << rank << ":\n" << group.log(rank);
  const RankResult result = group.result(rank);
  if (asked) {
    EXPECT_GT(number(result, "fallbacks"), 0) << "rank " << rank;
  } else {
    EXPECT_EQ(number(result, "fallbacks"), 0) << "rank " << rank;
  }
  EXPECT_LT(number(result, "longest_ms"), 5000) << "rank " << rank << " waited for a dead peer";
}

// One rank is killed at a random moment; the others take more steps and check every byte.
void kill_one(const std::string& mode, int round) {
  std::mt19937_64 random(static_cast<std::uint64_t>(round) * 7 + (mode == "cas" ? 1 : 0));
  const auto ranks = static_cast<Rank>(2 + random() % 3);
  const auto victim = static_cast<Rank>(random() % static_cast<std::uint64_t>(ranks));
  const std::uint64_t delay_us = random() % 15000;
  SCOPED_TRACE("round " + std::to_string(round) + ": " + mode + ", rank " + std::to_string(victim) + " of " +
               std::to_string(ranks) + " killed after " + std::to_string(delay_us) + " us");
  RankGroup group(ranks, {"mode=" + mode, "steps=2", "until_stop=1", "slots=" + std::to_string(1 + random() % 4),
                          "layers=9", "bytes=" + std::to_string(500 + random() % 100000)});
  group.start_all();
  for (Rank rank = 0; rank < ranks; ++rank) group.wait_for_mark(rank, "ready");
  sleep_us(delay_us);
  group.signal(victim, SIGKILL);
  EXPECT_EQ(group.wait(victim), -SIGKILL);
  // Survivors leave too when they have finished, and their peers fall back then: only CaS notices.
  group.set_mark("stop");
  for (Rank rank = 0; rank < ranks; ++rank)
    if (rank != victim) expect_survived(group, rank, mode == "cas");
  EXPECT_THAT(group.names_left(), IsEmpty());
}

TEST(HostFaults, WasSurvivesAKilledRank) {
  for (int round = 0; round < kRounds && !::testing::Test::HasFailure(); ++round) kill_one("was", round);
}

TEST(HostFaults, CasSurvivesAKilledRank) {
  for (int round = 0; round < kRounds && !::testing::Test::HasFailure(); ++round) kill_one("cas", round);
}

TEST(HostFaults, LastOfFourGoesOnAlone) {
  for (const std::string mode : {"was", "cas", "auto"}) {
    SCOPED_TRACE("mode " + mode);
    RankGroup group(4, {"mode=" + mode, "steps=2", "until_stop=1"});
    group.start_all();
    for (Rank rank = 0; rank < 4; ++rank) group.wait_for_mark(rank, "ready");
    for (const Rank victim : {2, 0, 3}) {
      sleep_us(8000);
      group.signal(victim, SIGKILL);
    }
    group.set_mark("stop");
    ASSERT_EQ(group.wait(1), 0) << group.log(1);
    if (mode == "cas") {
      EXPECT_GT(number(group.result(1), "fallbacks"), 0);
    }
  }
}

TEST(HostFaults, StoppedOwnerIsPassedOverAfterTheDeadline) {
  RankGroup group(3, {"mode=cas", "steps=2", "until_stop=1", "deadline_ms=400"});
  group.start_all();
  for (Rank rank = 0; rank < 3; ++rank) group.wait_for_mark(rank, "ready");
  group.signal(1, SIGSTOP);
  sleep_us(1500000);
  group.signal(1, SIGCONT);  // its late answers land in slots that nobody reads
  sleep_us(50000);
  group.set_mark("stop");
  for (Rank rank = 0; rank < 3; ++rank) EXPECT_EQ(group.wait(rank), 0) << group.log(rank);
  for (const Rank rank : {0, 2}) {
    EXPECT_GT(number(group.result(rank), "fallbacks"), 0) << rank;
    EXPECT_GE(number(group.result(rank), "longest_ms"), 400) << rank;
  }
}

TEST(HostFaults, StoppedOwnerStillServesItsBytes) {
  RankGroup group(2, {"mode=was", "steps=2", "until_stop=1", "deadline_ms=30000"});
  group.start_all();
  for (Rank rank = 0; rank < 2; ++rank) group.wait_for_mark(rank, "ready");
  group.signal(1, SIGSTOP);
  sleep_us(50000);
  group.set_mark("stop");
  expect_survived(group, 0, false);
  group.signal(1, SIGCONT);
  expect_survived(group, 1, false);
}

TEST(HostFaults, HungServiceIsPassedOver) {
  RankGroup group(2, {"mode=cas", "steps=30", "linger=1"});
  group.start(0, {"deadline_ms=200"});
  group.start(1, {"service_delay_us=600000"});
  for (Rank rank = 0; rank < 2; ++rank) group.wait_for_mark(rank, "waiting");
  group.set_mark("stop");
  for (Rank rank = 0; rank < 2; ++rank) EXPECT_EQ(group.wait(rank), 0) << group.log(rank);
  EXPECT_GT(number(group.result(0), "fallbacks"), 0);
  EXPECT_EQ(number(group.result(1), "fallbacks"), 0);
}

TEST(HostFaults, RankThatClosesEarlyIsNotWaitedFor) {
  for (const std::string mode : {"was", "cas"}) {
    SCOPED_TRACE("mode " + mode);
    RankGroup group(3, {"mode=" + mode, "deadline_ms=30000"});
    group.start(0, {"steps=2", "until_stop=1"});
    group.start(1, {"steps=3"});
    group.start(2, {"steps=2", "until_stop=1"});
    group.wait_for_mark(1, "closed");
    sleep_us(20000);
    group.set_mark("stop");
    for (const Rank rank : {0, 2}) {
      expect_survived(group, rank, mode == "cas");
      EXPECT_LT(number(group.result(rank), "longest_ms"), 2000);
    }
    EXPECT_EQ(group.wait(1), 0) << group.log(1);
  }
}

TEST(HostFaults, RankThatClosedStillAnswersMemory) {
  RankGroup group(2, {"mode=was", "deadline_ms=30000"});
  group.start(0, {"steps=2", "until_stop=1"});
  group.start(1, {"steps=1"});
  ASSERT_EQ(group.wait(1), 0) << group.log(1);  // its process is gone
  sleep_us(10000);
  group.set_mark("stop");
  expect_survived(group, 0, false);
}

}  // namespace
}  // namespace sidp::test
