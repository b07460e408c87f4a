#include "backends/host/flag.hpp"
#include "backends/host/host_backend.hpp"
#include "backends/registry.hpp"
#include "bindings.hpp"

namespace py = pybind11;

namespace sidp::bindings {

namespace {

// Calls a Python function (key: str, payload: bytes) -> list[bytes]. Set-up only: nothing of a step comes here.
class PythonBootstrap final : public Bootstrap {
 public:
  explicit PythonBootstrap(py::function all_gather) : all_gather_(std::move(all_gather)) {}
  ~PythonBootstrap() override {
    const py::gil_scoped_acquire gil;
    all_gather_ = py::function();
  }
  PythonBootstrap(const PythonBootstrap&) = delete;
  PythonBootstrap& operator=(const PythonBootstrap&) = delete;

  std::vector<std::string> all_gather(const std::string& key, const std::string& payload) override {
    const py::gil_scoped_acquire gil;
    std::vector<std::string> all;
    for (const auto item : all_gather_(key, py::bytes(payload))) all.push_back(item.cast<std::string>());
    return all;
  }

 private:
  py::function all_gather_;
};

}  // namespace

void bind_backend(py::module_& m) {
  py::class_<Backend, std::shared_ptr<Backend>>(m, "Backend")
      .def_property_readonly("name", [](const Backend& backend) { return backend.capabilities().name; })
      .def_property_readonly("rank", &Backend::rank)
      .def_property_readonly("world_size", &Backend::world_size)
      .def("alive", &Backend::alive, py::arg("rank"), "False once the rank has left or its process has ended.");
  m.def("backend_names", &backend_names, "Backends of this build.");
  m.def(
      "make_backend",
      [](const std::string& name, Rank rank, Rank world_size, const std::string& token,
         const py::typing::Callable<py::typing::List<py::bytes>(py::str, py::bytes)>& all_gather, int device,
         std::vector<int> gpus, std::int64_t deadline_ms, bool test_without_mappings) {
        return make_backend(
            {name, rank, world_size, token, device, std::move(gpus), Milliseconds(deadline_ms), test_without_mappings},
            std::make_shared<PythonBootstrap>(all_gather));
      },
      py::arg("name"), py::arg("rank"), py::arg("world_size"), py::arg("token"), py::arg("all_gather"),
      py::arg("device") = -1, py::arg("gpus") = std::vector<int>{}, py::arg("deadline_ms") = 30000,
      py::arg("test_without_mappings") = false);
  m.def("measure_round_trip_us", &host::measure_round_trip_us, py::arg("rounds"), ReleaseGil(),
        "Median microseconds of a round trip between two threads through the host backend's flags.");
  m.def("unlink_segments", &host::unlink_segments, py::arg("token"), py::arg("world_size"),
        "Removes the shared memory names that a group can have left when ranks died in start-up.");
}

}  // namespace sidp::bindings
