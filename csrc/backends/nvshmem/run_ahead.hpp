// How far an engine's thread may queue work behind a request that has no answer yet: see csrc/DESIGN.md, "Launch
// queues".
#pragma once

#include <atomic>
#include <deque>

#include "device.hpp"

namespace sidp::nvshmem {

class RunAhead {
 public:
  // Layers that may be queued behind the oldest unanswered request. The driver takes about 1000 launches, a layer that
  // is launched kernel by kernel makes 15 to 60.
  static constexpr std::uint64_t kLayers = 4;

  // word: of `host`, where the answer to a request publishes number().
  RunAhead(const HostWords& host, std::size_t word, Milliseconds deadline)
      : host_(host), word_(word), deadline_(deadline) {}

  // Before anything of a layer is queued. Waits, for the deadline at most: what is wrong then others say.
  void begin_layer();
  // Of the layer that was begun last; numbers grow.
  [[nodiscard]] std::uint64_t number() const { return layer_; }
  // A request of that layer has been queued, with all that its answer needs on this rank.
  void requested() { unanswered_.push_back(layer_); }
  // Waits, likewise, until no request is unanswered.
  void settle();
  // Runs what waits for answers in another way.
  template <typename Wait>
  void time(const Wait& wait) {
    const auto start = Clock::now();
    wait();
    count(Clock::now() - start);
  }
  [[nodiscard]] std::uint64_t waited_ns() const { return waited_ns_.load(std::memory_order_relaxed); }

 private:
  void wait_for(std::uint64_t number);
  void count(Clock::duration waited);

  const HostWords& host_;
  std::size_t word_;
  Milliseconds deadline_;
  std::uint64_t layer_ = 0;
  std::deque<std::uint64_t> unanswered_;     // or answered since it was looked at last
  std::atomic<std::uint64_t> waited_ns_{0};  // others may ask
};

}  // namespace sidp::nvshmem
