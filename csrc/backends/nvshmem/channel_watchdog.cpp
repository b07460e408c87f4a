// What goes wrong with requests. The watch over a channel's own ones: who answers one whose owner died or hangs, and
// when it is given up; the answer in the owner's place; and the watch over the rows that others' have still to bring.
#include <string>

#include "stream_channel.hpp"

namespace sidp::nvshmem {

namespace {

constexpr std::uint32_t kNotAnswered = 2;
// After an owner's process has ended its GPU work may still finish; only then is a request that it took run again.
constexpr Milliseconds kGrace{300};
constexpr std::chrono::milliseconds kLivenessCheck{2};

std::int64_t ms_since(Clock::time_point start) {
  return std::chrono::duration_cast<Milliseconds>(Clock::now() - start).count();
}

}  // namespace

// Looks after the own request at one owner: who answers it if that rank died or hangs, and when to give it up. Makes no
// CUDA call: an engine's thread may hold the context until its streams are idle, and they wait for this.
void StreamChannel::watch(Rank owner) {
  Watch& watch = watches_[static_cast<std::size_t>(owner)];
  std::atomic<bool>& gave_up = gave_up_[static_cast<std::size_t>(owner)];
  const std::uint32_t word = atomic(memory_.request(owner, rank_).host).load(std::memory_order_acquire);
  const std::uint64_t answers = host_.load(answers_index(owner));
  if (word == 0) {
    watch.since.reset();
    watch.dead_since.reset();
    return;
  }
  const auto now = Clock::now();
  const bool waiting = (word & Request::kWaiting) != 0;
  if (!watch.since || watch.answers != answers || (waiting && watch.over)) watch = {answers, now, {}, {}, false};
  if (watch.over) return;
  if (void_.load(std::memory_order_relaxed)) {
    watch.over = true;
    return not_answered(rank_, owner);
  }
  const auto waited = [&](Clock::time_point since) { return now - since > options_.deadline; };
  if (watch.handed_over) {
    if (waited(*watch.handed_over)) give_up_on(owner, "no longer answers, and the op did not run here either");
    return;
  }
  if (!gave_up.load(std::memory_order_relaxed)) {
    if (now - *watch.since < kLivenessCheck) return;
    if (!watch.dead_since && !pool_.backend().alive(owner)) watch.dead_since = now;
    if (!watch.dead_since && !waited(*watch.since)) return;
    gave_up.store(true);
  }
  if (waiting) {
    if (claim(owner, rank_, word)) hand_over(owner, word);  // else it answers after all
    return;
  }
  // The owner took it. A dead one's answer may still be on its way; a living one's may come at any time, so nobody
  // else may use the slot.
  if (!watch.dead_since && !pool_.backend().alive(owner)) watch.dead_since = now;
  if (watch.dead_since) {
    if (now - *watch.dead_since > kGrace) hand_over(owner, word);
    return;
  }
  if (waited(*watch.since)) give_up_on(owner, "took a request and did not answer it");
}

void StreamChannel::hand_over(Rank owner, std::uint32_t word) {
  watches_[static_cast<std::size_t>(owner)].handed_over = Clock::now();
  stand_ins_[static_cast<std::size_t>(owner)].store(word);
}

void StreamChannel::give_up_on(Rank owner, const std::string& what) {
  Watch& watch = watches_[static_cast<std::size_t>(owner)];
  watch.over = true;
  const std::int64_t waited_ms = ms_since(*watch.since);
  record({ErrorCode::kDeadline,
          "rank " + std::to_string(owner) + " " + what + ": rank " + std::to_string(rank_) + " waited " +
              std::to_string(waited_ms) + " ms, and the results of that step are void. Close this runtime",
          {.rank = rank_, .peer = owner, .waited_ms = waited_ms}});
  give_up();
  not_answered(rank_, owner);
}

// The graph that this rank's service runs now may wait for the rows of its request, and all others wait behind it. They
// come in some microseconds, unless the requester's process ended or its GPU hangs. Its requests are not answered any
// more then: a living one hears that at its own deadline, those behind it at half of theirs. Makes no CUDA call, as
// watch().
void StreamChannel::watch_rows(Rank requester) {
  InWork& work = in_work_[static_cast<std::size_t>(requester)];
  const std::uint32_t word = atomic(memory_.request(rank_, requester).host).load(std::memory_order_acquire);
  if (word == 0 || (word & Request::kWaiting) != 0 || !spins(Request::from(word).rows)) return work.since.reset();
  const std::uint64_t launch = launch_for_[static_cast<std::size_t>(requester)].load(std::memory_order_relaxed);
  if (host_.load(index(HostWord::kServed)) + 1 != launch) return work.since.reset();
  const auto now = Clock::now();
  if (!work.since || work.launch != launch) work = {launch, now};
  const auto waited = now - *work.since;
  if (waited < kLivenessCheck || host_.load(given_up_index(requester)) != 0) return;
  if (waited < options_.deadline / 2 && pool_.backend().alive(requester)) return;
  served_failed_.fetch_add(1, std::memory_order_relaxed);
  host_.store(given_up_index(requester), 1);
}

void StreamChannel::give_up() noexcept {
  host_.store(given_up_index(rank_), 1);  // nor does a stand-in wait for rows
  void_.store(true);
}

void StreamChannel::stand_in(Rank owner, const Request& request) {
  const TraceSpan span = service_span(TraceEvent::Kind::kStandIn, owner, request);
  try {
    // A part of the dead owner's answer may have come: its flags would be left to the next one.
    if (spins(request.rows))
      device_->check(device_->api().cuMemsetD8Async(memory_.reply_flags(rank_, owner), 0,
                                                    Kernels::kMaxBlocks * sizeof(std::uint32_t), service_stream_.get()),
                     "cuMemsetD8Async of the flags of an answer");
    launch({owner, rank_, request.rows}, request);
    stood_in_.fetch_add(1, std::memory_order_relaxed);
  } catch (const std::exception& error) {
    record({ErrorCode::kRemoteOp,
            "rank " + std::to_string(owner) + " no longer answers rank " + std::to_string(rank_) +
                ", and the op could not be launched here: " + error.what(),
            {.rank = rank_, .peer = owner, .layer = request.layer}});
    give_up();
    not_answered(rank_, owner);
  }
}

void StreamChannel::not_answered(Rank requester, Rank owner) {
  atomic(memory_.reply(requester, owner).host).store(kNotAnswered, std::memory_order_release);
}

void StreamChannel::record(Error error) {
  const std::lock_guard lock(mutex_);
  if (!failure_) failure_ = std::move(error);
}

void StreamChannel::check() const {
  const std::lock_guard lock(mutex_);
  if (failure_) throw *failure_;
  if (host_.load(index(HostWord::kFailed)) != 0)
    throw Error(ErrorCode::kRemoteOp,
                "an owner could not launch an op for rank " + std::to_string(rank_) +
                    "; the results of that step are void. The owner's check() says why",
                {.rank = rank_});
}

bool StreamChannel::available(Rank owner) const {
  return !gave_up_[static_cast<std::size_t>(owner)].load(std::memory_order_relaxed) && pool_.backend().alive(owner);
}

}  // namespace sidp::nvshmem
