#include "flag.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <ctime>
#include <thread>
#include <vector>

#include "sidp/error.hpp"

namespace sidp::host {

namespace {

// Long enough for an answer that is on its way, short beside a time slice when cores are shared.
constexpr auto kSpin = std::chrono::microseconds(20);

// std::atomic::wait uses private futexes and has no deadline; these cross processes.
void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t expected, std::chrono::nanoseconds timeout) {
  const timespec relative{.tv_sec = timeout.count() / 1'000'000'000, .tv_nsec = timeout.count() % 1'000'000'000};
  ::syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAIT, expected, &relative, nullptr, 0);
}

void futex_wake(std::atomic<std::uint32_t>& word) {
  ::syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

// Store, then look for sleepers; a sleeper counts itself, then looks at the value. Both are sequentially consistent, so
// at least one of them sees the other.
void store_and_wake(Flag& flag, std::uint32_t value) {
  flag.value.store(value, std::memory_order_seq_cst);
  if (flag.sleepers.load(std::memory_order_seq_cst) != 0) futex_wake(flag.value);
}

void add_and_wake(Flag& flag) {
  flag.value.fetch_add(1, std::memory_order_seq_cst);
  if (flag.sleepers.load(std::memory_order_seq_cst) != 0) futex_wake(flag.value);
}

void wake(Flag& flag) { futex_wake(flag.value); }

WaitResult wait_until(Flag& flag, const std::function<bool(std::uint32_t)>& satisfied, Milliseconds deadline,
                      Milliseconds slice, const std::function<WaitResult()>& ended) {
  if (satisfied(flag.value.load(std::memory_order_acquire))) return WaitResult::kReady;
  if (deadline.count() <= 0) return WaitResult::kDeadline;
  const auto start = Clock::now();
  while (Clock::now() - start < kSpin) {
    if (satisfied(flag.value.load(std::memory_order_acquire))) return WaitResult::kReady;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  WaitResult result = WaitResult::kReady;
  flag.sleepers.fetch_add(1, std::memory_order_seq_cst);
  for (;;) {
    const std::uint32_t seen = flag.value.load(std::memory_order_seq_cst);
    if (satisfied(seen)) break;
    result = ended();
    const auto left = deadline - (Clock::now() - start);
    if (result == WaitResult::kReady && left.count() <= 0) result = WaitResult::kDeadline;
    if (result != WaitResult::kReady) break;
    futex_wait(flag.value, seen, std::min<std::chrono::nanoseconds>(left, slice));
  }
  flag.sleepers.fetch_sub(1, std::memory_order_seq_cst);
  // What ended the wait may have come after the value: the value wins.
  return satisfied(flag.value.load(std::memory_order_acquire)) ? WaitResult::kReady : result;
}

double measure_round_trip_us(int rounds) {
  Flag request{}, reply{};
  constexpr Milliseconds kDeadline{10000}, kSlice{50};
  const auto never = [] { return WaitResult::kReady; };
  const auto is = [](FlagValue expected) { return [expected](std::uint32_t value) { return value == expected; }; };
  std::thread owner([&] {
    for (int i = 0; i < rounds; ++i) {
      if (wait_until(request, is(kFull), kDeadline, kSlice, never) != WaitResult::kReady) return;
      store_and_wake(request, kEmpty);
      store_and_wake(reply, kFull);
    }
  });
  std::vector<double> us;
  for (int i = 0; i < rounds; ++i) {
    const auto start = Clock::now();
    store_and_wake(request, kFull);
    if (wait_until(reply, is(kFull), kDeadline, kSlice, never) != WaitResult::kReady) break;
    store_and_wake(reply, kEmpty);
    us.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
  }
  owner.join();
  if (us.empty()) throw Error(ErrorCode::kDeadline, "two threads could not exchange a flag within 10 s");
  std::nth_element(us.begin(), us.begin() + static_cast<std::ptrdiff_t>(us.size() / 2), us.end());
  return us[us.size() / 2];
}

}  // namespace sidp::host
