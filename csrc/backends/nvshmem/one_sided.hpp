// Rows and a flag to another GPU, and the wait for such a flag: the kernels that the activation channel is made of, for
// engines with a protocol of their own and for benchmarks. Calls only enqueue; they may be captured. Make the object
// before the first wait, and let it live until what was enqueued and all graphs made with it are over.
#pragma once

#include <memory>

#include "kernels.hpp"

namespace sidp::nvshmem {

class OneSided {
 public:
  // Throws Error(kUnsupported) without a driver, Error(kDevice).
  explicit OneSided(int ordinal);                        // of this process's GPU
  ~OneSided() { *kept_ = words_.load(kReleased) != 0; }  // waits that are still enqueued look at the words
  OneSided(const OneSided&) = delete;
  OneSided& operator=(const OneSided&) = delete;

  // Copies `bytes` from memory of this GPU to memory that is mapped here, then sets the 32 bits of `flag` there to 1.
  // The flag is seen after the bytes. Puts of one object follow each other on one stream.
  void put(CUstream stream, CUdeviceptr dst, CUdeviceptr src, ByteCount bytes, CUdeviceptr flag) const;
  // The stream waits, by a kernel of one warp, until a flag in this GPU's memory is not 0, and sets it to 0.
  void wait(CUstream stream, CUdeviceptr flag) const;
  // From any thread, without a CUDA call: waits end, those that are enqueued and later ones, and failed() says so once
  // one has. For a peer that died: no wait here ends by itself.
  void release() const noexcept { words_.store(kReleased, 1); }
  [[nodiscard]] bool failed() const { return words_.load(kFailed) != 0; }

 private:
  static constexpr std::size_t kReleased = 0, kFailed = 1;

  std::shared_ptr<const Device> device_;
  Kernels kernels_;
  std::shared_ptr<bool> kept_ = std::make_shared<bool>(false);  // see HostWords
  HostWords words_;
  DeviceWords finished_;
};

}  // namespace sidp::nvshmem
