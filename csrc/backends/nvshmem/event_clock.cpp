#include "event_clock.hpp"

#include <cmath>
#include <thread>

#include "sidp/error.hpp"

namespace sidp::nvshmem {

namespace {

constexpr int kAlignments = 20;  // the quickest is the most exact
constexpr Milliseconds kAlignDeadline{5000};
constexpr std::chrono::microseconds kNap{50};

}  // namespace

EventClock::Event::Event(const Device& device) : device_(device) {
  device.check(device.api().cuEventCreate(&event_, CU_EVENT_DEFAULT), "cuEventCreate");
}

EventClock::Event::~Event() {
  const ContextScope scope(device_);
  if (event_ != nullptr) device_.api().cuEventDestroy(event_);
}

EventClock::EventClock(std::shared_ptr<const Device> device, std::size_t num_marks) : device_(std::move(device)) {
  const ContextScope scope(*device_);
  events_.reserve(num_marks);
  while (events_.size() < num_marks) events_.push_back(std::make_unique<Event>(*device_));
  align();
}

// An event on an idle stream passes between its record and the query that first finds it passed.
void EventClock::align() {
  const DeviceStream stream(*device_, DeviceStream::Priority::kDefault);
  const auto give_up = Clock::now() + kAlignDeadline;
  for (int i = 0; i < kAlignments; ++i) {
    auto event = std::make_unique<Event>(*device_);
    const auto before = Clock::now();
    device_->check(device_->api().cuEventRecord(event->get(), stream.get()), "cuEventRecord");
    CUresult result = CUDA_ERROR_NOT_READY;
    while ((result = device_->api().cuEventQuery(event->get())) == CUDA_ERROR_NOT_READY)
      if (Clock::now() > give_up)
        throw Error(ErrorCode::kDeadline, "an event on an idle stream did not pass within " +
                                              std::to_string(kAlignDeadline.count()) +
                                              " ms: something holds the device, so no trace was started");
    const auto after = Clock::now();
    device_->check(result, "cuEventQuery");
    const std::int64_t error = (trace_ns(after) - trace_ns(before) + 1) / 2;
    if (anchor_ && error >= error_ns_) continue;
    anchor_ = std::move(event);
    anchor_ns_ = trace_ns(before) + error;
    error_ns_ = error;
  }
}

TraceMark EventClock::mark(Stream stream) noexcept {
  const std::size_t at = next_.fetch_add(1, std::memory_order_relaxed);
  if (at >= events_.size()) return kNoMark;
  const ContextScope scope(*device_);
  const CUresult result = device_->api().cuEventRecord(events_[at]->get(), static_cast<CUstream>(stream.handle));
  return result == CUDA_SUCCESS ? static_cast<TraceMark>(at) : kNoMark;
}

std::optional<std::int64_t> EventClock::ns(TraceMark mark, Clock::time_point deadline) {
  const ContextScope scope(*device_);
  const CUevent event = events_[static_cast<std::size_t>(mark)]->get();
  CUresult result = CUDA_SUCCESS;
  while (is_pending(result = device_->api().cuEventQuery(event)) && Clock::now() < deadline)
    std::this_thread::sleep_for(kNap);
  float ms = 0;
  if (result != CUDA_SUCCESS || device_->api().cuEventElapsedTime(&ms, anchor_->get(), event) != CUDA_SUCCESS)
    return std::nullopt;
  return anchor_ns_ + std::llround(static_cast<double>(ms) * 1e6);
}

}  // namespace sidp::nvshmem
