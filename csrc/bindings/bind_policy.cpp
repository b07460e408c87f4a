#include "bindings.hpp"
#include "sidp/mode_policy.hpp"

namespace py = pybind11;

namespace sidp::bindings {

namespace {

struct PolicySimulation {
  StepShape shape;
  MachineProfile profile;
  std::int64_t max_rows;
  PolicyConfig config;
  StepHistory history;
};

}  // namespace

void bind_policy(py::module_& m) {
  py::enum_<Mode>(m, "Mode", "How the streamed layers of one step are used.")
      .value("WAS", Mode::kWas, "layers are copied into the ring ahead of use")
      .value("CAS", Mode::kCas, "activations are sent to the owner of the layer");
  py::class_<MachineProfile>(m, "MachineProfile")
      .def(py::init([](double copy_bytes_per_s, double round_trip_us, double memory_bytes_per_s, double flops_per_s,
                       double copy_latency_us, double request_bytes_per_s,
                       std::vector<std::pair<double, double>> products) {
             return MachineProfile{copy_bytes_per_s, round_trip_us,       memory_bytes_per_s, flops_per_s,
                                   copy_latency_us,  request_bytes_per_s, std::move(products)};
           }),
           py::kw_only(), py::arg("copy_bytes_per_s"), py::arg("round_trip_us"), py::arg("memory_bytes_per_s"),
           py::arg("flops_per_s"), py::arg("copy_latency_us") = 0.0, py::arg("request_bytes_per_s") = 0.0,
           py::arg("products") = std::vector<std::pair<double, double>>{});
  py::class_<StepShape>(m, "StepShape")
      .def(py::init([](ByteCount total_bytes, ByteCount streamed_bytes, ByteCount resident_bytes,
                       std::int32_t streamed_layers, std::int32_t ops_per_layer, ByteCount row_bytes,
                       std::int32_t element_bytes, Rank world_size) {
             return StepShape{total_bytes,   streamed_bytes, resident_bytes, streamed_layers,
                              ops_per_layer, row_bytes,      element_bytes,  world_size};
           }),
           py::kw_only(), py::arg("total_bytes"), py::arg("streamed_bytes"), py::arg("resident_bytes") = 0,
           py::arg("streamed_layers"), py::arg("ops_per_layer") = 0, py::arg("row_bytes") = 0,
           py::arg("element_bytes") = 4, py::arg("world_size") = 2);
  py::class_<StepTimes>(m, "StepTimes")
      .def_readonly("local_s", &StepTimes::local_s)
      .def_readonly("copy_s", &StepTimes::copy_s)
      .def_readonly("work_s", &StepTimes::work_s)
      .def_readonly("was_floor_s", &StepTimes::was_floor_s)
      .def_readonly("was_s", &StepTimes::was_s)
      .def_readonly("cas_s", &StepTimes::cas_s);
  py::class_<Decision>(m, "Decision")
      .def_readonly("mode", &Decision::mode)
      .def_property_readonly("reason", [](const Decision& d) { return std::string(to_string(d.reason)); })
      .def_property_readonly("explanation", &explain)
      .def_readonly("was_ms", &Decision::was_ms)
      .def_readonly("cas_ms", &Decision::cas_ms)
      .def_readonly("margin", &Decision::margin);
  m.attr("LARGEST_SIMULATED") = kLargestSimulated;
  m.def("step_over_stream", &step_over_stream, py::arg("world_size"), py::arg("work"),
        "A WaS step in units of the stream alone, with so many units of compute beside it.");
  m.def("products_s", &products_s, py::arg("num_bytes"), py::arg("rows"), py::arg("profile"), py::arg("element_bytes"),
        "Seconds of matrix products of so many rows with weights of so many bytes.");
  m.def("predict_step", &predict_step, py::arg("rows"), py::arg("profile"), py::arg("shape"), py::arg("other_s") = 0.0,
        "Predicted seconds of a step; other_s: its work besides the pool's products.");
  m.def(
      "check_policy", [](const MachineProfile& profile) { check_policy({}, profile, {}); }, py::arg("profile"),
      "Raises ConfigError for a profile that makes no sense.");
  m.def(
      "decide",
      [](std::int64_t num_tokens, std::int64_t max_rows, std::optional<Rank> unavailable_peer,
         std::optional<Mode> previous, std::uint32_t recent_changes, std::pair<double, std::uint32_t> was,
         std::pair<double, std::uint32_t> cas, const StepShape& shape, const MachineProfile& profile,
         std::optional<Mode> fixed, std::vector<std::pair<std::int64_t, Mode>> fixed_sizes, double hysteresis) {
        const PolicyConfig config{fixed, std::move(fixed_sizes), hysteresis};
        check_policy(shape, profile, config);
        return decide({num_tokens,
                       max_rows,
                       unavailable_peer,
                       previous,
                       recent_changes,
                       {was.first, was.second},
                       {cas.first, cas.second}},
                      shape, profile, config);
      },
      py::kw_only(), py::arg("num_tokens"), py::arg("max_rows"), py::arg("unavailable_peer") = py::none(),
      py::arg("previous") = py::none(), py::arg("recent_changes") = 0,
      py::arg("was") = std::pair<double, std::uint32_t>{1.0, 0},
      py::arg("cas") = std::pair<double, std::uint32_t>{1.0, 0}, py::arg("shape"), py::arg("profile"),
      py::arg("fixed") = py::none(), py::arg("fixed_sizes") = std::vector<std::pair<std::int64_t, Mode>>{},
      py::arg("hysteresis") = 0.1, "The pure mode policy; was, cas: correction and the timed steps that it rests on.");
  py::class_<PolicySimulation>(m, "PolicySimulation", "The policy and its history without a runtime: for tests.")
      .def(
          py::init([](const StepShape& shape, const MachineProfile& profile, std::int64_t max_rows, double hysteresis) {
            check_policy(shape, profile, {.hysteresis = hysteresis});
            return PolicySimulation{shape, profile, max_rows, {.hysteresis = hysteresis}, {}};
          }),
          py::kw_only(), py::arg("shape"), py::arg("profile"), py::arg("max_rows"), py::arg("hysteresis") = 0.1)
      .def(
          "step",
          [](PolicySimulation& s, std::int64_t num_tokens, double was_ms, double cas_ms) {
            PolicySnapshot snapshot{.num_tokens = num_tokens, .max_rows = s.max_rows};
            s.history.fill(snapshot);
            const Decision decision = decide(snapshot, s.shape, s.profile, s.config);
            const bool was = decision.mode == Mode::kWas;
            const bool wanted = s.history.wants(decision.mode, num_tokens);
            s.history.ran(decision);
            const StepTimes times = predict_step(static_cast<double>(num_tokens), s.profile, s.shape);
            if (wanted)
              s.history.timed(decision.mode, num_tokens, 1e3 * (was ? times.was_s : times.cas_s),
                              was ? was_ms : cas_ms);
            return decision;
          },
          py::arg("num_tokens"), py::arg("was_ms"), py::arg("cas_ms"),
          "Decides, and times the step with what it would take in the chosen mode.")
      .def_property_readonly("changes", [](const PolicySimulation& s) { return s.history.changes(); });
}

}  // namespace sidp::bindings
