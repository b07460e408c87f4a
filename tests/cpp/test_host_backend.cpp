// The host backend with real processes: set-up, both modes, and what must be refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <csignal>

#include "rank_group.hpp"

namespace sidp::test {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

// All ranks end with that error and leave nothing behind, none later than `within`.
void expect_all_refuse(RankGroup& group, Rank ranks, const std::string& error, const std::string& message,
                       Milliseconds within = Milliseconds(20000)) {
  for (Rank rank = 0; rank < ranks; ++rank) {
    EXPECT_EQ(group.wait(rank), 3) << "rank " << rank << ":\n" << group.log(rank);
    RankResult result = group.result(rank);
    EXPECT_EQ(result["error"], error) << "rank " << rank << ": " << result["message"];
    EXPECT_THAT(result["message"], HasSubstr(message)) << "rank " << rank;
    EXPECT_LT(number(result, "total_ms"), within.count()) << "rank " << rank;
  }
  EXPECT_THAT(group.names_left(), IsEmpty());
}

class HostGroups : public ::testing::TestWithParam<Rank> {};
INSTANTIATE_TEST_SUITE_P(Ranks, HostGroups, ::testing::Values(1, 2, 3, 4));

TEST_P(HostGroups, StepsAreRightInEveryMode) {
  const Rank ranks = GetParam();
  for (const std::string mode : {"was", "cas", "auto"}) {
    SCOPED_TRACE("mode " + mode);
    RankGroup group(ranks, {"mode=" + mode, "steps=40", "resident=2", "slots=3", "linger=1"});
    group.start_all();
    for (Rank rank = 0; rank < ranks; ++rank) group.wait_for_mark(rank, "waiting");
    group.set_mark("stop");
    std::int64_t requests = 0, served = 0;
    for (Rank rank = 0; rank < ranks; ++rank) {
      ASSERT_EQ(group.wait(rank), 0) << group.log(rank);
      const RankResult result = group.result(rank);
      EXPECT_EQ(number(result, "steps"), 40);
      EXPECT_EQ(number(result, "fallbacks"), 0);
      requests += number(result, "requests");
      served += number(result, "served");
      if (ranks == 1) continue;
      EXPECT_EQ(number(result, "fetches") > 0, mode != "cas");
      EXPECT_EQ(number(result, "requests") > 0, mode != "was");
      EXPECT_GT(number(result, "copied"), 0);
    }
    EXPECT_GE(served, requests);
    EXPECT_THAT(group.names_left(), IsEmpty());
  }
}

TEST(HostBackend, LargeLayersArriveWhole) {
  RankGroup group(2, {"mode=was", "steps=6", "layers=3", "bytes=20000000", "linger=1"});
  group.start_all();
  for (Rank rank = 0; rank < 2; ++rank) group.wait_for_mark(rank, "waiting");
  group.set_mark("stop");
  for (Rank rank = 0; rank < 2; ++rank) EXPECT_EQ(group.wait(rank), 0) << group.log(rank);
}

TEST(HostBackend, SegmentsArePrivateAndLoseTheirNames) {
  RankGroup group(2, {"hold=pool created", "steps=1"});
  group.start_all();
  for (Rank rank = 0; rank < 2; ++rank) group.wait_for_mark(rank, "held");
  EXPECT_EQ(group.names_left().size(), 2u);
  for (const std::string& name : group.names_left()) {
    struct stat status{};
    ASSERT_EQ(::stat(("/dev/shm/" + name).c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 0777u, 0600u) << name;
  }
  group.set_mark("go");
  for (Rank rank = 0; rank < 2; ++rank) EXPECT_EQ(group.wait(rank), 0) << group.log(rank);
  EXPECT_THAT(group.names_left(), IsEmpty());
}

TEST(HostBackend, NamesAreGoneWhileTheGroupRuns) {
  RankGroup group(2, {"steps=1", "until_stop=1"});
  group.start_all();
  for (Rank rank = 0; rank < 2; ++rank) group.wait_for_mark(rank, "ready");
  EXPECT_THAT(group.names_left(), IsEmpty());
  group.set_mark("stop");
  for (Rank rank = 0; rank < 2; ++rank) EXPECT_EQ(group.wait(rank), 0) << group.log(rank);
}

TEST(HostBackend, RankThatNeverComesIsNamed) {
  RankGroup group(3, {"setup_deadline_ms=700"});
  group.start(0);
  group.start(1);
  expect_all_refuse(group, 2, "DeadlineError", ": 2");
}

TEST(HostBackend, OtherManifestIsRefusedByAll) {
  RankGroup group(3, {});
  group.start(0);
  group.start(1, {"odd_layer=4"});
  group.start(2);
  expect_all_refuse(group, 3, "ManifestMismatchError", "line 5: ");
}

TEST(HostBackend, OtherRingIsRefusedByAll) {
  RankGroup group(2, {});
  group.start(0);
  group.start(1, {"slots=3"});
  expect_all_refuse(group, 2, "ManifestMismatchError", "placement, line 1: ");
}

TEST(HostBackend, OtherOpsAreRefusedByAll) {
  RankGroup group(3, {});
  group.start(0);
  group.start(1);
  group.start(2, {"odd_op=1"});
  expect_all_refuse(group, 3, "ManifestMismatchError", "ops, line 3: ");
}

TEST(HostBackend, OtherMaxRowsAreRefusedByAll) {
  RankGroup group(2, {});
  group.start(0);
  group.start(1, {"max_rows=8"});
  expect_all_refuse(group, 2, "ManifestMismatchError", "ops, line 1: ");
}

TEST(HostBackend, OpsOnSomeRanksOnlyAreRefusedByAll) {
  RankGroup group(2, {"setup_deadline_ms=3000"});
  group.start(0);
  group.start(1, {"no_ops=1"});
  expect_all_refuse(group, 2, "ManifestMismatchError", "number of ops, line 1: ");
}

TEST(HostBackend, PoolBeyondTheMachineIsRefusedByAll) {
  // One layer of 1 PB: rank 0 cannot make it, rank 1 holds nothing and has to say so too.
  RankGroup group(2, {"layers=1", "bytes=1000000000000000"});
  group.start_all();
  expect_all_refuse(group, 2, "CapacityError", "1000000000000", Milliseconds(5000));
}

TEST(HostBackend, ResidentLayersBeyondTheMachineAreRefusedByAll) {
  RankGroup group(2, {"layers=1", "bytes=1000000000000000", "resident=0"});
  group.start_all();
  expect_all_refuse(group, 2, "CapacityError", "resident", Milliseconds(5000));
}

TEST(HostBackend, MailboxBeyondTheMachineIsRefusedByAll) {
  RankGroup group(2, {"max_rows=10000000000000"});
  group.start_all();
  expect_all_refuse(group, 2, "CapacityError", "mailbox", Milliseconds(5000));
}

// 2^61 rows of 40 bytes are 0 bytes modulo 2^64.
TEST(HostBackend, MailboxBeyondTheAddressSpaceIsRefusedByAll) {
  RankGroup group(2, {"max_rows=2305843009213693952", "steps=0"});
  group.start_all();
  expect_all_refuse(group, 2, "CapacityError", "max_rows", Milliseconds(5000));
}

TEST(HostBackend, DeathInSetUpEndsItForAll) {
  for (const std::string key : {"control created", "control mapped", "pool mapped", "mailbox created", "published"}) {
    SCOPED_TRACE(key);
    RankGroup group(3, {"setup_deadline_ms=1000"});
    group.start(0);
    group.start(1, {"hold=" + key});
    group.start(2);
    group.wait_for_mark(1, "held");
    group.signal(1, SIGKILL);
    for (const Rank rank : {0, 2}) {
      EXPECT_EQ(group.wait(rank), 3) << group.log(rank);
      RankResult result = group.result(rank);
      EXPECT_EQ(result["error"], "DeadlineError");
      EXPECT_THAT(result["message"], HasSubstr(": 1"));
    }
    EXPECT_THAT(group.names_left(), IsEmpty());
  }
}

// Nobody meets after the last mapping; the survivors remove the names that the dead rank could not.
TEST(HostBackend, DeathAfterTheLastMappingLeavesNoNames) {
  RankGroup group(2, {"steps=1"});
  group.start(0);
  group.start(1, {"hold=mailbox mapped"});
  group.wait_for_mark(1, "held");
  group.signal(1, SIGKILL);
  EXPECT_EQ(group.wait(0), 0) << group.log(0);
  EXPECT_THAT(group.names_left(), IsEmpty());
}

TEST(HostBackend, WrongCallsAreRefused) {
  for (const std::string mode : {"was", "cas"}) {
    SCOPED_TRACE("mode " + mode);
    // Rank 1 stays until rank 0 is through with its checks, which run against its service.
    RankGroup group(2, {"mode=" + mode, "slots=2"});
    group.start(0, {"do=usage"});
    group.start(1, {"linger=1", "steps=0"});
    EXPECT_EQ(group.wait(0), 0) << group.log(0);
    group.set_mark("stop");
    EXPECT_EQ(group.wait(1), 0) << group.log(1);
  }
}

TEST(HostBackend, SlowLaneMeetsTheDeadline) {
  for (const std::string what : {"slow_lane", "slow_drain"}) {
    SCOPED_TRACE(what);
    RankGroup group(2, {"mode=was"});
    group.start(0, {"do=" + what, "lane_delay_us=600000", "deadline_ms=150"});
    group.start(1, {"steps=20"});
    for (Rank rank = 0; rank < 2; ++rank) EXPECT_EQ(group.wait(rank), 0) << group.log(rank);
  }
}

}  // namespace
}  // namespace sidp::test
