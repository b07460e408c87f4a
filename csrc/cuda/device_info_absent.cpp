// Stands in for the other sources of this folder in a build that found no CUDA headers.
#include "copy_rates.hpp"
#include "device_info.hpp"

namespace sidp::cuda {

namespace {

constexpr const char* kReason =
    "this build has no CUDA part: rebuild with SIDP_WITH_CUDA=ON where the CUDA headers are (a toolkit, or "
    "pip install nvidia-cuda-runtime)";

}  // namespace

CudaReport cuda_report() {
  CudaReport report;
  report.reason = kReason;
  return report;
}

CopyRates measure_copies(std::chrono::milliseconds) { return {kReason, {}}; }

}  // namespace sidp::cuda
