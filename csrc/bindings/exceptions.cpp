#include "bindings.hpp"
#include "sidp/error.hpp"

namespace py = pybind11;

namespace sidp::bindings {

namespace {

// Raises the class of sidp_runtime.errors that has the code's name, with the numbers as attributes.
void raise_in_python(const Error& error) {
  const ErrorContext& context = error.context();
  py::dict numbers;
  const auto add = [&](const char* name, const std::optional<std::int64_t>& value) {
    if (value) numbers[name] = *value;
  };
  add("rank", context.rank);
  add("peer", context.peer);
  add("layer", context.layer);
  add("num_bytes", context.num_bytes);
  add("waited_ms", context.waited_ms);
  add("expected", context.expected);
  add("seen", context.seen);
  const py::object type = py::module_::import("sidp_runtime.errors").attr(to_string(error.code()));
  const py::object instance = type(error.what(), **numbers);
  PyErr_SetObject(type.ptr(), instance.ptr());
}

}  // namespace

void bind_exceptions(py::module_&) {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      raise_in_python(error);
    }
  });
}

}  // namespace sidp::bindings
