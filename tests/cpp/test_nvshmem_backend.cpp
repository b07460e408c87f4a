// The GPU backend with real processes over an emulated driver and NVSHMEM: the same protocol code as on GPUs, on
// streams that are threads. Ordering, deadlines, deaths and bookkeeping show here; kernels, memory models and speed do
// not.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <random>
#include <thread>

#include "rank_group.hpp"

namespace sidp::test {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

void sleep_for(Milliseconds time) { std::this_thread::sleep_for(time); }

std::vector<std::string> gpu(std::vector<std::string> settings) {
  // buckets of 1 and 5 rows: the answer to one is awaited by a kernel, to the other by a stream memory operation
  settings.insert(settings.begin(), {"backend=nvshmem", "max_rows=5", "spin_rows=1"});
  return settings;
}

void expect_all_finish(RankGroup& group, Rank ranks) {
  for (Rank rank = 0; rank < ranks; ++rank) {
    EXPECT_EQ(group.wait(rank), 0) << group.log(rank) << group.result(rank)["message"];
    EXPECT_EQ(number(group.result(rank), "freed"), 1) << rank;
  }
  EXPECT_THAT(group.names_left(), IsEmpty());
}

class GpuGroups : public ::testing::TestWithParam<Rank> {};
INSTANTIATE_TEST_SUITE_P(Ranks, GpuGroups, ::testing::Values(1, 2, 3));

TEST_P(GpuGroups, StepsAreRightInEveryMode) {
  const Rank ranks = GetParam();
  for (const std::string mode : {"was", "cas", "auto"}) {
    SCOPED_TRACE("mode " + mode);
    RankGroup group(ranks, gpu({"mode=" + mode, "steps=30", "resident=2", "slots=3", "linger=1"}));
    group.start_all();
    for (Rank rank = 0; rank < ranks; ++rank) group.wait_for_mark(rank, "waiting");
    group.set_mark("stop");
    expect_all_finish(group, ranks);
    std::int64_t requests = 0, served = 0;
    for (Rank rank = 0; rank < ranks; ++rank) {
      const RankResult result = group.result(rank);
      EXPECT_EQ(number(result, "steps"), 30);
      EXPECT_EQ(number(result, "fallbacks"), 0);
      requests += number(result, "requests");
      served += number(result, "served");
      if (ranks == 1) continue;
      EXPECT_EQ(number(result, "owners_engines"), ranks - 1);
      EXPECT_EQ(number(result, "fetches") > 0, mode != "cas");
      EXPECT_EQ(number(result, "requests") > 0, mode != "was");
      EXPECT_EQ(number(result, "rows") > number(result, "requests"), mode != "was");
      EXPECT_GT(number(result, "copied"), 0);
    }
    EXPECT_EQ(served, requests);
  }
}

// Calls return at once here, and a step lasts as long as its ops do: what is reported is the streams' time. Most steps
// are timed; the last ones are still under way when the next would ask for them.
TEST(GpuBackend, StepsAreTimedOnTheirStream) {
  RankGroup group(2, gpu({"mode=cas", "steps=12", "op_delay_ms=10", "linger=1"}));
  group.start_all();
  for (Rank rank = 0; rank < 2; ++rank) group.wait_for_mark(rank, "waiting");
  group.set_mark("stop");
  expect_all_finish(group, 2);
  for (Rank rank = 0; rank < 2; ++rank) {
    EXPECT_GE(number(group.result(rank), "timed"), 4);
    EXPECT_LT(number(group.result(rank), "timed"), 12);
    EXPECT_GE(number(group.result(rank), "longest_us"), 30'000);  // of three or four streamed layers
    EXPECT_LT(number(group.result(rank), "longest_us"), 20'000'000);
  }
}

// A step of one of two ranks, all of whose requests come while the other is at a turn.
void ask_in_turn(RankGroup& group, Rank asking, const std::string& how) {
  const Rank owner = 1 - asking;
  group.start(asking, {"do=ask"});
  group.start(owner, {"do=turn", "how=" + how});
  group.wait_for_mark(owner, "in turn");
  group.set_mark("go");
  group.wait_for_mark(asking, "answered");
  group.set_mark("end");
  group.set_mark("stop");
  expect_all_finish(group, 2);
}

// A request waits while its owner computes a layer of its own, and not for ever: rank 0's step ends in any case. Rank 1
// owns the odd layers; the even ones have two ops. Or layer 1 is resident, so nobody asks anything of it.
TEST(GpuBackend, RequestsWaitForTheOwnersTurn) {
  for (const auto& [how, resident] : {std::pair<std::string, std::string>{"held", "-1"},
                                      {"released", "-1"},
                                      {"ended", "-1"},
                                      {"first", "-1"},
                                      {"last", "-1"},
                                      {"held", "1"},
                                      {"last", "1"}}) {
    SCOPED_TRACE("turn " + how + ", resident " + resident);
    RankGroup group(2, gpu({"mode=cas", "linger=1", "resident=" + resident}));
    ask_in_turn(group, 0, how);
    EXPECT_GT(number(group.result(1), "served"), 0);
    EXPECT_EQ(number(group.result(1), "deferred") > 0, resident == "-1" && (how == "held" || how == "last"));
    EXPECT_EQ(number(group.result(0), "deferred"), 0);
  }
}

// Of a layer's two ops the second does not wait: if the owner began layers of its own between them, each replica would
// wait for the other's whole layer. Here rank 0 is at its turn, and owns the layers with two.
TEST(GpuBackend, RequestsThatGoOnWithALayerDoNotWait) {
  RankGroup group(2, gpu({"mode=cas", "linger=1"}));
  ask_in_turn(group, 1, "held");
  EXPECT_GT(number(group.result(0), "served"), 2);
  EXPECT_EQ(number(group.result(0), "deferred"), number(group.result(0), "served") / 2);
}

// The same op of the same layer, step after step, goes on with nothing.
TEST(GpuBackend, RequestsForALayerAnewWait) {
  RankGroup group(2, gpu({"mode=cas", "linger=1"}));
  group.start(1, {"do=ahead"});
  group.start(0, {"do=turn", "how=held", "service_delay_us=5000"});
  group.wait_for_mark(1, "waiting");
  group.set_mark("end");
  group.set_mark("stop");
  expect_all_finish(group, 2);
  EXPECT_EQ(number(group.result(0), "served"), 12);
  EXPECT_GT(number(group.result(0), "deferred"), 6);  // the first ones may have come before the turn
}

// A thread that blocks in a launch, because the queue is full, may keep the service from launching what empties it.
TEST(GpuBackend, AThreadWaitsBeforeItHasQueuedTooMuchBehindARequest) {
  for (const auto& [local, unanswered] : {std::pair{"0", 4}, {"1", 2}, {"4", 1}}) {
    SCOPED_TRACE(std::string(local) + " local layers between requests");
    RankGroup group(2, gpu({"mode=cas", "service_delay_us=5000", "linger=1"}));
    group.start(0, {"do=ahead", std::string("local=") + local});
    group.start(1, {"steps=0"});
    group.wait_for_mark(0, "waiting");
    group.set_mark("stop");
    expect_all_finish(group, 2);
    EXPECT_EQ(number(group.result(0), "unanswered"), unanswered);
    EXPECT_EQ(number(group.result(0), "unanswered_before_was"), 0);
  }
}

TEST(GpuBackend, UsageErrorsLeaveItInOrder) {
  for (const std::string mode : {"was", "cas"}) {
    SCOPED_TRACE("mode " + mode);
    RankGroup group(2, gpu({"mode=" + mode, "slots=2"}));
    group.start(0, {"do=usage"});
    group.start(1, {"linger=1", "steps=0"});
    group.wait_for_mark(0, "usage checked");
    group.set_mark("stop");
    expect_all_finish(group, 2);
  }
}

// In steps of all kinds, some broken off; by turns in graphs.
TEST(GpuBackend, OwnersThatCannotWriteAreRead) {
  for (const auto& [how, why] :
       {std::pair{"misbehave=hide_peers", "its GPU is not visible to this process"},
        {"misbehave=fail_access", "cuMemSetAccess for device 1 to 4096 bytes of its owner failed"},
        {"owners_engines=0", ""}}) {
    for (const std::string what : {"steps", "replay"}) {
      SCOPED_TRACE(what + ", " + how);
      RankGroup group(2, gpu({"mode=was", "steps=20", "do=" + what, how}));
      group.start_all();
      expect_all_finish(group, 2);
      for (Rank rank = 0; rank < 2; ++rank) {
        EXPECT_EQ(number(group.result(rank), "owners_engines"), 0);
        EXPECT_THAT(group.result(rank)["why_read"], HasSubstr(why));
        EXPECT_EQ(group.result(rank)["why_read"].empty(), std::string(why).empty());
      }
    }
  }
}

TEST(GpuBackend, PeersWithoutMappingAreReadByGets) {
  for (const std::string unmapped : {"0", "1"}) {
    RankGroup group(2, gpu({"mode=was", "no_ops=1", "unmapped=" + unmapped, "steps=20"}));
    group.start_all();
    expect_all_finish(group, 2);
    for (Rank rank = 0; rank < 2; ++rank) {
      EXPECT_EQ(group.result(rank)["registered"], unmapped) << "the ring is what gets need";
      EXPECT_EQ(number(group.result(rank), "still_registered"), 0);
    }
  }
}

TEST(GpuBackend, RingThatNvshmemDoesNotRegisterIsAnError) {
  RankGroup group(2, gpu({"mode=was", "no_ops=1", "unmapped=1", "fail_registration=1"}));
  group.start_all();
  for (Rank rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(group.wait(rank), 3) << group.log(rank);
    EXPECT_EQ(group.result(rank)["error"], "DeviceError");
    EXPECT_THAT(group.result(rank)["message"], HasSubstr("nvshmemx_buffer_register of "));
    EXPECT_EQ(number(group.result(rank), "peer"), 1 - rank);
  }
}

// A get that is still under way when the lane is given up may land later: its target stays registered and allocated.
TEST(GpuBackend, MemoryThatALateGetWritesIsKept) {
  RankGroup group(2, gpu({"mode=was", "no_ops=1", "unmapped=1"}));
  group.start(0, {"do=stuck_get", "stop_deadline_ms=300"});
  group.start(1, {"steps=3"});
  for (Rank rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(group.wait(rank), 0) << group.log(rank) << group.result(rank)["message"];
    EXPECT_EQ(number(group.result(rank), "freed"), 0) << "freed by all or not at all";
    EXPECT_EQ(number(group.result(rank), "still_registered"), 1 - rank);
    EXPECT_EQ(number(group.result(rank), "idle"), rank) << "a stream of rank 0 is at work";
    EXPECT_EQ(number(group.result(rank), "control_mapped"), rank == 0 ? 2 : 0);
  }
  EXPECT_LT(number(group.result(0), "total_ms"), 3000);
}

TEST(GpuBackend, EventsAreTimedWithoutDriftAndNotLeaked) {
  RankGroup group(1, gpu({"do=events"}));
  group.start_all();
  EXPECT_EQ(group.wait(0), 0) << group.log(0) << group.result(0)["message"];
}

TEST(GpuBackend, TraceHasMarksForAllItsEvents) {
  RankGroup group(3, gpu({"mode=was", "no_ops=1", "do=trace_room"}));
  group.start_all();
  expect_all_finish(group, 3);
}

TEST(GpuBackend, StepsOnTwoStreamsKeepTheirOrder) {
  for (const std::string mode : {"was", "cas"}) {
    SCOPED_TRACE("mode " + mode);
    RankGroup group(2, gpu({"mode=" + mode, "do=streams", "linger=1"}));
    group.start_all();
    for (Rank rank = 0; rank < 2; ++rank) group.wait_for_mark(rank, "waiting");
    group.set_mark("stop");
    expect_all_finish(group, 2);
  }
}

TEST(GpuBackend, GraphsAreReplayedBetweenEagerAndBrokenSteps) {
  for (const std::string slots : {"2", "3"}) {
    RankGroup group(2, gpu({"do=replay", "slots=" + slots, "service_delay_us=500", "linger=1"}));
    group.start_all();
    for (Rank rank = 0; rank < 2; ++rank) group.wait_for_mark(rank, "waiting");
    group.set_mark("stop");
    expect_all_finish(group, 2);
  }
}

TEST(GpuBackend, SurvivorsFinishWhenARankIsKilled) {
  std::mt19937 random(3);
  for (int i = 0; i < 8; ++i) {
    const std::string mode = i % 2 == 0 ? "was" : "cas";
    SCOPED_TRACE("mode " + mode + ", attempt " + std::to_string(i));
    RankGroup group(3, gpu({"mode=" + mode, "steps=2", "until_stop=1", "setup_deadline_ms=4000"}));
    group.start_all();
    for (Rank rank = 0; rank < 3; ++rank) group.wait_for_mark(rank, "ready");
    sleep_for(Milliseconds(random() % 60));
    group.signal(1, SIGKILL);
    sleep_for(Milliseconds(500));  // after its grace, requests that it took are run again
    group.set_mark("stop");
    for (const Rank rank : {0, 2}) {
      ASSERT_EQ(group.wait(rank), 0) << group.log(rank);
      EXPECT_EQ(number(group.result(rank), "fallbacks") > 0, mode == "cas");
      EXPECT_EQ(number(group.result(rank), "freed"), 0) << "symmetric memory is freed by all or not at all";
    }
  }
}

TEST(GpuBackend, StoppedOwnerIsPassedOverAfterTheDeadline) {
  RankGroup group(2, gpu({"mode=cas", "steps=2", "until_stop=1", "deadline_ms=400", "setup_deadline_ms=4000"}));
  group.start_all();
  for (Rank rank = 0; rank < 2; ++rank) group.wait_for_mark(rank, "ready");
  group.signal(1, SIGSTOP);
  sleep_for(Milliseconds(1500));
  group.set_mark("stop");
  sleep_for(Milliseconds(500));
  group.signal(1, SIGCONT);
  // The owner may have been stopped between taking a request and answering it: then there is an error instead.
  if (group.wait(0) == 0)
    EXPECT_GT(number(group.result(0), "fallbacks"), 0);
  else
    EXPECT_EQ(group.result(0)["error"], "DeadlineError") << group.log(0);
  group.wait(1);
}

TEST(GpuBackend, RequestThatWasTakenAndNeverAnsweredIsAnError) {
  RankGroup group(2, gpu({"mode=cas", "steps=4"}));
  group.start(0, {"deadline_ms=200"});
  group.start(1, {"service_delay_us=1500000", "steps=0", "linger=1", "setup_deadline_ms=1000"});
  EXPECT_EQ(group.wait(0), 3) << group.log(0);
  EXPECT_EQ(group.result(0)["error"], "DeadlineError");
  EXPECT_THAT(group.result(0)["message"], HasSubstr("rank 1 took a request and did not answer it: rank 0 waited"));
  EXPECT_LT(number(group.result(0), "total_ms"), 3000);
  group.set_mark("stop");
  group.wait(1);
}

TEST(GpuBackend, OwnerWhoseDeviceHangsCostsOneDeadline) {
  RankGroup group(2, gpu({"mode=cas", "deadline_ms=800"}));
  group.start(0, {"steps=4"});
  group.start(1, {"op_delay_ms=20000", "steps=0", "linger=1"});
  EXPECT_EQ(group.wait(0), 3) << group.log(0);
  EXPECT_EQ(group.result(0)["error"], "DeadlineError");
  EXPECT_LT(number(group.result(0), "total_ms"), 2500) << "not one for each request of the step";
  group.signal(1, SIGKILL);
}

// Neither service can launch while the engines hold their contexts and wait for the other's answer.
TEST(GpuBackend, HeldContextsEndAtTheDeadline) {
  RankGroup group(2,
                  gpu({"mode=cas", "do=hold_context", "deadline_ms=400", "op_delay_ms=5", "setup_deadline_ms=2000"}));
  group.start_all();
  for (Rank rank = 0; rank < 2; ++rank) {
    const int status = group.wait(rank);
    EXPECT_TRUE(status == 0 || group.result(rank)["error"] == "DeadlineError") << group.log(rank);
    EXPECT_LT(number(group.result(rank), "total_ms"), 5000);
  }
}

// The owner dies, and its requester cannot run the op in its place while its own engine holds the context.
TEST(GpuBackend, DeadOwnerAndAHeldContextEndAtTheDeadline) {
  RankGroup group(2, gpu({"mode=cas"}));
  group.start(0, {"do=hold_context", "deadline_ms=1000"});
  group.start(1, {"op_delay_ms=20000", "steps=0", "linger=1"});
  for (Rank rank = 0; rank < 2; ++rank) group.wait_for_mark(rank, "ready");
  sleep_for(Milliseconds(100));
  group.signal(1, SIGKILL);
  EXPECT_EQ(group.wait(0), 3) << group.log(0);
  EXPECT_THAT(group.result(0)["message"], HasSubstr("did not run here either"));
  EXPECT_LT(number(group.result(0), "total_ms"), 5000);
}

TEST(GpuBackend, OwnerThatCannotLaunchSaysSoOnBothSides) {
  RankGroup group(2, gpu({"mode=cas", "linger=1"}));
  group.start(0, {"steps=3"});
  group.start(1, {"steps=0", "fail_launches=1", "setup_deadline_ms=1000"});
  EXPECT_EQ(group.wait(0), 3) << group.log(0);
  EXPECT_EQ(group.result(0)["error"], "RemoteOpError") << group.result(0)["message"];
  group.set_mark("stop");
  EXPECT_EQ(group.wait(1), 3) << group.log(1);
  EXPECT_THAT(group.result(1)["message"], HasSubstr("could not launch an op for rank 0: cuGraphLaunch"));
}

TEST(GpuBackend, CloseInAStepComesBack) {
  for (const std::string mode : {"was", "cas"}) {
    RankGroup group(2, gpu({"mode=" + mode, "do=close_in_step", "deadline_ms=500"}));
    group.start_all();
    for (Rank rank = 0; rank < 2; ++rank) {
      EXPECT_EQ(group.wait(rank), 0) << group.log(rank);
      EXPECT_LT(number(group.result(rank), "total_ms"), 3000);
    }
  }
}

TEST(GpuBackend, CloseWhileAStreamIsCapturedLeavesBothInOrder) {
  RankGroup group(2, gpu({"mode=cas", "close_in_capture=1", "linger=1"}));
  group.start_all();
  for (Rank rank = 0; rank < 2; ++rank) group.wait_for_mark(rank, "waiting");
  group.set_mark("stop");
  expect_all_finish(group, 2);
  for (Rank rank = 0; rank < 2; ++rank)
    EXPECT_LT(number(group.result(rank), "total_ms"), 10000) << "no deadline passed";
}

constexpr const char* kTotal = "total=1153433600";  // 1100 MiB: two of the heap's units of 512 MiB

// Others take 200 MiB once the first pool is gone: its memory stays with NVSHMEM, and that is enough for the next ones.
TEST(GpuBackend, PoolsReuseTheHeapThatNvshmemKeeps) {
  RankGroup group(2, gpu({"do=reopen", kTotal, "take_at=1", "take=209715200"}));
  group.start_all();
  for (Rank rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(group.wait(rank), 0) << group.log(rank) << group.result(rank)["message"];
    EXPECT_EQ(number(group.result(rank), "opened"), 2);
    EXPECT_EQ(number(group.result(rank), "refused"), -1);
  }
}

// Rank 1 has room for the flags and not for the pool: both ranks say so and free the flags.
TEST(GpuBackend, PoolThatOneRankCannotHoldLeavesNothing) {
  RankGroup group(2, gpu({"do=reopen", kTotal, "take_at=0", "take_rank=1", "take=104857600", "give_back_at=1"}));
  group.start_all();
  for (Rank rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(group.wait(rank), 0) << group.log(rank) << group.result(rank)["message"];
    EXPECT_EQ(number(group.result(rank), "refused"), 0);
    EXPECT_EQ(number(group.result(rank), "opened"), 2);
  }
}

}  // namespace
}  // namespace sidp::test
