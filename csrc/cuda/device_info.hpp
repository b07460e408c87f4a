// What the CUDA driver says about this machine. Free of CUDA headers, so a build without them offers it too:
// then device_info_absent.cpp answers instead of device_info.cpp.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace sidp::cuda {

struct DeviceInfo {
  std::int32_t ordinal = 0;  // as the driver counts them in this process, after CUDA_VISIBLE_DEVICES
  std::string name;
  std::string uuid;  // "GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx" in hexadecimal
  std::uint64_t memory_bytes = 0;
  std::int32_t compute_capability_major = 0;
  std::int32_t compute_capability_minor = 0;
  std::int32_t num_sms = 0;
  std::int32_t num_async_engines = 0;  // copies that run at once beside kernels
  bool stream_mem_ops_64bit = false;   // cuStreamWaitValue64 and its kin
  bool stream_wait_value_nor = false;  // CU_STREAM_WAIT_VALUE_NOR
  bool flush_remote_writes = false;    // CU_STREAM_WAIT_VALUE_FLUSH
  std::vector<bool> can_access_peer;   // by ordinal; true at its own
};

struct CudaReport {
  bool compiled = false;                        // this build has the CUDA part
  std::optional<std::string> compiled_version;  // of the headers, e.g. "13.0"
  std::optional<std::string> driver;            // CUDA version that the driver supports, e.g. "13.0"
  std::string reason;                           // why no device can be used; empty when one can
  std::vector<DeviceInfo> devices;
};

// Asks the driver anew at each call; never throws for what is missing. It calls cuInit: a process that is
// forked from this one afterwards cannot use CUDA.
CudaReport cuda_report();

}  // namespace sidp::cuda
