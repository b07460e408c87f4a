#include "run_ahead.hpp"

#include "spin_or_nap.hpp"

namespace sidp::nvshmem {

void RunAhead::begin_layer() {
  ++layer_;
  std::uint64_t due = 0;
  for (; !unanswered_.empty() && unanswered_.front() + kLayers <= layer_; unanswered_.pop_front())
    due = unanswered_.front();
  wait_for(due);
}

void RunAhead::settle() {
  if (unanswered_.empty()) return;
  wait_for(unanswered_.back());
  unanswered_.clear();
}

void RunAhead::wait_for(std::uint64_t number) {
  if (host_.load(word_) >= number) return;
  const auto start = Clock::now();
  auto now = start;
  for (; host_.load(word_) < number && now - start < deadline_; now = Clock::now()) spin_or_nap(now - start);
  count(now - start);
  if (host_.load(word_) < number) unanswered_.clear();  // or each layer to come would wait as long
}

void RunAhead::count(Clock::duration waited) {
  waited_ns_.fetch_add(static_cast<std::uint64_t>(std::chrono::nanoseconds(waited).count()), std::memory_order_relaxed);
}

}  // namespace sidp::nvshmem
