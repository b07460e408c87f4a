// How fast GPUs of this machine copy from each other. Free of CUDA headers, as device_info.hpp.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace sidp::cuda {

struct CopyRate {
  std::int32_t src = 0;  // ordinals; the copy engine of dst reads from src, as a lane does
  std::int32_t dst = 0;
  bool direct = false;  // dst maps the memory of src; else the copies go through host memory
  double gbps = 0;      // 1e9 bytes a second
};

struct CopyRates {
  std::string reason;  // why nothing was measured; empty when it was
  std::vector<CopyRate> rates;
};

// Copies 64 MiB at a time between every two GPUs, one pair after the other, for `budget` in all; the best of each pair.
// Never throws for what is missing. It starts CUDA on every GPU, and a driver that hangs hangs it: for a process of its
// own. With one GPU there is nothing to measure, and the reason says so.
CopyRates measure_copies(std::chrono::milliseconds budget);

}  // namespace sidp::cuda
