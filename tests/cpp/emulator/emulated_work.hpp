// What the emulated device's streams carry out: memory operations, and what the kernels of
// csrc/backends/nvshmem/kernels.cu do.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>

namespace sidp::emulator {

using Work = std::function<void()>;

template <typename Word>
std::atomic_ref<Word> atomic(CUdeviceptr address) {
  return std::atomic_ref<Word>(*reinterpret_cast<Word*>(address));
}

inline void nap() { std::this_thread::sleep_for(std::chrono::microseconds(20)); }

inline Work wait_value(CUdeviceptr address, std::uint32_t value, unsigned flags) {
  return [=] {
    const auto met = [=] {
      const std::uint32_t seen = atomic<std::uint32_t>(address).load(std::memory_order_acquire);
      return flags == CU_STREAM_WAIT_VALUE_EQ ? seen == value : static_cast<std::int32_t>(seen - value) >= 0;
    };
    while (!met()) nap();
  };
}

inline Work write_value(CUdeviceptr address, std::uint32_t value) {
  return [=] { atomic<std::uint32_t>(address).store(value, std::memory_order_release); };
}

template <typename Value>
Value argument(void** arguments, int index) {
  return *static_cast<Value*>(arguments[index]);
}

inline std::atomic<bool> rows_held = false;  // for tests: requests stop between their bell and their rows

inline Work put(void** a, unsigned blocks) {
  const auto dst = argument<CUdeviceptr>(a, 0), src = argument<CUdeviceptr>(a, 1), word = argument<CUdeviceptr>(a, 3),
             block_flags = argument<CUdeviceptr>(a, 6), withheld = argument<CUdeviceptr>(a, 7),
             turn = argument<CUdeviceptr>(a, 8), served = argument<CUdeviceptr>(a, 9),
             served_host = argument<CUdeviceptr>(a, 10);
  const auto bytes = argument<std::uint64_t>(a, 2);
  const auto value = argument<std::uint32_t>(a, 4);
  return [=] {
    if (turn != 0) atomic<std::uint64_t>(turn).store(0);
    if (word != 0 && block_flags != 0) {
      write_value(word, value)();
      while (rows_held) nap();
    }
    std::memcpy(reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), bytes);
    if (block_flags == 0 && word != 0) write_value(word, value)();
    if (block_flags != 0 && (withheld == 0 || atomic<std::uint64_t>(withheld).load() == 0))
      for (unsigned i = 0; i < blocks; ++i) write_value(block_flags + 4 * i, 1)();
    if (served != 0) atomic<std::uint64_t>(served_host).store(atomic<std::uint64_t>(served).fetch_add(1) + 1);
  };
}

inline Work turn(CUdeviceptr turn, CUdeviceptr launched, CUdeviceptr served) {
  return [=] {
    atomic<std::uint64_t>(turn).store(1);
    const auto start = std::chrono::steady_clock::now();
    const std::uint64_t seen = atomic<std::uint64_t>(launched).load();
    while (atomic<std::uint64_t>(served).load() < std::min(seen, atomic<std::uint64_t>(launched).load()) &&
           std::chrono::steady_clock::now() - start < std::chrono::milliseconds(10))
      nap();
  };
}

inline Work turn(void** a) {
  return turn(argument<CUdeviceptr>(a, 0), argument<CUdeviceptr>(a, 1), argument<CUdeviceptr>(a, 2));
}

inline Work take(void** a) {
  const auto dst = argument<CUdeviceptr>(a, 0), src = argument<CUdeviceptr>(a, 1), flag = argument<CUdeviceptr>(a, 3),
             rows_flags = argument<CUdeviceptr>(a, 4), unanswered = argument<CUdeviceptr>(a, 5),
             request = argument<CUdeviceptr>(a, 6), counts = argument<CUdeviceptr>(a, 9),
             counts_host = argument<CUdeviceptr>(a, 10), failed_host = argument<CUdeviceptr>(a, 11),
             begins = argument<CUdeviceptr>(a, 13), answered_host = argument<CUdeviceptr>(a, 16);
  const Work turn_begins =
      begins == 0 ? Work() : turn(begins, argument<CUdeviceptr>(a, 14), argument<CUdeviceptr>(a, 15));
  const auto bytes = argument<std::uint64_t>(a, 2), rows = argument<std::uint64_t>(a, 7),
             sent = argument<std::uint64_t>(a, 8), number = argument<std::uint64_t>(a, 17);
  return [=] {
    const bool failed = unanswered != 0 ? atomic<std::uint64_t>(unanswered).load() != 0
                                        : atomic<std::uint32_t>(flag).load(std::memory_order_acquire) != 1;
    std::memcpy(reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), bytes);
    write_value(flag, 0)();
    if (rows_flags != 0 && !failed)
      for (unsigned i = 0; i < 32; ++i) write_value(rows_flags + 4 * i, 0)();
    write_value(request, 0)();
    if (failed) atomic<std::uint64_t>(failed_host).store(1);
    const std::uint64_t more[] = {1, rows, sent};
    for (int i = 2; i >= 0; --i) {  // answers last
      auto* const count = reinterpret_cast<std::uint64_t*>(counts) + i;
      atomic<std::uint64_t>(counts_host + static_cast<CUdeviceptr>(i) * 8).store(*count += more[i]);
    }
    if (answered_host != 0) atomic<std::uint64_t>(answered_host).store(number);
    if (turn_begins) turn_begins();
  };
}

inline Work await(void** a) {
  const auto flags = argument<CUdeviceptr>(a, 0), released = argument<CUdeviceptr>(a, 2),
             failed = argument<CUdeviceptr>(a, 3);
  const auto count = argument<unsigned>(a, 1);
  const bool resets = argument<unsigned>(a, 4) != 0;
  return [=] {
    const auto flag = [=](unsigned i) { return atomic<std::uint32_t>(flags + 4 * i); };
    for (unsigned i = 0; i < count; ++i)
      while (flag(i).load(std::memory_order_acquire) == 0) {
        if (atomic<std::uint32_t>(released).load() != 0) return atomic<std::uint64_t>(failed).store(1);
        nap();
      }
    for (unsigned i = 0; resets && i < count; ++i) flag(i).store(0);
  };
}

inline constexpr char kPut[] = "sidp_put", kTake[] = "sidp_take", kTurn[] = "sidp_turn", kAwait[] = "sidp_await";

}  // namespace sidp::emulator
