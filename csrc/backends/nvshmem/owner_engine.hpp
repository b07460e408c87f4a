// The copy engine of an owner's GPU, driven by the rank that needs the bytes: a context and a stream of this process on
// that GPU. A copy that an engine writes to another GPU takes more of a link than one that it reads from there, whose
// requests travel against the data of the other direction: on two H200, both ways at once, 392 GB/s against 374, and
// beside products of 1 to 64 rows, which keep the owner's memory busy, 372 to 382 against 308 to 334.
#pragma once

#include "device.hpp"

namespace sidp::nvshmem {

class OwnerEngine {
 public:
  // reader: the GPU to which it will write, what cuMemAlloc gave there. ordinal: of the owner's GPU in this process.
  // Throws Error(kDevice) or Error(kCapacity).
  OwnerEngine(const Device& reader, int ordinal);

  // It will read memory of the owner, which NVSHMEM has mapped here. Throws Error(kDevice).
  void read(const std::byte* begin, ByteCount bytes);

  [[nodiscard]] const Device& device() const { return *device_; }
  [[nodiscard]] const DeviceStream& stream() const { return stream_; }

 private:
  const Device& reader_;
  std::shared_ptr<const Device> device_;
  DeviceStream stream_;
  CUdeviceptr allowed_begin_ = 0, allowed_end_ = 0;  // the last mapping that it was let into
};

}  // namespace sidp::nvshmem
