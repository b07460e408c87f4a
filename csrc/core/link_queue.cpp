#include "link_queue.hpp"

#include <atomic>

#include "sidp/placement.hpp"

namespace sidp {

namespace {

std::atomic_ref<std::uint32_t> atomic(std::uint32_t* word) { return std::atomic_ref<std::uint32_t>(*word); }

}  // namespace

void LinkQueue::ask(Rank owner) {
  owner_ = owner;
  seen_ = 0;
  atomic(words_.waits(owner, rank_)).store(1);
}

bool LinkQueue::granted() {
  const auto holder = atomic(words_.holder(owner_));
  std::uint32_t seen = holder.load();
  if (seen != mine()) {
    bool takes = seen == 0;
    if (seen != 0) {
      const auto now = Clock::now();
      if (seen != seen_) since_ = now;
      seen_ = seen;
      const auto held = now - since_;
      takes = held > kLongestHold || (held > kLivenessCheck && !alive_(static_cast<Rank>(seen) - 1));
    }
    if (!takes) return false;
    const bool was_held = seen != 0;
    if (!holder.compare_exchange_strong(seen, mine())) return false;
    if (was_held) ++taken_;
  }
  atomic(words_.waits(owner_, rank_)).store(0);
  return true;
}

void LinkQueue::leave() {
  if (owner_ < 0) return;
  atomic(words_.waits(owner_, rank_)).store(0);
  const Rank next = next_reader(rank_, world_size_, [&](Rank reader) {
    return reader != rank_ && atomic(words_.waits(owner_, reader)).load() != 0;
  });
  std::uint32_t seen = mine();  // or it was taken away, or never had; whoever asks from now on finds it free
  atomic(words_.holder(owner_)).compare_exchange_strong(seen, static_cast<std::uint32_t>(next + 1));
  owner_ = -1;
}

}  // namespace sidp
