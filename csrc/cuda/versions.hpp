// The only file that names CUDA_VERSION: which toolkit headers this build saw, and what it needs of them.
#pragma once

#include <cuda.h>

#include <string>

namespace sidp::cuda {

static_assert(CUDA_VERSION >= 12000, "the stream memory operations used here have their v2 form since CUDA 12.0");

// CUDA's packed number, e.g. 12090 or 13000, as "12.9" or "13.0".
inline std::string version_text(int packed) {
  return std::to_string(packed / 1000) + '.' + std::to_string(packed % 1000 / 10);
}

// Drivers of CUDA 12.3 and later can capture programmatic dependent launches (CUDA programming guide, "edge data").
constexpr int kCapturesEarlyLaunches = 12030;

// Version of the headers this file was compiled with.
inline std::string compiled_version() { return version_text(CUDA_VERSION); }

}  // namespace sidp::cuda
