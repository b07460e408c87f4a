#include "bindings.hpp"
#include "cuda/copy_rates.hpp"
#include "cuda/device_info.hpp"

namespace py = pybind11;

namespace sidp::bindings {

namespace {

py::typing::Dict<py::str, py::object> to_dict(const cuda::DeviceInfo& device) {
  py::typing::Dict<py::str, py::object> out;
  out["ordinal"] = device.ordinal;
  out["name"] = device.name;
  out["uuid"] = device.uuid;
  out["memory_bytes"] = device.memory_bytes;
  out["compute_capability"] = py::make_tuple(device.compute_capability_major, device.compute_capability_minor);
  out["num_sms"] = device.num_sms;
  out["num_async_engines"] = device.num_async_engines;
  out["stream_mem_ops_64bit"] = device.stream_mem_ops_64bit;
  out["stream_wait_value_nor"] = device.stream_wait_value_nor;
  out["flush_remote_writes"] = device.flush_remote_writes;
  out["can_access_peer"] = device.can_access_peer;
  return out;
}

py::typing::Dict<py::str, py::object> cuda_report() {
  cuda::CudaReport report;
  {
    const py::gil_scoped_release unlocked;  // loading the driver can take seconds
    report = cuda::cuda_report();
  }
  py::list devices;
  for (const auto& device : report.devices) devices.append(to_dict(device));
  py::typing::Dict<py::str, py::object> out;
  out["compiled"] = report.compiled;
  out["compiled_version"] = report.compiled_version;
  out["driver"] = report.driver;
  out["reason"] = report.reason;
  out["devices"] = devices;
  return out;
}

py::typing::Dict<py::str, py::object> measure_copies(std::int64_t budget_ms) {
  cuda::CopyRates found;
  {
    const py::gil_scoped_release unlocked;
    found = cuda::measure_copies(std::chrono::milliseconds(budget_ms));
  }
  py::list rates;
  for (const auto& rate : found.rates) {
    py::dict entry;
    entry["src"] = rate.src;
    entry["dst"] = rate.dst;
    entry["direct"] = rate.direct;
    entry["gbps"] = rate.gbps;
    rates.append(entry);
  }
  py::typing::Dict<py::str, py::object> out;
  out["reason"] = found.reason;
  out["rates"] = rates;
  return out;
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_report", &cuda_report,
        R"(What the CUDA driver says about this machine; never raises for what is missing.

Keys: ``compiled`` (this build has the CUDA part), ``compiled_version`` (of the headers, "13.0" or None),
``driver`` (CUDA version that the driver supports, or None), ``reason`` (why no device can be used, "" when one
can), ``devices`` (one dict each: ordinal, name, uuid, memory_bytes, compute_capability, num_sms,
num_async_engines, stream_mem_ops_64bit, stream_wait_value_nor, flush_remote_writes, and can_access_peer, a list
of bool by ordinal). The driver is initialised: a process forked afterwards cannot use CUDA.)");
  m.def("measure_copies", &measure_copies, py::arg("budget_ms"),
        R"(Measures copy-engine rates between the GPUs, for `budget_ms` in all; never raises for what is missing.

Keys: ``reason`` (why nothing was measured, "" when it was), ``rates`` (one dict for each ordered pair: ``src`` and
``dst``, ordinals; ``direct``, dst maps the memory of src, else the copies go through host memory; ``gbps``, 1e9 bytes
a second, the best of several rounds of 64 MiB copies). It starts CUDA on every GPU and a driver that hangs hangs it:
for a process of its own.)");
}

}  // namespace sidp::bindings
