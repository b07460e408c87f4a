// A lane of the host backend: one thread that runs its program over and over.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "sidp/backend.hpp"

namespace sidp::host {

class HostLane final : public Lane {
 public:
  HostLane(Backend& backend, std::vector<LaneOp> program, const LaneOptions& options);
  ~HostLane() override;
  HostLane(const HostLane&) = delete;
  HostLane& operator=(const HostLane&) = delete;

  bool stop() noexcept override;
  [[nodiscard]] LaneStats stats() const override;

 private:
  void run();

  Backend& backend_;
  std::vector<LaneOp> program_;
  LaneOptions options_;
  std::atomic<bool> stop_{false};
  std::atomic<std::uint64_t> copies_{0};
  std::atomic<std::uint64_t> copy_ns_{0};
  std::atomic<std::uint64_t> wait_ns_{0};
  std::vector<std::atomic<ByteCount>> bytes_by_peer_;
  std::thread thread_;
};

}  // namespace sidp::host
