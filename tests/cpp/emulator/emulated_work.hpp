// What the emulated device's streams carry out: memory operations, and what the kernels of
// csrc/backends/nvshmem/kernels.cu do.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>

#include "backends/nvshmem/kernel_words.hpp"

namespace sidp::emulator {

using nvshmem::kNobodyWaits;
using nvshmem::RequestWords;
using nvshmem::TurnWords;
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

// For tests: requests stop between their bell and their rows; answers of several blocks end the process after the first
// one; puts of several take their time before it.
inline std::atomic<bool> rows_held = false, dies_in_answer = false, slow_puts = false;

// To which a request's flags are set, by the epoch of the one before; 1 where there is none.
inline std::uint32_t next_epoch(CUdeviceptr epoch) {
  const std::uint32_t before = epoch != 0 ? atomic<std::uint32_t>(epoch).load() : 0;
  return before < kNobodyWaits - 1 ? before + 1 : before == kNobodyWaits ? before : 1;
}

inline Work put(void** a, unsigned blocks) {
  const auto dst = argument<CUdeviceptr>(a, 0), src = argument<CUdeviceptr>(a, 1), word = argument<CUdeviceptr>(a, 3),
             block_flags = argument<CUdeviceptr>(a, 6), epoch = argument<CUdeviceptr>(a, 7),
             withheld = argument<CUdeviceptr>(a, 8), turn = argument<CUdeviceptr>(a, 9),
             served = argument<CUdeviceptr>(a, 10), served_host = argument<CUdeviceptr>(a, 11);
  const auto bytes = argument<std::uint64_t>(a, 2);
  const auto value = argument<std::uint32_t>(a, 4);
  return [=] {
    if (turn != 0) atomic<std::uint64_t>(turn).store(0);
    if (word != 0 && block_flags != 0) {
      write_value(word, value)();
      while (rows_held) nap();
    }
    const bool withholds = withheld != 0 && atomic<std::uint64_t>(withheld).load() != 0;
    const std::uint32_t set = next_epoch(epoch);
    const bool dies = dies_in_answer && served != 0 && blocks > 1;
    for (unsigned n = 0; n < blocks; ++n) {  // the first block last
      const unsigned i = dies ? n : blocks - 1 - n;
      if (i == 0 && blocks > 1 && slow_puts) std::this_thread::sleep_for(std::chrono::milliseconds(3));
      const std::uint64_t from = bytes * i / blocks, to = bytes * (i + 1) / blocks;
      std::memcpy(reinterpret_cast<char*>(dst) + from, reinterpret_cast<const char*>(src) + from, to - from);
      if (block_flags != 0 && !withholds) write_value(block_flags + 4 * i, set)();
      if (dies) ::raise(SIGKILL);
    }
    if (block_flags == 0 && word != 0) write_value(word, value)();
    if (served != 0) atomic<std::uint64_t>(served_host).store(atomic<std::uint64_t>(served).fetch_add(1) + 1);
  };
}

inline void begin_turn(const TurnWords& words) {
  atomic<std::uint64_t>(words.turn).store(1);
  const auto start = std::chrono::steady_clock::now();
  const std::uint64_t seen = atomic<std::uint64_t>(words.launched_host).load();
  while (atomic<std::uint64_t>(words.served).load() <
             std::min(seen, atomic<std::uint64_t>(words.launched_host).load()) &&
         std::chrono::steady_clock::now() - start < std::chrono::milliseconds(10))
    nap();
}

inline Work turn(void** a) {
  return [words = argument<TurnWords>(a, 0)] { begin_turn(words); };
}

inline void end_request(const RequestWords& words, bool failed) {
  write_value(words.flag, 0)();
  write_value(words.request, 0)();
  if (failed) atomic<std::uint64_t>(words.failed_host).store(1);
  const std::uint64_t more[] = {1, words.sent_rows, words.sent_bytes};
  for (int i = 2; i >= 0; --i) {  // answers last
    auto* const count = reinterpret_cast<std::uint64_t*>(words.counts) + i;
    atomic<std::uint64_t>(words.counts_host + static_cast<CUdeviceptr>(i) * 8).store(*count += more[i]);
  }
  if (words.epoch != 0) atomic<std::uint32_t>(words.epoch).store(failed ? kNobodyWaits : next_epoch(words.epoch));
  if (words.answered_host != 0) atomic<std::uint64_t>(words.answered_host).store(words.number);
  if (words.turn.turn != 0) begin_turn(words.turn);
}

inline Work take(void** a) {
  const auto dst = argument<CUdeviceptr>(a, 0), src = argument<CUdeviceptr>(a, 1);
  const auto bytes = argument<std::uint64_t>(a, 2);
  return [=, request = argument<RequestWords>(a, 4)] {
    const bool failed = request.unanswered != 0
                            ? atomic<std::uint64_t>(request.unanswered).load() != 0
                            : atomic<std::uint32_t>(request.flag).load(std::memory_order_acquire) != 1;
    std::memcpy(reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), bytes);
    end_request(request, failed);
  };
}

inline Work await(void** a) {
  const auto flags = argument<CUdeviceptr>(a, 0), released = argument<CUdeviceptr>(a, 2),
             failed = argument<CUdeviceptr>(a, 3), epoch = argument<CUdeviceptr>(a, 5),
             seen = argument<CUdeviceptr>(a, 6);
  const auto count = argument<unsigned>(a, 1);
  const bool resets = argument<unsigned>(a, 4) != 0;
  return [=, request = argument<RequestWords>(a, 7)] {
    const auto flag = [=](unsigned i) { return atomic<std::uint32_t>(flags + 4 * i); };
    const std::uint32_t set = next_epoch(epoch);
    const auto is_set = [=](unsigned i) {
      const std::uint32_t value = flag(i).load(std::memory_order_acquire);
      return value == set || value == kNobodyWaits;
    };
    const auto all_set = [=] {
      unsigned i = 0;
      while (i < count && is_set(i)) ++i;
      return i == count;
    };
    bool answered = false;
    while (!(answered = all_set()) && atomic<std::uint32_t>(released).load() == 0) nap();
    if (!answered) atomic<std::uint64_t>(failed).store(1);
    for (unsigned i = 0; answered && resets && i < count; ++i) flag(i).store(0);
    if (answered && seen != 0) write_value(seen, set)();
    if (request.request != 0) end_request(request, atomic<std::uint64_t>(failed).load() != 0);
  };
}

inline constexpr char kPut[] = "sidp_put", kTake[] = "sidp_take", kTurn[] = "sidp_turn", kAwait[] = "sidp_await";

}  // namespace sidp::emulator
