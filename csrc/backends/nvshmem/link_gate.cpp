#include "link_gate.hpp"

#include "spin_or_nap.hpp"

namespace sidp::nvshmem {

namespace {

constexpr std::chrono::seconds kLongIdle{1};

}  // namespace

LinkGate::LinkGate(const std::shared_ptr<const Device>& device, LinkQueue queue, std::vector<Rank> owners,
                   std::shared_ptr<const bool> kept)
    : device_(*device),
      queue_(std::move(queue)),
      owners_(std::move(owners)),
      words_(device, static_cast<std::size_t>(Word::kNumWords), std::move(kept)),
      thread_([this] {
        name_and_sharpen("sidp-links");
        run();
      }) {}

void LinkGate::enter(CUstream stream, std::uint32_t number) const {
  write(stream, Word::kAsks, number);
  device_.check(device_.api().cuStreamWaitValue32(stream, words_.on_device(static_cast<std::size_t>(Word::kMayEnter)),
                                                  number, CU_STREAM_WAIT_VALUE_GEQ),
                "cuStreamWaitValue32");
}

void LinkGate::leave(CUstream stream, std::uint32_t number) const { write(stream, Word::kLeft, number); }

void LinkGate::write(CUstream stream, Word word, std::uint32_t number) const {
  device_.check(device_.api().cuStreamWriteValue32(stream, words_.on_device(static_cast<std::size_t>(word)), number, 0),
                "cuStreamWriteValue32");
}

bool LinkGate::reached(Word word, std::uint32_t number) const {  // as cuStreamWaitValue32 compares
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(words_.load(static_cast<std::size_t>(word))) - number) >=
         0;
}

void LinkGate::run() {
  enum class State : std::uint8_t { kIdle, kAsks, kHolds } state = State::kIdle;
  std::uint32_t number = 1;
  std::size_t copy = 0;
  auto since = Clock::now();
  Clock::duration hold{0};  // the last one
  while (!stop_.load(std::memory_order_relaxed)) {
    const auto now = Clock::now();
    if (state == State::kIdle && reached(Word::kAsks, number)) {
      queue_.ask(owners_[copy]);
      state = State::kAsks;
      since = now;
    }
    if (state == State::kAsks && queue_.granted()) {
      words_.store(static_cast<std::size_t>(Word::kMayEnter), number);
      state = State::kHolds;
      const std::chrono::nanoseconds waited = Clock::now() - since;
      waited_ns_.fetch_add(static_cast<std::uint64_t>(waited.count()), std::memory_order_relaxed);
      taken_.store(queue_.taken(), std::memory_order_relaxed);
      since = now;
    }
    if (state == State::kHolds && reached(Word::kLeft, number)) {
      queue_.leave();
      state = State::kIdle;
      hold = now - since;
      ++number;
      copy = (copy + 1) % owners_.size();
      since = now;
      continue;  // the next copy has often asked already
    }
    if (state == State::kIdle && now - since > kLongIdle)
      std::this_thread::sleep_for(10 * kNap);
    else if (state == State::kHolds && now - since + 5 * kNap < hold)  // the copy takes about as long as the last one
      std::this_thread::sleep_for(kNap);
    else
      spin_or_nap(now - since);
  }
  queue_.leave();
}

void LinkGate::stop() noexcept {
  if (!thread_.joinable()) return;
  stop_.store(true);
  thread_.join();
  const std::uint64_t far_ahead = (words_.load(static_cast<std::size_t>(Word::kMayEnter)) + (1U << 30)) & 0xFFFFFFFF;
  words_.store(static_cast<std::size_t>(Word::kMayEnter), far_ahead);
}

}  // namespace sidp::nvshmem
