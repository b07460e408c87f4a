#include "dlpack.hpp"

#include <string>

namespace py = pybind11;

namespace sidp::bindings {

namespace {

constexpr const char* kFresh = "dltensor";

struct Export {
  DLManagedTensor tensor;
  std::int64_t shape;
  std::int64_t stride;
  std::shared_ptr<const void> owner;
};

}  // namespace

py::capsule ByteView::dlpack() const {
  auto* exported = new Export{};
  exported->shape = static_cast<std::int64_t>(bytes);
  exported->stride = 1;
  exported->owner = owner;
  exported->tensor.dl_tensor = {data, dl_device(), 1, {1, 8, 1}, &exported->shape, &exported->stride, 0};
  exported->tensor.manager_ctx = exported;
  exported->tensor.deleter = [](DLManagedTensor* self) { delete static_cast<Export*>(self->manager_ctx); };
  // A consumer renames the capsule and calls the deleter itself; an unused capsule does it here.
  return py::capsule(&exported->tensor, kFresh, [](PyObject* capsule) {
    if (PyCapsule_IsValid(capsule, kFresh) == 0) return;
    auto* tensor = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, kFresh));
    tensor->deleter(tensor);
  });
}

RowsArgument rows_from_dlpack(const py::object& tensor, const char* what, std::int32_t device) {
  // No stream is named: the caller's stream is the one that the rows are used on.
  py::object capsule = device < 0 ? tensor.attr("__dlpack__")() : tensor.attr("__dlpack__")(py::arg("stream") = -1);
  const auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), kFresh));
  if (managed == nullptr) throw py::error_already_set();
  const DLTensor& t = managed->dl_tensor;
  const auto reject = [&](const std::string& why) {
    throw Error(ErrorCode::kShape, std::string(what) + " must be a row-major [rows, columns] tensor: " + why);
  };
  const DLDevice wanted = dl_device_of(device);
  if (t.device.device_type != wanted.device_type || t.device.device_id != wanted.device_id)
    reject("it is on device " + std::to_string(t.device.device_id) + " of type " +
           std::to_string(t.device.device_type) + ", the pool on " + std::to_string(wanted.device_id) + " of type " +
           std::to_string(wanted.device_type));
  if (t.ndim != 2) reject("it has " + std::to_string(t.ndim) + " dimensions");
  const bool row_major = t.strides == nullptr ||
                         ((t.strides[1] == 1 || t.shape[1] == 1) && (t.strides[0] == t.shape[1] || t.shape[0] <= 1));
  if (!row_major) reject("its strides are " + std::to_string(t.strides[0]) + ", " + std::to_string(t.strides[1]));
  const ByteCount element_bytes = static_cast<ByteCount>(t.dtype.bits) * t.dtype.lanes / 8;
  return {std::move(capsule), static_cast<std::byte*>(t.data) + t.byte_offset, t.shape[0],
          static_cast<ByteCount>(t.shape[1]) * element_bytes};
}

}  // namespace sidp::bindings
