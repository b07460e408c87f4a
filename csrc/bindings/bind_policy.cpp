#include "bindings.hpp"
#include "sidp/mode_policy.hpp"

namespace py = pybind11;

namespace sidp::bindings {

void bind_policy(py::module_& m) {
  py::enum_<Mode>(m, "Mode", "How the streamed layers of one step are used.")
      .value("WAS", Mode::kWas, "layers are copied into the ring ahead of use")
      .value("CAS", Mode::kCas, "activations are sent to the owner of the layer");
  py::class_<MachineProfile>(m, "MachineProfile")
      .def(py::init([](double copy_bytes_per_s, double round_trip_us, double memory_bytes_per_s, double flops_per_s) {
             return MachineProfile{copy_bytes_per_s, round_trip_us, memory_bytes_per_s, flops_per_s};
           }),
           py::kw_only(), py::arg("copy_bytes_per_s"), py::arg("round_trip_us"), py::arg("memory_bytes_per_s"),
           py::arg("flops_per_s"))
      .def_readonly("copy_bytes_per_s", &MachineProfile::copy_bytes_per_s)
      .def_readonly("round_trip_us", &MachineProfile::round_trip_us)
      .def_readonly("memory_bytes_per_s", &MachineProfile::memory_bytes_per_s)
      .def_readonly("flops_per_s", &MachineProfile::flops_per_s);
  py::class_<StepShape>(m, "StepShape")
      .def(py::init([](ByteCount total_bytes, ByteCount streamed_bytes, std::int32_t streamed_layers,
                       std::int32_t ops_per_layer, ByteCount row_bytes, std::int32_t element_bytes) {
             return StepShape{total_bytes, streamed_bytes, streamed_layers, ops_per_layer, row_bytes, element_bytes};
           }),
           py::kw_only(), py::arg("total_bytes"), py::arg("streamed_bytes"), py::arg("streamed_layers"),
           py::arg("ops_per_layer") = 0, py::arg("row_bytes") = 0, py::arg("element_bytes") = 4);
  py::class_<Decision>(m, "Decision")
      .def_readonly("mode", &Decision::mode)
      .def_property_readonly("reason", [](const Decision& d) { return std::string(to_string(d.reason)); })
      .def_readonly("was_ms", &Decision::was_ms)
      .def_readonly("cas_ms", &Decision::cas_ms);
  m.def("predict_step_ms", &predict_step_ms, py::arg("mode"), py::arg("num_tokens"), py::arg("profile"),
        py::arg("shape"), "Predicted milliseconds of a step, pooled weights only (see include/sidp/mode_policy.hpp).");
  m.def(
      "decide",
      [](std::int64_t num_tokens, std::int64_t max_rows, bool peers_available, std::optional<Mode> previous,
         std::optional<double> was_ms, std::optional<double> cas_ms, const StepShape& shape,
         const MachineProfile& profile, std::optional<Mode> fixed, double hysteresis) {
        return decide({num_tokens, max_rows, peers_available, previous, was_ms, cas_ms}, shape, profile,
                      {fixed, hysteresis});
      },
      py::kw_only(), py::arg("num_tokens"), py::arg("max_rows"), py::arg("peers_available"), py::arg("previous"),
      py::arg("was_ms"), py::arg("cas_ms"), py::arg("shape"), py::arg("profile"), py::arg("fixed"),
      py::arg("hysteresis"), "The pure mode policy.");
}

}  // namespace sidp::bindings
