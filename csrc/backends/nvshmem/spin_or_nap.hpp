// How threads wait for words that a GPU writes.
#pragma once

#include <pthread.h>
#include <sys/prctl.h>

#include <chrono>
#include <thread>

#include "sidp/types.hpp"

namespace sidp::nvshmem {

constexpr std::chrono::microseconds kNap{20};

// At the start of a thread that waits so. Names have up to 15 letters.
inline void name_and_sharpen(const char* name) {
  ::pthread_setname_np(::pthread_self(), name);
  ::prctl(PR_SET_TIMERSLACK, 1000UL);  // ns; the default of 50 us would stretch every nap
}

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
