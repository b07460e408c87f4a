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

}  // namespace sidp::bindings
