// Prefetcher: WaS. A lane keeps the ring full in the fixed order of the layers; the consumer takes and returns slots.
// One consumer thread.
#pragma once

#include <memory>
#include <vector>

#include "sidp/weight_pool.hpp"

namespace sidp {

struct PrefetcherStats {
  std::uint64_t fetches = 0;    // streamed layers fetched
  std::uint64_t ring_hits = 0;  // of those, full when asked for (where the host can tell)
  std::uint64_t wait_ns = 0;    // time blocked on full slots
  std::uint64_t drained = 0;    // layers consumed unread to end a broken-off step
  LaneStats lane;
};

class Prefetcher {
 public:
  // Starts the lane: the head of the first step streams at once. The pool must be published.
  Prefetcher(WeightPool& pool, Milliseconds deadline, const LaneOptions& lane_options);
  ~Prefetcher();
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;

  // captured: the calls of this step go into a graph and nothing happens now; forget_step() ends it.
  void begin_step(bool captured = false);
  // The step was one launch, queued by now, of a graph that fetches and releases every streamed layer.
  void replayed_step();
  void forget_step();
  // The layer's bytes in the ring, valid until release(). Layers come in the order of the pool and each once a step:
  // Error(kUsage) otherwise, and Error(kUsage) instead of a deadlock if the layer that holds the slot was not released.
  // Throws Error(kDeadline) when the lane does not fill the slot in time.
  const std::byte* fetch(Stream stream, LayerIndex layer);
  // After the last use of the bytes on `stream`.
  void release(Stream stream, LayerIndex layer);
  // True if every streamed layer was fetched and released.
  [[nodiscard]] bool step_complete() const;
  // Releases what is held and consumes what is left unread, so that the lane's order holds for the next step.
  void drain_step(Stream stream);

  bool stop() noexcept;  // see Lane
  [[nodiscard]] PrefetcherStats stats() const;

 private:
  struct Use {
    RingEntry entry;
    bool held = false;
  };
  Use* find(LayerIndex layer);
  void empty_slot(Stream stream, const RingEntry& entry);
  void wait_full(Stream stream, const RingEntry& entry);

  WeightPool& pool_;
  Milliseconds deadline_;
  std::vector<Use> uses_;                // in order of use
  std::vector<LayerIndex> slot_holder_;  // layer held by the consumer, or -1
  bool captured_ = false;
  std::size_t next_ = 0;  // position of the next fetch in this step
  PrefetcherStats stats_;
  std::unique_ptr<Lane> lane_;
};

}  // namespace sidp
