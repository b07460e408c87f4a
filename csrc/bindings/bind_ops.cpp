#include "backends/host/torch_program.hpp"
#include "bindings.hpp"
#include "sidp/error.hpp"
#include "sidp/op.hpp"

namespace py = pybind11;

namespace sidp::bindings {

namespace {

using host::TorchArgument;

using WeightTuple =
    py::typing::Tuple<ByteCount, py::typing::List<std::int64_t>, py::typing::List<std::int64_t>, std::int32_t>;
using CallTuple = py::typing::Tuple<py::str, py::str, py::typing::List<py::typing::Tuple<py::str, py::object, bool>>>;

// ("register" | "weight" | "int" | "float" | "bool" | "none", value, optional)
TorchArgument argument_from(const py::tuple& spec) {
  const auto kind = spec[0].cast<std::string>();
  TorchArgument argument;
  argument.optional = spec[2].cast<bool>();
  if (kind == "register") {
    argument.kind = TorchArgument::Kind::kRegister;
    argument.index = spec[1].cast<std::int64_t>();
  } else if (kind == "weight") {
    argument.kind = TorchArgument::Kind::kWeight;
    argument.index = spec[1].cast<std::int64_t>();
  } else if (kind == "int") {
    argument.kind = TorchArgument::Kind::kInt;
    argument.index = spec[1].cast<std::int64_t>();
  } else if (kind == "bool") {
    argument.kind = TorchArgument::Kind::kBool;
    argument.index = spec[1].cast<bool>() ? 1 : 0;
  } else if (kind == "float") {
    argument.kind = TorchArgument::Kind::kDouble;
    argument.number = spec[1].cast<double>();
  } else if (kind != "none") {
    throw Error(ErrorCode::kUnsupported, "an op argument of kind '" + kind + "'");
  }
  return argument;
}

}  // namespace

void bind_ops(py::module_& m) {
  py::class_<OpKernel, std::shared_ptr<OpKernel>>(m, "OpKernel", "An op's computation, run from C++ without the GIL.");
  py::class_<Op>(m, "Op")
      .def(py::init([](std::string name, std::string description, ByteCount in_row_bytes, ByteCount out_row_bytes,
                       const std::vector<std::optional<std::shared_ptr<OpKernel>>>& kernels) {
             Op op{std::move(name), std::move(description), in_row_bytes, out_row_bytes, {}};
             for (const auto& kernel : kernels) op.kernels.push_back(kernel.value_or(nullptr));
             return op;
           }),
           py::kw_only(), py::arg("name"), py::arg("description"), py::arg("in_row_bytes"), py::arg("out_row_bytes"),
           py::arg("kernels"), "kernels: one for each layer of the pool, None where a layer lacks the op.")
      .def_readonly("name", &Op::name);
  m.def("load_torch", &host::load_torch, py::arg("library"), "Looks up torch's functions in the loaded libtorch_cpu.");
  m.def(
      "torch_kernel",
      [](const py::typing::List<WeightTuple>& weights, const py::typing::List<CallTuple>& calls,
         std::vector<std::int64_t> outputs, std::vector<std::int64_t> output_columns,
         std::vector<ByteCount> output_element_bytes, std::int64_t input_columns, std::int32_t input_dtype) {
        host::TorchProgram program;
        for (const auto item : weights) {
          const auto w = item.cast<py::tuple>();
          program.weights.push_back({w[0].cast<ByteCount>(), w[1].cast<std::vector<std::int64_t>>(),
                                     w[2].cast<std::vector<std::int64_t>>(), w[3].cast<std::int32_t>()});
        }
        for (const auto item : calls) {
          const auto c = item.cast<py::tuple>();
          host::TorchCall call{c[0].cast<std::string>(), c[1].cast<std::string>(), {}};
          for (const auto argument : c[2].cast<py::list>())
            call.arguments.push_back(argument_from(argument.cast<py::tuple>()));
          program.calls.push_back(std::move(call));
        }
        program.outputs = std::move(outputs);
        program.output_columns = std::move(output_columns);
        program.output_element_bytes = std::move(output_element_bytes);
        program.input_columns = input_columns;
        program.input_dtype = input_dtype;
        return std::const_pointer_cast<OpKernel>(host::make_torch_kernel(std::move(program)));
      },
      py::kw_only(), py::arg("weights"), py::arg("calls"), py::arg("outputs"), py::arg("output_columns"),
      py::arg("output_element_bytes"), py::arg("input_columns"), py::arg("input_dtype"),
      "A straight-line ATen program. weights: (offset, shape, strides, dtype). calls: (name, overload, arguments).");
}

}  // namespace sidp::bindings
