// How threads wait for words that a GPU writes.
#pragma once

#include <chrono>
#include <thread>

#include "sidp/types.hpp"

namespace sidp::nvshmem {

constexpr std::chrono::microseconds kNap{20};

// One round of a wait since then. It spins at first, because in a CaS step what comes next comes within a layer's time;
// after that it naps, so that an idle group costs no core.
inline void spin_or_nap(Clock::duration since) {
  constexpr std::chrono::milliseconds kSpin{5};
  if (since < kSpin)
    __builtin_ia32_pause();
  else
    std::this_thread::sleep_for(kNap);
}

}  // namespace sidp::nvshmem
