#include "owner_engine.hpp"

namespace sidp::nvshmem {

OwnerEngine::OwnerEngine(const Device& reader, int ordinal)
    : reader_(reader), device_(Device::for_copies(ordinal)), stream_(*device_, DeviceStream::Priority::kLane) {
  device_->use_memory_of(reader);
}

// NVSHMEM's heap is one reservation of addresses with a mapping for each time that it grew; access is given by mapping
// (CUDA driver API, cuMemSetAccess), for the device on which a context lies, whatever the process.
void OwnerEngine::read(const std::byte* begin, ByteCount bytes) {
  const ContextScope scope(reader_);
  const auto& api = reader_.api();
  const CUdeviceptr end = device_pointer(begin) + bytes;
  CUmemAccessDesc access = {};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = device_->ordinal();
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;  // NVSHMEM's own; the driver takes no less for device memory
  for (CUdeviceptr at = device_pointer(begin); at < end; at = allowed_end_) {
    if (at >= allowed_begin_ && at < allowed_end_) continue;
    CUdeviceptr mapping = 0;
    std::size_t size = 0;
    reader_.check(api.cuPointerGetAttribute(&mapping, CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR, at),
                  "cuPointerGetAttribute of the owner's memory");
    reader_.check(api.cuPointerGetAttribute(&size, CU_POINTER_ATTRIBUTE_MAPPING_SIZE, at),
                  "cuPointerGetAttribute of the owner's memory");
    const bool mapped =
        mapping <= at && at < mapping + size;  // no memory of cudaMalloc's, which is not let in like this
    reader_.check(mapped ? api.cuMemSetAccess(mapping, size, &access, 1) : CUDA_ERROR_NOT_MAPPED, [&] {
      return "cuMemSetAccess for device " + std::to_string(device_->ordinal()) + " to " + std::to_string(size) +
             " bytes of its owner";
    });
    allowed_begin_ = mapping;
    allowed_end_ = mapping + size;
  }
}

}  // namespace sidp::nvshmem
