// Stands in for device_info.cpp and driver_api.cpp in a build that found no CUDA headers.
#include "device_info.hpp"

namespace sidp::cuda {

CudaReport cuda_report() {
  CudaReport report;
  report.reason =
      "this build has no CUDA part: rebuild with SIDP_WITH_CUDA=ON where the CUDA headers are (a toolkit, or "
      "pip install nvidia-cuda-runtime)";
  return report;
}

}  // namespace sidp::cuda
