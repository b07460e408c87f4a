#include "sidp/prefetcher.hpp"

#include <algorithm>
#include <string>

#include "sidp/error.hpp"

namespace sidp {

Prefetcher::Prefetcher(WeightPool& pool, Milliseconds deadline, const LaneOptions& lane_options)
    : pool_(pool), deadline_(deadline) {
  if (!pool.published())
    throw Error(ErrorCode::kUsage, "the pool is not published; load the layers and call publish() first");
  const Placement& placement = pool.placement();
  std::vector<LaneOp> program;
  for (const RingEntry& entry : placement.ring_plan(pool.backend().rank())) {
    uses_.push_back({entry});
    const std::uint32_t flag = pool.slot_flag(entry.slot);
    const std::byte* mapped = pool.peer_layer(entry.layer);
    program.push_back({.kind = LaneOp::Kind::kWait, .flag = flag, .value = kEmpty, .layer = entry.layer});
    program.push_back({.kind = mapped != nullptr ? LaneOp::Kind::kCopy : LaneOp::Kind::kGet,
                       .peer = placement.owner(entry.layer),
                       .layer = entry.layer,
                       .dst = pool.ring() + entry.offset,
                       .src = mapped != nullptr ? mapped : pool.symmetric_layer(entry.layer),
                       .bytes = entry.bytes});
    // A flag of its own after the payload: never in one batch with it, which would leave them unordered.
    program.push_back({.kind = LaneOp::Kind::kSignal, .flag = flag, .value = kFull});
  }
  slot_holder_.assign(static_cast<std::size_t>(placement.num_slots(pool.backend().rank())), -1);
  if (!program.empty()) lane_ = pool.backend().make_lane(std::move(program), lane_options);
}

Prefetcher::~Prefetcher() { stop(); }

bool Prefetcher::stop() noexcept { return !lane_ || lane_->stop(); }

void Prefetcher::begin_step(bool captured) {
  next_ = 0;
  captured_ = captured;
}

void Prefetcher::replayed_step() {
  next_ = uses_.size();
  stats_.fetches += uses_.size();
  for (const Use& use : uses_) lane_->used_by_graph(pool_.slot_flag(use.entry.slot));
}

void Prefetcher::forget_step() {
  captured_ = false;
  stats_.fetches -= next_;
  for (Use& use : uses_) use.held = false;
  std::fill(slot_holder_.begin(), slot_holder_.end(), -1);
}

void Prefetcher::empty_slot(Stream stream, const RingEntry& entry) {
  const std::uint32_t flag = pool_.slot_flag(entry.slot);
  if (captured_ || !lane_->set_empty(stream, flag))
    pool_.backend().signal(stream, {pool_.backend().rank(), flag}, kEmpty);
}

Prefetcher::Use* Prefetcher::find(LayerIndex layer) {
  const auto it = std::find_if(uses_.begin(), uses_.end(), [&](const Use& use) { return use.entry.layer == layer; });
  return it == uses_.end() ? nullptr : &*it;
}

void Prefetcher::wait_full(Stream stream, const RingEntry& entry) {
  Backend& backend = pool_.backend();
  const std::uint32_t flag = pool_.slot_flag(entry.slot);
  ++stats_.fetches;
  if (backend.peek(flag) == kFull) ++stats_.ring_hits;
  TraceSpan span(backend.tracer(), captured_ ? 0 : backend.tracer().session(),
                 {.kind = TraceEvent::Kind::kWaitFull, .layer = entry.layer}, TraceSpan::Time::kStream, stream);
  const auto start = Clock::now();
  const WaitResult result = !captured_ && lane_->wait_full(stream, flag)
                                ? WaitResult::kReady
                                : backend.wait(stream, flag, kFull, {.deadline = deadline_});
  const auto waited = Clock::now() - start;
  stats_.wait_ns += static_cast<std::uint64_t>(std::chrono::nanoseconds(waited).count());
  span.close();
  if (result == WaitResult::kReady) return;
  const auto waited_ms = std::chrono::duration_cast<Milliseconds>(waited).count();
  const Rank owner = pool_.placement().owner(entry.layer);
  throw Error(ErrorCode::kDeadline,
              "rank " + std::to_string(backend.rank()) + " waited " + std::to_string(waited_ms) + " ms for layer " +
                  std::to_string(entry.layer) + " (" + std::to_string(entry.bytes) + " bytes) of rank " +
                  std::to_string(owner) + ": slot " + std::to_string(entry.slot) +
                  " is still empty; raise the deadline or look at what holds the copies up",
              {.rank = backend.rank(),
               .peer = owner,
               .layer = entry.layer,
               .num_bytes = static_cast<std::int64_t>(entry.bytes),
               .waited_ms = waited_ms,
               .expected = kFull,
               .seen = kEmpty});
}

const std::byte* Prefetcher::fetch(Stream stream, LayerIndex layer) {
  if (next_ == uses_.size() || uses_[next_].entry.layer != layer) {
    const std::string expected =
        next_ == uses_.size() ? "the end of the step" : "layer " + std::to_string(uses_[next_].entry.layer);
    throw Error(ErrorCode::kUsage,
                "fetch of layer " + std::to_string(layer) + " out of order: next comes " + expected +
                    "; a step fetches every streamed layer once, in the order of the pool",
                {.rank = pool_.backend().rank(), .layer = layer});
  }
  Use& use = uses_[next_];
  LayerIndex& holder = slot_holder_[static_cast<std::size_t>(use.entry.slot)];
  if (holder >= 0)
    throw Error(ErrorCode::kUsage,
                "layer " + std::to_string(layer) + " needs ring slot " + std::to_string(use.entry.slot) +
                    ", which layer " + std::to_string(holder) + " still holds; release it first or add ring slots",
                {.rank = pool_.backend().rank(), .layer = layer});
  wait_full(stream, use.entry);
  holder = layer;
  use.held = true;
  ++next_;
  return pool_.ring() + use.entry.offset;
}

void Prefetcher::release(Stream stream, LayerIndex layer) {
  Use* use = find(layer);
  if (use == nullptr || !use->held)
    throw Error(ErrorCode::kUsage, "release of layer " + std::to_string(layer) + ", which is not held",
                {.rank = pool_.backend().rank(), .layer = layer});
  use->held = false;
  slot_holder_[static_cast<std::size_t>(use->entry.slot)] = -1;
  empty_slot(stream, use->entry);
}

bool Prefetcher::step_complete() const {
  return next_ == uses_.size() &&
         std::all_of(slot_holder_.begin(), slot_holder_.end(), [](LayerIndex holder) { return holder < 0; });
}

void Prefetcher::drain_step(Stream stream) {
  for (const LayerIndex holder : std::vector<LayerIndex>(slot_holder_))
    if (holder >= 0) release(stream, holder);
  for (; next_ < uses_.size(); ++next_) {
    const RingEntry& entry = uses_[next_].entry;
    wait_full(stream, entry);
    ++stats_.drained;
    empty_slot(stream, entry);
  }
}

PrefetcherStats Prefetcher::stats() const {
  PrefetcherStats stats = stats_;
  if (lane_) stats.lane = lane_->stats();
  stats.lane.bytes_by_peer.resize(static_cast<std::size_t>(pool_.placement().world_size()), 0);
  return stats;
}

}  // namespace sidp
