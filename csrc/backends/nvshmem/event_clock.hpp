// When streams of one GPU got to points of theirs, by CUDA events, in the time of the host's clock.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "device.hpp"
#include "sidp/trace.hpp"

namespace sidp::nvshmem {

// The two clocks are compared at the start and at the end, and times in between lie on the line through both: a
// device's clock drifts by about a microsecond a second.
class EventClock final : public StreamClock {
 public:
  // Makes all events here. Creates a stream too, so no stream may be blocked. Throws Error(kDevice), Error(kDeadline).
  EventClock(std::shared_ptr<const Device> device, std::size_t num_marks);

  TraceMark mark(Stream stream) noexcept override;
  void wait(TraceMark mark, Clock::time_point deadline) noexcept override;
  // Where the device does not come to it, the drift stays in the times and its bound in error_ns().
  void finish(Clock::time_point deadline) noexcept override;
  std::optional<std::int64_t> ns(TraceMark mark) override;
  [[nodiscard]] std::int64_t error_ns() const override { return error_ns_; }

 private:
  struct Anchor {  // passed at ns of the host's clock, give or take error_ns
    DeviceEvent event;
    std::int64_t ns;
    std::int64_t error_ns;
  };
  // Empty at the deadline. Throws Error(kDevice).
  [[nodiscard]] std::optional<Anchor> align(Clock::time_point deadline) const;
  // Milliseconds of the device from the first anchor to an event that has passed.
  [[nodiscard]] std::optional<float> elapsed_ms(const DeviceEvent& event) const;

  std::shared_ptr<const Device> device_;
  DeviceStream idle_;
  std::vector<DeviceEvent> events_;
  std::atomic<std::size_t> next_{0};
  std::optional<Anchor> first_;
  double ns_per_ms_ = 1e6;  // of the host's clock a millisecond of the device's
  std::int64_t error_ns_ = 0;
};

}  // namespace sidp::nvshmem
