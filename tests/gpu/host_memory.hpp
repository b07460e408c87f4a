// Host memory that the device maps, for kernels_check.cpp.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "backends/nvshmem/device.hpp"

namespace sidp::nvshmem {

constexpr ByteCount kPage = 4096;

inline void require(bool met, const std::string& what) {
  if (!met) throw std::runtime_error(what);
}

// Host memory that the device maps, as the backend maps control segments; zeroed.
class HostMemory {
 public:
  HostMemory(const Device& device, ByteCount bytes) : device_(device) {
    bytes = align_up(std::max(bytes, ByteCount{1}), kPage);
    memory_ = static_cast<std::byte*>(::operator new(bytes, std::align_val_t{kPage}));
    std::memset(memory_, 0, bytes);
    device.check(
        device.api().cuMemHostRegister(memory_, bytes, CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP),
        "cuMemHostRegister");
    device.check(device.api().cuMemHostGetDevicePointer(&mapped_, memory_, 0), "cuMemHostGetDevicePointer");
  }
  ~HostMemory() {
    device_.api().cuMemHostUnregister(memory_);
    ::operator delete(memory_, std::align_val_t{kPage});
  }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  [[nodiscard]] std::byte* data() const { return memory_; }
  [[nodiscard]] CUdeviceptr at(ByteCount offset) const { return mapped_ + offset; }
  template <typename Word>
  [[nodiscard]] std::atomic_ref<Word> word(ByteCount offset) const {
    return std::atomic_ref<Word>(*reinterpret_cast<Word*>(memory_ + offset));
  }

 private:
  const Device& device_;
  std::byte* memory_ = nullptr;
  CUdeviceptr mapped_ = 0;
};

}  // namespace sidp::nvshmem
