// The kernels of kernels.cu, loaded from the machine code that the build embedded.
#pragma once

#include "device.hpp"

namespace sidp::nvshmem {

class Kernels {
 public:
  explicit Kernels(const Device& device);
  ~Kernels();
  Kernels(const Kernels&) = delete;
  Kernels& operator=(const Kernels&) = delete;

  // Copies `bytes` and then sets `word` (0: none) to `value`. `finished`: a zeroed word for this kernel's blocks; only
  // one launch at a time may use it.
  void put(CUstream stream, CUdeviceptr dst, CUdeviceptr src, ByteCount bytes, CUdeviceptr word, std::uint32_t value,
           CUdeviceptr finished) const;

  struct TakeWords {
    CUdeviceptr flag;          // of the answer, in host memory
    CUdeviceptr request;       // the requester's word at the owner, in host memory
    std::uint64_t sent_rows;   // of the request, for the counts
    std::uint64_t sent_bytes;  // likewise
    CUdeviceptr counts;        // on the device: answers, rows sent, bytes sent, 64 bits each
    CUdeviceptr counts_host;   // the same for the host
    CUdeviceptr failed_host;   // set when there was no answer
    CUdeviceptr finished;      // as for put
  };
  // Copies the rows of an answer out of its slot and frees the slot. Without an answer the copied bytes mean nothing.
  void take(CUstream stream, CUdeviceptr dst, CUdeviceptr src, ByteCount bytes, const TakeWords& words) const;

 private:
  const Device& device_;
  CUlibrary library_ = nullptr;
  CUfunction put_ = nullptr;
  CUfunction take_ = nullptr;
};

}  // namespace sidp::nvshmem
