#include "one_sided.hpp"

namespace sidp::nvshmem {

OneSided::OneSided(int ordinal)
    : device_(std::make_shared<Device>(ordinal)),
      kernels_(*device_),
      words_(device_, 2, kept_),
      finished_(device_, 64, kept_) {}

void OneSided::put(CUstream stream, CUdeviceptr dst, CUdeviceptr src, ByteCount bytes, CUdeviceptr flag) const {
  const ContextScope scope(*device_);
  kernels_.put(stream, dst, src, bytes, {.word = flag, .value = 1, .finished = finished_.at(0)});
}

void OneSided::wait(CUstream stream, CUdeviceptr flag) const {
  const ContextScope scope(*device_);
  kernels_.await(stream, {.flags = flag,
                          .count = 1,
                          .released = words_.on_device(kReleased),
                          .failed = words_.on_device(kFailed),
                          .resets = true});
}

}  // namespace sidp::nvshmem
