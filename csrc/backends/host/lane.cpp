#include "lane.hpp"

#include <algorithm>

namespace sidp::host {

namespace {

constexpr ByteCount kChunk = ByteCount{16} << 20;                  // between two looks at the stop flag
constexpr Milliseconds kNoDeadline{std::chrono::hours(24 * 365)};  // a consumer may idle for as long as it likes

}  // namespace

HostLane::HostLane(Backend& backend, std::vector<LaneOp> program, const LaneOptions& options)
    : backend_(backend),
      program_(std::move(program)),
      options_(options),
      bytes_by_peer_(static_cast<std::size_t>(backend.world_size())) {
  thread_ = backend_.start_thread("sidp-lane", [this] { run(); });
}

HostLane::~HostLane() { stop(); }

bool HostLane::stop() noexcept {
  stop_.store(true);
  backend_.interrupt();
  if (thread_.joinable()) thread_.join();
  return true;
}

void HostLane::run() {
  while (!stop_.load()) {
    for (const LaneOp& op : program_) {
      if (stop_.load()) return;
      Tracer& tracer = backend_.tracer();
      const std::int64_t start = trace_ns(Clock::now());
      const auto record = [&](TraceEvent::Kind kind, std::atomic<std::uint64_t>& total) {
        const std::int64_t end = trace_ns(Clock::now());
        total.fetch_add(static_cast<std::uint64_t>(end - start), std::memory_order_relaxed);
        // The session of now: what was under way when the trace started belongs to it.
        if (const Tracer::Session session = tracer.session(); session != 0)
          tracer.record(session, {.kind = kind,
                                  .track = TraceEvent::Track::kLane,
                                  .layer = op.layer,
                                  .peer = op.peer,
                                  .bytes = op.bytes,
                                  .begin = start,
                                  .end = end});
      };
      switch (op.kind) {
        case LaneOp::Kind::kWait:
          if (backend_.wait({}, op.flag, op.value, {.deadline = kNoDeadline, .stop = &stop_}) != WaitResult::kReady)
            return;
          record(TraceEvent::Kind::kWaitEmpty, wait_ns_);
          break;
        case LaneOp::Kind::kCopy:
          if (options_.test_delay_us > 0)
            std::this_thread::sleep_for(std::chrono::microseconds(options_.test_delay_us));
          for (ByteCount done = 0; done < op.bytes && !stop_.load(); done += kChunk)
            backend_.copy({}, op.dst + done, op.src + done, std::min(kChunk, op.bytes - done));
          record(TraceEvent::Kind::kCopy, copy_ns_);
          bytes_by_peer_[static_cast<std::size_t>(op.peer)].fetch_add(op.bytes, std::memory_order_relaxed);
          copies_.fetch_add(1, std::memory_order_release);  // whoever sees it finds the rest
          break;
        case LaneOp::Kind::kGet:
          break;  // never asked for: every peer is mapped
        case LaneOp::Kind::kSignal:
          backend_.signal({}, {backend_.rank(), op.flag}, op.value);
          break;
      }
    }
  }
}

LaneStats HostLane::stats() const {
  LaneStats stats;
  stats.copies = copies_.load(std::memory_order_acquire);
  stats.copy_ns = copy_ns_.load(std::memory_order_relaxed);
  stats.wait_ns = wait_ns_.load(std::memory_order_relaxed);
  for (const auto& bytes : bytes_by_peer_) stats.bytes_by_peer.push_back(bytes.load(std::memory_order_relaxed));
  return stats;
}

}  // namespace sidp::host
