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

  // The engine's turn on this GPU, see csrc/DESIGN.md; words of 64 bits, each 0 where it is not wanted.
  struct TurnWords {
    CUdeviceptr turn;           // 1 while the engine computes a layer of its own, in host memory
    CUdeviceptr launched_host;  // answers that the service has launched, in host memory
    CUdeviceptr served;         // of these the ones that were put, on the device
  };
  struct PutWords {
    CUdeviceptr word;         // set once all bytes are there
    std::uint32_t value;      // to this
    CUdeviceptr finished;     // a zeroed word for this kernel's blocks; only one launch at a time may use it
    CUdeviceptr turn;         // of the engine, which ends
    CUdeviceptr served;       // count of answers, on the device, and
    CUdeviceptr served_host;  // for the host
  };
  // Copies `bytes` and then sets words; all but `finished` may be 0.
  void put(CUstream stream, CUdeviceptr dst, CUdeviceptr src, ByteCount bytes, const PutWords& words) const;

  // Begins the engine's turn: what follows on the stream waits for the services that were launched before.
  void turn(CUstream stream, const TurnWords& words) const;

  struct TakeWords {
    CUdeviceptr flag;          // of the answer, in host memory
    CUdeviceptr request;       // the requester's word at the owner, in host memory
    std::uint64_t sent_rows;   // of the request, for the counts
    std::uint64_t sent_bytes;  // likewise
    CUdeviceptr counts;        // on the device: answers, rows sent, bytes sent, 64 bits each
    CUdeviceptr counts_host;   // the same for the host
    CUdeviceptr failed_host;   // set when there was no answer
    CUdeviceptr finished;      // as for put
    TurnWords turn;            // begun here, or all 0
  };
  // Copies the rows of an answer out of its slot and frees the slot. Without an answer the copied bytes mean nothing.
  void take(CUstream stream, CUdeviceptr dst, CUdeviceptr src, ByteCount bytes, const TakeWords& words) const;

 private:
  const Device& device_;
  CUlibrary library_ = nullptr;
  CUfunction put_ = nullptr;
  CUfunction take_ = nullptr;
  CUfunction turn_ = nullptr;
};

}  // namespace sidp::nvshmem
