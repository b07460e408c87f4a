// The recorder of traces, and traces of ranks as processes: check_trace says what holds of them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "rank_group.hpp"
#include "sidp/error.hpp"
#include "sidp/trace.hpp"

namespace sidp::test {
namespace {

constexpr Milliseconds kDeadline{1000};

// Marks that a stream gets to 10 ns after each other, but for the last few.
class CountingClock final : public StreamClock {
 public:
  CountingClock(TraceMark room, TraceMark never) : room_(room), never_(never) {}
  TraceMark mark(Stream) noexcept override {
    const TraceMark at = next_.fetch_add(1);
    return at < room_ ? at : kNoMark;
  }
  void wait(TraceMark, Clock::time_point) noexcept override {}
  void finish(Clock::time_point) noexcept override { finished_ = true; }
  std::optional<std::int64_t> ns(TraceMark mark) override {
    return mark >= never_ || !finished_ ? std::nullopt : std::optional(kFar + 10 * mark);
  }
  [[nodiscard]] std::int64_t error_ns() const override { return 7; }
  static constexpr std::int64_t kFar = std::int64_t{1} << 60;

 private:
  TraceMark room_, never_;
  std::atomic<TraceMark> next_{0};
  bool finished_ = false;
};

void span(Tracer& tracer, TraceSpan::Time time = TraceSpan::Time::kThread, LayerIndex layer = 0) {
  const TraceSpan recorded(tracer, tracer.session(), {.kind = TraceEvent::Kind::kFetch, .layer = layer}, time);
}

TEST(Tracer, RecordsNothingUntilItIsStarted) {
  Tracer tracer;
  EXPECT_EQ(tracer.session(), 0U);
  span(tracer);
  tracer.record(1, {});
  tracer.start(4, nullptr);
  EXPECT_TRUE(tracer.stop(kDeadline).events.empty());
  EXPECT_EQ(tracer.session(), 0U);
}

TEST(Tracer, KeepsTheOldestAndCountsTheRest) {
  Tracer tracer;
  tracer.start(3, nullptr);
  for (LayerIndex layer = 0; layer < 5; ++layer) span(tracer, TraceSpan::Time::kThread, layer);
  const Trace trace = tracer.stop(kDeadline);
  ASSERT_EQ(trace.events.size(), 3U);
  for (LayerIndex layer = 0; layer < 3; ++layer) EXPECT_EQ(trace.events[static_cast<std::size_t>(layer)].layer, layer);
  EXPECT_EQ(trace.dropped, 2U);
}

TEST(Tracer, RefusesASecondTraceAndNoRoom) {
  Tracer tracer;
  EXPECT_THROW(tracer.stop(kDeadline), Error);
  EXPECT_THROW(tracer.start(0, nullptr), Error);
  tracer.start(1, nullptr);
  EXPECT_THROW(tracer.start(1, nullptr), Error);
  tracer.stop(kDeadline);
}

TEST(Tracer, SpansOfAnEarlierTraceAreNotInTheNext) {
  Tracer tracer;
  tracer.start(4, nullptr);
  {
    const TraceSpan old(tracer, tracer.session(), {});
    tracer.stop(Milliseconds(20));
    tracer.start(4, nullptr);
  }
  EXPECT_TRUE(tracer.stop(kDeadline).events.empty());
}

TEST(Tracer, WaitsForOpenSpans) {
  Tracer tracer;
  tracer.start(4, nullptr);
  std::atomic<bool> open{false};
  std::thread service([&] {
    const TraceSpan serving(tracer, tracer.session(), {.layer = 7});
    open = true;
    std::this_thread::sleep_for(Milliseconds(30));
  });
  while (!open) std::this_thread::yield();
  const Trace trace = tracer.stop(kDeadline);
  service.join();
  ASSERT_EQ(trace.events.size(), 1U);
  EXPECT_EQ(trace.events[0].layer, 7);
  EXPECT_GE(trace.events[0].end - trace.events[0].begin, 20'000'000);
}

TEST(Tracer, TimesOfStreamsComeFromTheirClock) {
  Tracer tracer;
  tracer.start(16, std::make_unique<CountingClock>(7, 5));
  span(tracer, TraceSpan::Time::kThread);  // no mark
  span(tracer, TraceSpan::Time::kStream);  // marks 0 and 1
  span(tracer, TraceSpan::Time::kBoth);    // marks 2 and 3
  span(tracer, TraceSpan::Time::kStream);  // marks 4 and 5, which the stream does not get to
  span(tracer, TraceSpan::Time::kStream);  // mark 6, and none is left
  const Trace trace = tracer.stop(kDeadline);
  std::vector<std::int64_t> begins;
  for (const TraceEvent& event : trace.events)
    if (event.on_stream) begins.push_back(event.begin - CountingClock::kFar);
  EXPECT_THAT(begins, ::testing::ElementsAre(0, 20));
  EXPECT_EQ(trace.events.size(), 4U);
  EXPECT_EQ(trace.unfinished, 1U);
  EXPECT_EQ(trace.dropped, 1U);
  EXPECT_EQ(trace.stream_error_ns, 7);
}

TEST(Tracer, ThreadsRecordWhileTracesStartAndStop) {
  Tracer tracer;
  std::atomic<bool> over{false};
  std::atomic<std::uint64_t> made{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      while (!over) {
        span(tracer, TraceSpan::Time::kBoth, t);
        ++made;
      }
    });
  std::size_t seen = 0;
  for (int i = 0; i < 60; ++i) {
    tracer.start(64, i % 2 == 0 ? std::make_unique<CountingClock>(1 << 30, 1 << 30) : nullptr);
    const std::uint64_t so_far = made;
    while (made < so_far + 20) std::this_thread::yield();
    const Trace trace = tracer.stop(kDeadline);
    for (const TraceEvent& event : trace.events) EXPECT_LE(event.begin, event.end);
    EXPECT_LE(trace.events.size(), 64U);
    seen += trace.events.size();
  }
  over = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(seen, 60U * 10U);
}

class TracedGroups : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Modes, TracedGroups, ::testing::Values("was", "cas", "auto"));

void run_traced(RankGroup& group) {
  group.start_all();
  for (Rank rank = 0; rank < 2; ++rank) group.wait_for_mark(rank, "waiting");
  group.set_mark("stop");
  for (Rank rank = 0; rank < 2; ++rank)
    EXPECT_EQ(group.wait(rank), 0) << group.log(rank) << group.result(rank)["message"];
}

TEST_P(TracedGroups, TracesOnTheHostHold) {
  RankGroup group(2, {"mode=" + GetParam(), "steps=20", "resident=2", "slots=3", "linger=1", "trace=100000"});
  run_traced(group);
}

#ifdef SIDP_HAS_NVSHMEM
TEST_P(TracedGroups, TracesOfStreamsHold) {
  RankGroup group(2, {"backend=nvshmem", "max_rows=5", "mode=" + GetParam(), "steps=20", "resident=2", "slots=3",
                      "linger=1", "trace=100000"});
  run_traced(group);
}
#endif

}  // namespace
}  // namespace sidp::test
