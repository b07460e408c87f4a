// A trace of what a rank did: spans of fixed size in memory that is taken when the trace starts. Any thread records;
// nothing blocks. While no trace runs a span costs one relaxed load.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "sidp/mode_policy.hpp"
#include "sidp/types.hpp"

namespace sidp {

struct TraceEvent {
  enum class Kind : std::uint8_t {
    kStep,       // rows: tokens
    kFetch,      // the call, with what it waits for
    kWaitFull,   // the consumer, for a slot
    kUse,        // from fetch to release: the engine computes
    kRelease,    // the call
    kRequest,    // remote_compute, there and back; rows, bytes sent
    kWaitReply,  // of that, blocked on the reply
    kStandIn,    // an op that ran here because its owner no longer answers
    kWaitEmpty,  // the lane, for a slot
    kWaitLink,   // the lane, for an owner's link
    kCopy,       // bytes
    kQueueCopy,  // a stream-ordered lane's calls for one copy; the copy itself is on the lane's stream
    kService,    // a peer's request at its owner; rows
    kOp,         // of that, the op itself
  };
  enum class Track : std::uint8_t { kEngine, kLane, kService };

  Kind kind = Kind::kStep;
  Track track = Track::kEngine;
  bool on_stream = false;             // times of the device; otherwise of the calling thread
  bool broken_off = false;            // kStep
  Mode mode = Mode::kWas;             // kStep
  Reason reason = Reason::kAllLocal;  // kStep
  LayerIndex layer = -1;
  OpIndex op = -1;
  Rank peer = -1;  // owner or requester
  std::int64_t rows = 0;
  ByteCount bytes = 0;
  std::int64_t begin = 0;  // nanoseconds of Clock, which all processes of a host share
  std::int64_t end = 0;
};

std::string_view to_string(TraceEvent::Kind kind);
std::string_view to_string(TraceEvent::Track track);

// A point of a stream, or below 0 for none.
using TraceMark = std::int64_t;
inline constexpr TraceMark kNoStream = -1;  // the calling thread is the stream
inline constexpr TraceMark kNoMark = -2;    // there are no more, or the stream took none

// When streams got to points of theirs, on a backend whose calls only enqueue. mark() may be called by any thread.
class StreamClock {
 public:
  virtual ~StreamClock() = default;
  // Enqueues a mark, or kNoMark. Not while the stream is being captured.
  virtual TraceMark mark(Stream stream) noexcept = 0;
  // Until the stream got there, or the deadline.
  virtual void wait(TraceMark mark, Clock::time_point deadline) noexcept = 0;
  // Compares the clocks once more: what ns() tells afterwards lies between two comparisons. Once, after the last mark.
  virtual void finish(Clock::time_point deadline) noexcept = 0;
  // When the stream got there, in nanoseconds of Clock; empty if it did not, or on an error.
  virtual std::optional<std::int64_t> ns(TraceMark mark) = 0;
  // By how much these times can be off, in nanoseconds.
  [[nodiscard]] virtual std::int64_t error_ns() const = 0;
};

struct Trace {
  std::vector<TraceEvent> events;
  std::uint64_t dropped = 0;         // for want of room, the newest
  std::uint64_t unfinished = 0;      // whose stream had not got to the end of them
  std::int64_t stream_error_ns = 0;  // see StreamClock
};

class Tracer {
 public:
  using Session = std::uint32_t;  // 0: no trace runs

  // One after the other, by one thread. Takes memory for num_events; nothing begins before now. Throws Error(kUsage)
  // when a trace runs, Error(kConfig) for no room, std::bad_alloc.
  void start(std::size_t num_events, std::unique_ptr<StreamClock> clock);
  // Ends the trace: no span begins any more, and those that are open and their streams have until the deadline. Throws
  // Error(kUsage) when none runs.
  Trace stop(Milliseconds deadline);

  [[nodiscard]] Session session() const noexcept { return session_.load(std::memory_order_relaxed); }
  // All do nothing once the session is over.
  void record(Session session, const TraceEvent& event) noexcept;
  TraceMark mark(Session session, Stream stream) noexcept;
  void drop(Session session) noexcept;  // counts an event that had no mark

 private:
  // Keeps stop() waiting while a thread works in the session; false if that is over.
  class Entry;

  friend class TraceSpan;

  std::atomic<Session> session_{0};
  std::atomic<Session> accepted_{0};  // outlives session_ until open spans are recorded
  Session sessions_ = 0;
  std::atomic<std::uint32_t> entered_{0};  // threads in record() or mark()
  std::atomic<std::uint32_t> open_{0};     // spans
  std::atomic<std::size_t> next_{0};
  std::atomic<std::uint64_t> without_mark_{0};
  std::vector<TraceEvent> events_;
  std::int64_t started_ns_ = 0;
  std::unique_ptr<StreamClock> clock_;
};

inline std::int64_t trace_ns(Clock::time_point time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
}

// One event: from here to the end of the scope, or close().
class TraceSpan {
 public:
  // Whose times: the calling thread's, those of the stream that it enqueues on, or both. Where calls do not outlast
  // themselves the thread is the stream.
  enum class Time : std::uint8_t { kThread, kStream, kBoth };

  // event: all but its times. session 0: records nothing.
  TraceSpan(Tracer& tracer, Tracer::Session session, const TraceEvent& event, Time time = Time::kThread,
            Stream stream = {}) noexcept
      : session_(session) {
    if (session_ != 0) open(tracer, event, time, stream);
  }
  ~TraceSpan() { close(); }
  TraceSpan(const TraceSpan&) = delete;
  TraceSpan& operator=(const TraceSpan&) = delete;

  [[nodiscard]] bool recorded() const noexcept { return session_ != 0; }
  void set_broken_off(bool broken_off) noexcept {
    if (session_ != 0) event_.broken_off = broken_off;
  }
  void close() noexcept {
    if (session_ != 0) record();
  }

 private:
  void open(Tracer& tracer, const TraceEvent& event, Time time, Stream stream) noexcept;
  void record() noexcept;

  // Set by open() only, so that a span that records nothing costs nothing.
  Tracer::Session session_;
  Time time_;
  Tracer* tracer_;
  Stream stream_;
  TraceMark begin_mark_;
  union {
    TraceEvent event_;
  };
};

}  // namespace sidp
