// When streams of one GPU got to points of theirs, by CUDA events, in the time of the host's clock.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "device.hpp"
#include "sidp/trace.hpp"

namespace sidp::nvshmem {

class EventClock final : public StreamClock {
 public:
  // Makes all events here. Creates a stream too, so no stream may be blocked. Throws Error(kDevice), Error(kDeadline).
  EventClock(std::shared_ptr<const Device> device, std::size_t num_marks);

  TraceMark mark(Stream stream) noexcept override;
  std::optional<std::int64_t> ns(TraceMark mark, Clock::time_point deadline) override;
  [[nodiscard]] std::int64_t error_ns() const override { return error_ns_; }

 private:
  // With times, unlike those that only order.
  class Event {
   public:
    explicit Event(const Device& device);
    ~Event();
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    [[nodiscard]] CUevent get() const { return event_; }

   private:
    const Device& device_;
    CUevent event_ = nullptr;
  };

  void align();

  std::shared_ptr<const Device> device_;
  std::vector<std::unique_ptr<Event>> events_;
  std::atomic<std::size_t> next_{0};
  std::unique_ptr<Event> anchor_;  // passed at anchor_ns_ of the host's clock, give or take error_ns_
  std::int64_t anchor_ns_ = 0;
  std::int64_t error_ns_ = 0;
};

}  // namespace sidp::nvshmem
