#include "sidp/trace.hpp"

#include <algorithm>
#include <new>
#include <string>
#include <thread>

#include "sidp/error.hpp"

namespace sidp {

std::string_view to_string(TraceEvent::Kind kind) {
  constexpr std::string_view kNames[] = {"step",    "fetch",      "wait_full", "use",        "release",
                                         "request", "wait_reply", "stand_in",  "wait_empty", "wait_link",
                                         "copy",    "queue_copy", "service",   "op"};
  return kNames[static_cast<std::size_t>(kind)];
}

std::string_view to_string(TraceEvent::Track track) {
  constexpr std::string_view kNames[] = {"engine", "lane", "service"};
  return kNames[static_cast<std::size_t>(track)];
}

// A thread counts itself and then looks at the session; stop() ends it and then looks at the count. Both are
// sequentially consistent, so one of them sees the other.
class Tracer::Entry {
 public:
  Entry(Tracer& tracer, Session session) noexcept : tracer_(tracer) {
    tracer_.entered_.fetch_add(1);
    valid_ = session != 0 && tracer_.accepted_.load() == session;
  }
  ~Entry() { tracer_.entered_.fetch_sub(1); }
  Entry(const Entry&) = delete;
  Entry& operator=(const Entry&) = delete;
  explicit operator bool() const noexcept { return valid_; }

 private:
  Tracer& tracer_;
  bool valid_;
};

void Tracer::start(std::size_t num_events, std::unique_ptr<StreamClock> clock) {
  if (session() != 0) throw Error(ErrorCode::kUsage, "a trace runs already; stop it before the next one");
  if (num_events == 0) throw Error(ErrorCode::kConfig, "a trace needs room for at least one event");
  events_.assign(num_events, TraceEvent{});
  clock_ = std::move(clock);
  next_.store(0);
  without_mark_.store(0);
  started_ns_ = trace_ns(Clock::now());
  sessions_ = std::max<Session>(sessions_ + 1, 1);  // never 0
  accepted_.store(sessions_);
  session_.store(sessions_);
}

Trace Tracer::stop(Milliseconds deadline) {
  if (session() == 0) throw Error(ErrorCode::kUsage, "no trace runs");
  const auto until = Clock::now() + deadline;
  session_.store(0);
  while (open_.load() != 0 && Clock::now() < until) std::this_thread::sleep_for(std::chrono::microseconds(50));
  accepted_.store(0);
  while (entered_.load() != 0) std::this_thread::yield();
  Trace trace;
  const std::size_t recorded = next_.load();
  trace.dropped = recorded - std::min(recorded, events_.size()) + without_mark_.load();
  events_.resize(std::min(recorded, events_.size()));
  for (const TraceEvent& event : events_) {
    if (!event.on_stream) continue;  // else its times are marks so far
    clock_->wait(event.begin, until);
    clock_->wait(event.end, until);
  }
  if (clock_) clock_->finish(until);
  for (TraceEvent& event : events_) {
    if (event.on_stream) {
      const auto begin = clock_->ns(event.begin);
      const auto end = clock_->ns(event.end);
      if (!begin || !end) {
        ++trace.unfinished;
        continue;
      }
      event.begin = *begin;
      event.end = *end;
    }
    event.begin = std::max(event.begin, started_ns_);  // a lane may have waited since long before
    trace.events.push_back(event);
  }
  if (clock_) trace.stream_error_ns = clock_->error_ns();
  clock_.reset();
  events_ = {};
  return trace;
}

void Tracer::record(Session session, const TraceEvent& event) noexcept {
  const Entry entry(*this, session);
  if (!entry) return;
  const std::size_t at = next_.fetch_add(1, std::memory_order_relaxed);
  if (at < events_.size()) events_[at] = event;
}

TraceMark Tracer::mark(Session session, Stream stream) noexcept {
  const Entry entry(*this, session);
  if (!entry) return kNoMark;
  return clock_ ? clock_->mark(stream) : kNoStream;
}

void Tracer::drop(Session session) noexcept {
  const Entry entry(*this, session);
  if (entry) without_mark_.fetch_add(1, std::memory_order_relaxed);
}

void TraceSpan::open(Tracer& tracer, const TraceEvent& event, Time time, Stream stream) noexcept {
  tracer.open_.fetch_add(1);
  time_ = time;
  tracer_ = &tracer;
  stream_ = stream;
  ::new (&event_) TraceEvent(event);
  event_.begin = trace_ns(Clock::now());
  begin_mark_ = time == Time::kThread ? kNoStream : tracer.mark(session_, stream);
}

void TraceSpan::record() noexcept {
  const TraceMark end_mark = begin_mark_ < 0 ? begin_mark_ : tracer_->mark(session_, stream_);
  if (time_ != Time::kStream || end_mark == kNoStream) {
    event_.end = trace_ns(Clock::now());
    tracer_->record(session_, event_);
  }
  if (end_mark == kNoMark) tracer_->drop(session_);
  if (end_mark >= 0) {
    event_.on_stream = true;
    event_.begin = begin_mark_;
    event_.end = end_mark;
    tracer_->record(session_, event_);
  }
  session_ = 0;
  tracer_->open_.fetch_sub(1);
}

}  // namespace sidp
