#include "event_clock.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <thread>

#include "sidp/error.hpp"

namespace sidp::nvshmem {

namespace {

constexpr int kAlignments = 20;  // the quickest is the most exact
constexpr Milliseconds kAlignDeadline{5000};
constexpr Milliseconds kLeastAtEnd{100};  // for the second comparison, where the streams have used up the deadline
constexpr double kMostDrift = 1e-5;       // ten times what was seen
constexpr std::chrono::microseconds kPause{50};

}  // namespace

EventClock::EventClock(std::shared_ptr<const Device> device, std::size_t num_marks)
    : device_(std::move(device)), idle_(*device_, DeviceStream::Priority::kDefault) {
  const ContextScope scope(*device_);
  events_.reserve(num_marks);
  while (events_.size() < num_marks) events_.emplace_back(*device_, DeviceEvent::Kind::kTimed);
  if (auto anchor = align(Clock::now() + kAlignDeadline)) first_.emplace(std::move(*anchor));
  if (!first_)
    throw Error(ErrorCode::kDeadline, "an event on an idle stream did not pass within " +
                                          std::to_string(kAlignDeadline.count()) +
                                          " ms: something holds the device, so no trace was started");
  error_ns_ = first_->error_ns;
}

// An event on an idle stream passes between its record and the query that first finds it passed.
std::optional<EventClock::Anchor> EventClock::align(Clock::time_point deadline) const {
  std::optional<Anchor> best;
  for (int i = 0; i < kAlignments; ++i) {
    DeviceEvent event(*device_, DeviceEvent::Kind::kTimed);
    const auto before = Clock::now();
    device_->check(device_->api().cuEventRecord(event.get(), idle_.get()), "cuEventRecord");
    CUresult result = CUDA_ERROR_NOT_READY;
    while (is_pending(result = device_->api().cuEventQuery(event.get())))
      if (Clock::now() > deadline) return best;
    const auto after = Clock::now();
    device_->check(result, "cuEventQuery");
    const std::int64_t error = (trace_ns(after) - trace_ns(before) + 1) / 2;
    if (!best || error < best->error_ns) best.emplace(Anchor{std::move(event), trace_ns(before) + error, error});
  }
  return best;
}

TraceMark EventClock::mark(Stream stream) noexcept {
  const std::size_t at = next_.fetch_add(1, std::memory_order_relaxed);
  if (at >= events_.size()) return kNoMark;
  const ContextScope scope(*device_);
  const CUresult result = device_->api().cuEventRecord(events_[at].get(), static_cast<CUstream>(stream.handle));
  return result == CUDA_SUCCESS ? static_cast<TraceMark>(at) : kNoMark;
}

void EventClock::wait(TraceMark mark, Clock::time_point deadline) noexcept {
  const ContextScope scope(*device_);
  const CUevent event = events_[static_cast<std::size_t>(mark)].get();
  while (is_pending(device_->api().cuEventQuery(event)) && Clock::now() < deadline) std::this_thread::sleep_for(kPause);
}

void EventClock::finish(Clock::time_point deadline) noexcept {
  const ContextScope scope(*device_);
  try {
    const auto last = align(std::max(deadline, Clock::now() + kLeastAtEnd));
    if (const auto ms = last ? elapsed_ms(last->event) : std::nullopt; ms && *ms > 0) {
      ns_per_ms_ = static_cast<double>(last->ns - first_->ns) / static_cast<double>(*ms);
      const float step_ms = std::nextafter(*ms, std::numeric_limits<float>::infinity()) - *ms;
      error_ns_ = std::max(first_->error_ns, last->error_ns) + std::llround(static_cast<double>(step_ms) * 1e6);
      return;
    }
  } catch (const Error&) {  // the device's; ns() says of each mark whether it can be told
  }
  error_ns_ += std::llround(static_cast<double>(trace_ns(Clock::now()) - first_->ns) * kMostDrift);
}

std::optional<float> EventClock::elapsed_ms(const DeviceEvent& event) const {
  float ms = 0;
  if (device_->api().cuEventElapsedTime(&ms, first_->event.get(), event.get()) != CUDA_SUCCESS) return std::nullopt;
  return ms;
}

std::optional<std::int64_t> EventClock::ns(TraceMark mark) {
  const ContextScope scope(*device_);
  const auto ms = elapsed_ms(events_[static_cast<std::size_t>(mark)]);
  if (!ms) return std::nullopt;
  return first_->ns + std::llround(static_cast<double>(*ms) * ns_per_ms_);
}

}  // namespace sidp::nvshmem
