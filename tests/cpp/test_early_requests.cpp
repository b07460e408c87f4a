// Requests on a GPU that are announced before their rows, when these come late or never: real processes over the
// emulated driver, as in test_nvshmem_backend.cpp. Rank 0 asks rank 1 and holds its rows back.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <thread>

#include "rank_group.hpp"

namespace sidp::test {
namespace {

using ::testing::HasSubstr;

constexpr std::chrono::milliseconds kTaken{100};  // after which the owner's graph waits for the rows

RankGroup group_of(Rank ranks) {
  return {ranks, {"backend=nvshmem", "mode=cas", "max_rows=5", "spin_rows=5", "setup_deadline_ms=2000"}};
}

// Rank 2 is answered by the owner whose service waits for rank 0's rows, whether that died or is only late.
class OwnersWaitForRows : public ::testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(OfADeadRequester, OwnersWaitForRows, ::testing::Values(true, false));

TEST_P(OwnersWaitForRows, NotForEver) {
  const bool dies = GetParam();
  RankGroup group = group_of(3);
  group.start(0, {"do=held_rows", "deadline_ms=2000"});
  group.start(1, {"steps=0", "linger=1", dies ? "deadline_ms=30000" : "deadline_ms=300"});
  group.start(2, {"do=ask", "linger=1", "deadline_ms=3000"});
  group.wait_for_mark(0, "rung");
  group.wait_for_mark(2, "ready");
  std::this_thread::sleep_for(kTaken);
  if (dies) group.signal(0, SIGKILL);
  const auto asked = std::chrono::steady_clock::now();
  group.set_mark("go");
  group.wait_for_mark(2, "answered");
  EXPECT_LT(std::chrono::steady_clock::now() - asked, std::chrono::milliseconds(1500));
  group.set_mark("rows");  // too late
  if (!dies) {
    // It is not answered: neither with what its slot held before, nor with the rows that came.
    EXPECT_EQ(group.wait(0), 3) << group.log(0) << group.result(0)["message"];
    EXPECT_THAT(group.result(0)["message"], HasSubstr("rank 1 took a request and did not answer it"));
  }
  group.set_mark("stop");
  for (const Rank rank : {1, 2}) EXPECT_EQ(group.wait(rank), 0) << group.log(rank) << group.result(rank)["message"];
  EXPECT_EQ(number(group.result(1), "not_served"), 1);
  EXPECT_EQ(number(group.result(1), "idle"), 1);
}

// The owner dies before the rows have come: what runs in its place waits for them.
TEST(EarlyRequests, StandInsWaitForTheRows) {
  RankGroup group = group_of(2);
  group.start(0, {"do=held_rows", "deadline_ms=10000"});
  group.start(1, {"steps=0", "linger=1"});
  group.wait_for_mark(0, "rung");
  std::this_thread::sleep_for(kTaken);
  group.signal(1, SIGKILL);
  std::this_thread::sleep_for(std::chrono::milliseconds(600));  // after its grace the op is launched here
  group.set_mark("rows");
  EXPECT_EQ(group.wait(0), 0) << group.log(0) << group.result(0)["message"];
  EXPECT_EQ(number(group.result(0), "fallbacks"), 1);
}

// The owner dies once its graph has seen the rows: what runs in its place finds them too.
TEST(EarlyRequests, StandInsFindTheRowsThatTheOwnerSaw) {
  RankGroup group = group_of(2);
  group.start(0, {"steps=3", "deadline_ms=10000"});
  group.start(1, {"steps=0", "linger=1", "op_delay_ms=20000"});
  group.wait_for_mark(0, "ready");
  std::this_thread::sleep_for(kTaken);
  group.signal(1, SIGKILL);
  EXPECT_EQ(group.wait(0), 0) << group.log(0) << group.result(0)["message"];
  EXPECT_GT(number(group.result(0), "fallbacks"), 0);
  EXPECT_LT(number(group.result(0), "total_ms"), 5000);
}

// The owner hangs, and others answer in its place. When it is back it knows which rows are the next.
TEST(EarlyRequests, OwnersThatComeBackGoOnBehindTheirStandIns) {
  RankGroup group = group_of(2);
  group.start(0, {"do=ask", "steps=40", "deadline_ms=400", "linger=1"});
  group.start(1, {"steps=0", "linger=1", "deadline_ms=20000"});
  group.wait_for_mark(0, "ready");
  group.wait_for_mark(1, "waiting");
  group.signal(1, SIGSTOP);
  std::this_thread::sleep_for(kTaken);  // until all of its threads have stopped
  group.set_mark("go");
  group.wait_for_mark(0, "answered");
  group.signal(1, SIGCONT);
  group.set_mark("go on");
  group.wait_for_mark(0, "waiting");
  group.set_mark("stop");
  for (const Rank rank : {0, 1}) EXPECT_EQ(group.wait(rank), 0) << group.log(rank) << group.result(rank)["message"];
  EXPECT_GT(number(group.result(0), "fallbacks"), 2);
  EXPECT_GT(number(group.result(1), "served"), 0);
  EXPECT_EQ(number(group.result(1), "not_served"), 0);
}

// A request was not answered in time, and its requester's step goes on, void. The owner, which is late, does not wait
// for rows of it: rank 2 is behind them.
TEST(EarlyRequests, NobodyWaitsForRowsAfterAFailure) {
  RankGroup group = group_of(3);
  group.start(0, {"steps=3", "deadline_ms=150"});
  group.start(1, {"steps=0", "linger=1", "op_delay_ms=250"});  // takes some of those that are released at once
  group.start(2, {"do=ask", "linger=1", "deadline_ms=8000"});
  EXPECT_EQ(group.wait(0), 3) << group.log(0) << group.result(0)["message"];
  group.set_mark("go");
  group.wait_for_mark(2, "answered");
  group.set_mark("stop");
  for (const Rank rank : {1, 2}) EXPECT_EQ(group.wait(rank), 0) << group.log(rank) << group.result(rank)["message"];
  EXPECT_EQ(number(group.result(1), "not_served"), 0);
}

// The first block of each request comes late, when its flag is still as the request before left it. Requests have one
// block or several, or, of the most rows, no flags.
TEST(EarlyRequests, FlagsOfRequestsBeforeDoNotCount) {
  RankGroup group(
      2, {"backend=nvshmem", "mode=cas", "max_rows=7", "spin_rows=4", "steps=25", "linger=1", "misbehave=slow_puts"});
  group.start_all();
  for (const Rank rank : {0, 1}) group.wait_for_mark(rank, "waiting");
  group.set_mark("stop");
  for (const Rank rank : {0, 1}) {
    EXPECT_EQ(group.wait(rank), 0) << group.log(rank) << group.result(rank)["message"];
    EXPECT_EQ(number(group.result(rank), "fallbacks"), 0);
    EXPECT_EQ(number(group.result(rank), "not_served"), 0);
  }
}

// Words that were given back are taken again, on both sides, and symmetric memory is not zeroed.
TEST(EarlyRequests, RuntimesBeginAnew) {
  RankGroup group(2, {"backend=nvshmem", "do=reopen_runtimes", "max_rows=5"});
  group.start_all();
  for (const Rank rank : {0, 1}) EXPECT_EQ(group.wait(rank), 0) << group.log(rank) << group.result(rank)["message"];
}

// The owner dies when a part of its answer has arrived: what runs in its place answers anew.
TEST(EarlyRequests, OwnersDieInTheirAnswer) {
  RankGroup group = group_of(2);
  group.start(0, {"steps=20", "deadline_ms=10000", "misbehave=slow_puts"});
  group.start(1, {"steps=0", "linger=1", "misbehave=die_in_answer"});
  EXPECT_EQ(group.wait(0), 0) << group.log(0) << group.result(0)["message"];
  EXPECT_GT(number(group.result(0), "fallbacks"), 0);
}

// Rank 2 waits behind rank 0, whose rows do not come, with the deadline that all have: it does not pay for that.
TEST(EarlyRequests, WhoWaitsBehindAStuckRequesterIsAnsweredInTime) {
  RankGroup group = group_of(3);
  group.start(0, {"do=held_rows", "deadline_ms=800"});
  group.start(1, {"steps=0", "linger=1", "deadline_ms=800", "op_delay_ms=2"});
  group.start(2, {"steps=5", "linger=1", "deadline_ms=800"});
  group.wait_for_mark(0, "rung");
  group.wait_for_mark(2, "waiting");
  group.set_mark("rows");
  group.set_mark("stop");
  EXPECT_EQ(group.wait(2), 0) << group.log(2) << group.result(2)["message"];
  EXPECT_EQ(group.wait(1), 0) << group.log(1) << group.result(1)["message"];
  EXPECT_EQ(number(group.result(1), "not_served"), 1);
}

TEST(EarlyRequests, CloseDoesNotWaitForRowsThatDoNotCome) {
  RankGroup group = group_of(2);
  group.start(0, {"do=held_rows", "deadline_ms=60000"});
  group.start(1, {"steps=0", "linger=1", "deadline_ms=60000"});
  group.wait_for_mark(0, "rung");
  std::this_thread::sleep_for(kTaken);
  group.set_mark("stop");
  group.wait_for_mark(1, "closed");
  group.set_mark("rows");
  EXPECT_EQ(group.wait(1), 0) << group.log(1);
  EXPECT_EQ(number(group.result(1), "idle"), 1);
}

}  // namespace
}  // namespace sidp::test
