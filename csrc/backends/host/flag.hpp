// Flags in shared memory: an atomic word and a futex that only wakes somebody who sleeps.
#pragma once

#include <atomic>
#include <functional>

#include "sidp/backend.hpp"

namespace sidp::host {

// A word with a count of sleepers; all zero is a valid start. One cache line, so that neighbours do not share.
struct alignas(64) Flag {
  std::atomic<std::uint32_t> value;
  std::atomic<std::uint32_t> sleepers;
};
static_assert(sizeof(Flag) == 64 && std::atomic<std::uint32_t>::is_always_lock_free);

// Stores (release) and wakes who sleeps on the flag, in any process.
void store_and_wake(Flag& flag, std::uint32_t value);
void add_and_wake(Flag& flag);
// Wakes without a change, so that sleepers look at their stop flag.
void wake(Flag& flag);

// Returns once `satisfied(value)` (acquire), else when the deadline passes or `ended` says why to give up. `ended` is
// asked every `slice`.
WaitResult wait_until(Flag& flag, const std::function<bool(std::uint32_t)>& satisfied, Milliseconds deadline,
                      Milliseconds slice, const std::function<WaitResult()>& ended);

// Median microseconds of a round trip between two threads through two flags; takes `rounds` of them.
double measure_round_trip_us(int rounds);

}  // namespace sidp::host
