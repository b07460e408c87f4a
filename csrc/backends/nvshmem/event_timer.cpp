#include "event_timer.hpp"

namespace sidp::nvshmem {

EventTimer::EventTimer(std::shared_ptr<const Device> device) : device_(std::move(device)) {
  const ContextScope scope(*device_);
  pairs_.reserve(kUnderWay);
  while (pairs_.size() < kUnderWay)
    pairs_.push_back(
        {DeviceEvent(*device_, DeviceEvent::Kind::kTimed), DeviceEvent(*device_, DeviceEvent::Kind::kTimed)});
}

bool EventTimer::begin(Stream stream) noexcept {
  if (ended_ == kUnderWay) return false;
  const ContextScope scope(*device_);
  Pair& pair = pairs_[(oldest_ + ended_) % kUnderWay];
  pair.failed = device_->api().cuEventRecord(pair.start.get(), static_cast<CUstream>(stream.handle)) != CUDA_SUCCESS;
  return !pair.failed;
}

void EventTimer::end(Stream stream) noexcept {
  const ContextScope scope(*device_);
  Pair& pair = pairs_[(oldest_ + ended_) % kUnderWay];
  pair.failed = device_->api().cuEventRecord(pair.end.get(), static_cast<CUstream>(stream.handle)) != CUDA_SUCCESS;
  ++ended_;
}

std::optional<double> EventTimer::take() noexcept {
  if (ended_ == 0) return std::nullopt;
  const ContextScope scope(*device_);
  const Pair& pair = pairs_[oldest_];
  float ms = 0;
  if (!pair.failed) {
    if (is_pending(device_->api().cuEventQuery(pair.end.get()))) return std::nullopt;
    if (device_->api().cuEventElapsedTime(&ms, pair.start.get(), pair.end.get()) != CUDA_SUCCESS) ms = 0;
  }
  oldest_ = (oldest_ + 1) % kUnderWay;
  --ended_;
  return ms;
}

}  // namespace sidp::nvshmem
