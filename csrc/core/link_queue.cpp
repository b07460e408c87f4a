#include "link_queue.hpp"

#include <atomic>

#include "sidp/placement.hpp"

namespace sidp {

namespace {

std::atomic_ref<std::uint32_t> atomic(std::uint32_t* word) { return std::atomic_ref<std::uint32_t>(*word); }

}  // namespace

void LinkQueue::ask(Rank owner) {
  owner_ = owner;
  seen_.reset();
  atomic(words_.waits(owner, rank_)).store(1);
}

bool LinkQueue::granted() {
  const auto holder = atomic(words_.holder(owner_));
  std::uint32_t seen = holder.load();
  const auto now = now_();
  if (seen != seen_) {
    since_ = now;
    checked_ = {};
  }
  seen_ = seen;
  const auto passed = now - since_;
  if (seen == 0) {
    if (passed < grace_) return false;
    const std::uint32_t last = atomic(words_.last(owner_)).load();
    const Rank next = next_reader(last == 0 ? owner_ : static_cast<Rank>(last) - 1, world_size_,
                                  [&](Rank reader) { return atomic(words_.waits(owner_, reader)).load() != 0; });
    if (next != rank_) {
      if (passed < grace_ + kLivenessCheck) return false;
      if (next >= 0 && !alive_(next)) atomic(words_.waits(owner_, next)).store(0);  // or all wait for it each time
    }
  } else if (passed < kLongestHold) {
    if (passed < checked_ + kLivenessCheck) return false;
    checked_ = passed;
    if (alive_(static_cast<Rank>(seen) - 1)) return false;
  }
  const bool was_held = seen != 0;
  if (!holder.compare_exchange_strong(seen, mine())) return false;
  if (was_held) ++taken_;
  since_ = now;
  atomic(words_.waits(owner_, rank_)).store(0);
  return true;
}

void LinkQueue::leave() {
  if (owner_ < 0) return;
  atomic(words_.waits(owner_, rank_)).store(0);
  if (atomic(words_.holder(owner_)).load() == mine()) {
    grace_ = (now_() - since_) / kLinkGraceShare;
    atomic(words_.last(owner_)).store(mine());  // first: who finds the link free looks at it
    std::uint32_t held = mine();                // or it is taken away now
    atomic(words_.holder(owner_)).compare_exchange_strong(held, 0);
  }
  owner_ = -1;
}

}  // namespace sidp
