// One reader of an owner's link at a time: the queue itself, between threads, and lanes of rank processes over the
// emulated driver.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <csignal>
#include <random>
#include <sstream>
#include <thread>

#include "core/link_queue.hpp"
#include "rank_group.hpp"
#include "sidp/placement.hpp"

namespace sidp::test {
namespace {

using ::testing::HasSubstr;

struct Links {
  explicit Links(Rank ranks)
      : world_size(ranks),
        holder(static_cast<std::size_t>(ranks)),
        last(holder.size()),
        waits(holder.size() * holder.size()),
        dead(holder.size()) {}
  LinkQueue queue(Rank rank) {
    return {rank,
            world_size,
            {[this](Rank owner) { return &holder[static_cast<std::size_t>(owner)]; },
             [this](Rank owner) { return &last[static_cast<std::size_t>(owner)]; },
             [this](Rank owner, Rank reader) { return &waits[static_cast<std::size_t>(owner * world_size + reader)]; }},
            [this](Rank reader) {
              ++looks;
              return !dead[static_cast<std::size_t>(reader)];
            },
            clock};
  }
  Rank world_size;
  std::vector<std::uint32_t> holder, last, waits;
  std::vector<std::atomic<bool>> dead;
  std::atomic<int> looks{0};  // at who lives
  std::function<Clock::time_point()> clock = Clock::now;
  Clock::time_point time;  // of tests that set it
  void set_clock() {
    clock = [this] { return time; };
  }
};

TEST(LinkQueue, PassesTheLinkDownTheRanks) {
  Links links(5);
  std::vector<LinkQueue> queues;
  for (Rank rank = 0; rank < 5; ++rank) queues.push_back(links.queue(rank));
  const auto granted = [&](Rank rank) { return queues[static_cast<std::size_t>(rank)].granted(); };
  for (const Rank rank : {3, 1, 2, 4}) queues[static_cast<std::size_t>(rank)].ask(0);
  std::vector<Rank> waiting = {1, 2, 3, 4};
  for (const Rank next : {4, 3, 2, 1}) {  // the owner counts as the last one at first
    std::erase(waiting, next);
    for (const Rank rank : waiting) EXPECT_FALSE(granted(rank)) << rank << " before " << next;
    EXPECT_TRUE(granted(next)) << next;
    for (const Rank rank : waiting) EXPECT_FALSE(granted(rank)) << rank << " while " << next;
    queues[static_cast<std::size_t>(next)].leave();
  }
  queues[0].ask(0);
  EXPECT_TRUE(granted(0)) << "a link that nobody waits for is free";
}

// Rank 1 left the link and would be followed by rank 3 at once, were it not for rank 0, which comes a moment later.
TEST(LinkQueue, AFreeLinkIsLeftForAMoment) {
  constexpr std::chrono::microseconds kGrace = Milliseconds(128) / kLinkGraceShare;
  Links links(4);
  links.set_clock();
  LinkQueue first = links.queue(1), early = links.queue(3), late = links.queue(0);
  for (LinkQueue* queue : {&early, &late}) {
    queue->ask(1);
    ASSERT_TRUE(queue->granted());
    links.time += Milliseconds(128);
    queue->leave();
  }
  first.ask(2);
  ASSERT_TRUE(first.granted());
  first.leave();
  early.ask(2);
  EXPECT_FALSE(early.granted());
  links.time += kGrace / 2;
  late.ask(2);
  EXPECT_FALSE(late.granted());
  links.time += kGrace / 2;
  EXPECT_FALSE(early.granted()) << "it is the other's turn";
  EXPECT_FALSE(late.granted()) << "for which the link has been free for less";
  links.time += kGrace / 2;
  EXPECT_FALSE(early.granted());
  EXPECT_TRUE(late.granted());
}

// Whoever died while it waited is waited for once.
TEST(LinkQueue, AFreeLinkIsNotLeftToWhoNeverTakesIt) {
  Links links(4);
  links.set_clock();
  LinkQueue gone = links.queue(3), next = links.queue(2), other = links.queue(1);
  gone.ask(0);
  next.ask(0);
  EXPECT_FALSE(next.granted());
  links.time += LinkQueue::kLivenessCheck;
  EXPECT_TRUE(next.granted());
  next.leave();
  next.ask(0);
  EXPECT_FALSE(next.granted()) << "it lives, perhaps";
  links.dead[3] = true;
  links.time += LinkQueue::kLivenessCheck;
  EXPECT_TRUE(next.granted());
  for (int i = 0; i < 3; ++i) {
    next.leave();
    other.ask(0);
    EXPECT_TRUE(other.granted());
    other.leave();
    next.ask(0);
    EXPECT_TRUE(next.granted());
  }
}

// Another took this rank for dead, and nobody else waits: it asks after nobody, and enters all the same.
TEST(LinkQueue, WhoWasTakenForDeadStillEnters) {
  Links links(3);
  links.set_clock();
  LinkQueue queue = links.queue(1);
  queue.ask(0);
  links.waits[1] = 0;
  EXPECT_FALSE(queue.granted());
  links.time += LinkQueue::kLivenessCheck;
  EXPECT_TRUE(queue.granted());
  EXPECT_EQ(links.looks, 0);
}

TEST(LinkQueue, ReadersThatGoAroundAreNeverTogether) {
  constexpr Rank kRanks = 4;
  constexpr int kRounds = 2000;
  Links links(kRanks);
  std::vector<std::atomic<int>> inside(kRanks);
  std::atomic<int> together{0};
  std::vector<std::thread> threads;
  std::vector<std::uint64_t> taken(kRanks);
  for (Rank rank = 0; rank < kRanks; ++rank)
    threads.emplace_back([&, rank] {
      LinkQueue queue = links.queue(rank);
      std::mt19937 random(static_cast<unsigned>(rank));
      for (int i = 0; i < kRounds; ++i)
        for (Rank owner = 0; owner < kRanks; ++owner) {
          if (owner == rank) continue;
          queue.ask(owner);
          while (!queue.granted()) std::this_thread::yield();
          auto& here = inside[static_cast<std::size_t>(owner)];
          if (here.fetch_add(1) != 0) ++together;
          if (random() % 4 == 0) std::this_thread::yield();
          here.fetch_sub(1);
          queue.leave();
        }
      taken[static_cast<std::size_t>(rank)] = queue.taken();
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(taken, ::testing::Each(0U)) << "a thread was stopped for long";
  EXPECT_EQ(together, 0);
  EXPECT_THAT(links.holder, ::testing::Each(0U));
  EXPECT_THAT(links.waits, ::testing::Each(0U));
}

TEST(LinkQueue, TheLinkOfADeadHolderIsTakenSoonAndALongHeldOneLater) {
  for (const bool dies : {true, false}) {
    SCOPED_TRACE(dies);
    Links links(3);
    links.set_clock();
    LinkQueue holder = links.queue(1), next = links.queue(2);
    holder.ask(0);
    ASSERT_TRUE(holder.granted());
    links.dead[1] = dies;
    next.ask(0);
    EXPECT_FALSE(next.granted());
    const auto due = dies ? LinkQueue::kLivenessCheck : LinkQueue::kLongestHold;
    for (auto waited = Milliseconds(1); waited < due; ++waited) {
      links.time += Milliseconds(1);
      for (int i = 0; i < 10; ++i) EXPECT_FALSE(next.granted()) << waited.count();
    }
    links.time += Milliseconds(1);
    EXPECT_TRUE(next.granted());
    EXPECT_EQ(next.taken(), 1);
    EXPECT_LE(links.looks, due / LinkQueue::kLivenessCheck) << "a look is a call of the system";
    holder.leave();  // it lived after all
    holder.ask(0);
    EXPECT_FALSE(holder.granted()) << "the link is the other's now";
    next.leave();
    EXPECT_TRUE(holder.granted());
  }
}

struct Copy {
  Rank reader;
  Rank peer;
  std::int64_t begin, end;
};

std::vector<Copy> copies_of(RankGroup& group, Rank ranks) {
  std::vector<Copy> copies;
  for (Rank rank = 0; rank < ranks; ++rank) {
    EXPECT_EQ(group.wait(rank), 0) << group.log(rank) << group.result(rank)["message"];
    std::istringstream words(group.result(rank)["copies"]);
    for (Copy copy{.reader = rank, .peer = 0, .begin = 0, .end = 0}; words >> copy.peer >> copy.begin >> copy.end;)
      copies.push_back(copy);
  }
  return copies;
}

int num_together(const std::vector<Copy>& copies) {
  int together = 0;
  for (std::size_t i = 0; i < copies.size(); ++i)
    for (std::size_t j = i + 1; j < copies.size(); ++j)
      together += copies[i].peer == copies[j].peer && copies[i].reader != copies[j].reader &&
                          copies[i].begin < copies[j].end && copies[j].begin < copies[i].end
                      ? 1
                      : 0;
  return together;
}

// Whoever copies: the owners' engines, the own one, or both by turns.
TEST(ExclusiveLinks, ALinkServesOneReaderAtATime) {
  for (const std::string exclusive : {"1", "0"})
    for (const auto& [how, engines] :
         {std::pair{"owners_engines=1", 2}, {"owners_engines=0", 0}, {"misbehave=hide_one", 1}}) {
      SCOPED_TRACE("exclusive_links=" + exclusive + ", " + how);
      RankGroup group(3, {"backend=nvshmem", "mode=was", "no_ops=1", "max_rows=5", "layers=9", "steps=4", "trace=4000",
                          "lane_delay_us=1000", "linger=1", "exclusive_links=" + exclusive, how});
      group.start_all();
      for (Rank rank = 0; rank < 3; ++rank) group.wait_for_mark(rank, "waiting");
      group.set_mark("stop");
      const std::vector<Copy> copies = copies_of(group, 3);
      EXPECT_GT(copies.size(), 40U);
      EXPECT_EQ(num_together(copies) == 0, exclusive == "1");
      for (Rank rank = 0; rank < 3; ++rank) {
        EXPECT_EQ(group.result(rank)["exclusive_links"], exclusive);
        EXPECT_EQ(number(group.result(rank), "owners_engines"), engines);
        EXPECT_EQ(number(group.result(rank), "links_taken"), 0) << "a thread was stopped for long";
      }
    }
}

// Calls of a trace keep an order that others need not.
TEST(ExclusiveLinks, CopiesOfBothEnginesKeepTheirOrder) {
  for (const std::string slots : {"2", "3", "4"}) {
    SCOPED_TRACE(slots + " slots");
    RankGroup group(3, {"backend=nvshmem", "mode=was", "no_ops=1", "layers=12", "steps=40", "lane_delay_us=300",
                        "misbehave=hide_one", "slots=" + slots});
    group.start_all();
    for (Rank rank = 0; rank < 3; ++rank)
      EXPECT_EQ(group.wait(rank), 0) << group.log(rank) << group.result(rank)["message"];
  }
}

TEST(ExclusiveLinks, GraphsAreReplayedBetweenEagerAndBrokenSteps) {
  RankGroup group(3, {"backend=nvshmem", "max_rows=5", "spin_rows=1", "do=replay", "lane_delay_us=300", "linger=1"});
  group.start_all();
  for (Rank rank = 0; rank < 3; ++rank) group.wait_for_mark(rank, "waiting");
  group.set_mark("stop");
  for (Rank rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(group.wait(rank), 0) << group.log(rank) << group.result(rank)["message"];
    EXPECT_EQ(number(group.result(rank), "exclusive_links"), 1);
  }
}

TEST(ExclusiveLinks, AllRanksHaveThemOrNone) {
  RankGroup group(3, {"backend=nvshmem", "mode=was", "no_ops=1", "setup_deadline_ms=4000"});
  for (Rank rank = 0; rank < 3; ++rank) group.start(rank, {"exclusive_links=" + std::to_string(rank == 1 ? 0 : 1)});
  for (Rank rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(group.wait(rank), 3) << group.log(rank);
    EXPECT_EQ(group.result(rank)["error"], "ManifestMismatchError");
    EXPECT_THAT(group.result(rank)["message"], HasSubstr("exclusive_links"));
  }
}

TEST(ExclusiveLinks, TwoRanksHaveNobodyToWaitFor) {
  RankGroup group(2, {"backend=nvshmem", "mode=was", "no_ops=1", "steps=3"});
  group.start_all();
  for (Rank rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(group.wait(rank), 0) << group.log(rank);
    EXPECT_EQ(number(group.result(rank), "exclusive_links"), 0);
  }
}

// Stopped or killed while it most likely holds a link, as it does nothing but copy; sooner or later it did.
TEST(ExclusiveLinks, ALinkIsTakenFromAReaderThatNoLongerLeavesIt) {
  for (const int signal : {SIGSTOP, SIGKILL}) {
    SCOPED_TRACE(signal);
    std::int64_t taken = 0;
    for (int attempt = 0; attempt < 6 && taken == 0; ++attempt) {
      RankGroup group(3, {"backend=nvshmem", "mode=was", "no_ops=1", "steps=2", "until_stop=1", "lane_delay_us=3000",
                          "setup_deadline_ms=1000", "stop_deadline_ms=5000"});
      group.start_all();
      for (Rank rank = 0; rank < 3; ++rank) group.wait_for_mark(rank, "ready");
      std::this_thread::sleep_for(Milliseconds(100 + 7 * attempt));
      group.signal(1, signal);
      std::this_thread::sleep_for(Milliseconds(400));
      group.set_mark("stop");
      for (const Rank rank : {0, 2}) {
        ASSERT_EQ(group.wait(rank), 0) << group.log(rank) << group.result(rank)["message"];
        EXPECT_LT(number(group.result(rank), "longest_ms"), 2500);
        taken += number(group.result(rank), "links_taken");
      }
      if (signal == SIGSTOP) group.signal(1, SIGKILL);
    }
    EXPECT_GT(taken, 0);
  }
}

}  // namespace
}  // namespace sidp::test
