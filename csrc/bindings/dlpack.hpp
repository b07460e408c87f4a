// Tensors cross by DLPack (https://dmlc.github.io/dlpack/latest/): its C structs, and an exporter of bytes that keeps
// their owner alive.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "sidp/error.hpp"
#include "sidp/types.hpp"

namespace sidp::bindings {

struct DLDevice {
  std::int32_t device_type;  // 1: CPU, 2: CUDA
  std::int32_t device_id;
};
struct DLDataType {
  std::uint8_t code;  // 1: unsigned integer
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // null: row-major
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

// DLPack's device of a GPU's ordinal, or of the host for -1.
constexpr DLDevice dl_device_of(std::int32_t ordinal) { return ordinal < 0 ? DLDevice{1, 0} : DLDevice{2, ordinal}; }

// Bytes of a pool as a 1-D uint8 tensor. Tensors made of it keep `owner` alive.
struct ByteView {
  std::byte* data;
  ByteCount bytes;
  std::shared_ptr<const void> owner;
  std::int32_t device = -1;  // ordinal of the GPU that holds them; -1: host memory

  [[nodiscard]] DLDevice dl_device() const { return dl_device_of(device); }
  [[nodiscard]] pybind11::capsule dlpack() const;
};

}  // namespace sidp::bindings
