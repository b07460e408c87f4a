#include "lane.hpp"

#include <algorithm>

namespace sidp::host {

namespace {

constexpr ByteCount kChunk = ByteCount{16} << 20;                  // between two looks at the stop flag
constexpr Milliseconds kNoDeadline{std::chrono::hours(24 * 365)};  // a consumer may idle for as long as it likes

std::uint64_t ns_since(Clock::time_point start) {
  return static_cast<std::uint64_t>(std::chrono::nanoseconds(Clock::now() - start).count());
}

}  // namespace

HostLane::HostLane(Backend& backend, std::vector<LaneOp> program, const LaneOptions& options)
    : backend_(backend),
      program_(std::move(program)),
      options_(options),
      bytes_by_peer_(static_cast<std::size_t>(backend.world_size())) {
  thread_ = backend_.start_thread("sidp-lane", [this] { run(); });
}

HostLane::~HostLane() { stop(); }

void HostLane::stop() noexcept {
  stop_.store(true);
  backend_.interrupt();
  if (thread_.joinable()) thread_.join();
}

void HostLane::run() {
  while (!stop_.load()) {
    for (const LaneOp& op : program_) {
      if (stop_.load()) return;
      const auto start = Clock::now();
      switch (op.kind) {
        case LaneOp::Kind::kWait:
          if (backend_.wait({}, op.flag, op.value, {.deadline = kNoDeadline, .stop = &stop_}) != WaitResult::kReady)
            return;
          wait_ns_.fetch_add(ns_since(start), std::memory_order_relaxed);
          break;
        case LaneOp::Kind::kCopy:
          if (options_.test_delay_us > 0)
            std::this_thread::sleep_for(std::chrono::microseconds(options_.test_delay_us));
          for (ByteCount done = 0; done < op.bytes && !stop_.load(); done += kChunk)
            backend_.copy({}, op.dst + done, op.src + done, std::min(kChunk, op.bytes - done));
          copies_.fetch_add(1, std::memory_order_relaxed);
          bytes_by_peer_[static_cast<std::size_t>(op.peer)].fetch_add(op.bytes, std::memory_order_relaxed);
          copy_ns_.fetch_add(ns_since(start), std::memory_order_relaxed);
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
  stats.copies = copies_.load(std::memory_order_relaxed);
  stats.copy_ns = copy_ns_.load(std::memory_order_relaxed);
  stats.wait_ns = wait_ns_.load(std::memory_order_relaxed);
  for (const auto& bytes : bytes_by_peer_) stats.bytes_by_peer.push_back(bytes.load(std::memory_order_relaxed));
  return stats;
}

}  // namespace sidp::host
