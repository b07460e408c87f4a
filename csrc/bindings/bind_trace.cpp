#include "bindings.hpp"
#include "sidp/trace.hpp"

namespace py = pybind11;

namespace sidp::bindings {

void bind_trace(py::module_& m) {
  py::class_<TraceEvent>(m, "TraceEvent", "A span of a trace; see include/sidp/trace.hpp.")
      .def_property_readonly("kind", [](const TraceEvent& e) { return std::string(to_string(e.kind)); })
      .def_property_readonly("track", [](const TraceEvent& e) { return std::string(to_string(e.track)); })
      .def_readonly("on_stream", &TraceEvent::on_stream, "times of the device; otherwise of the calling thread")
      .def_readonly("broken_off", &TraceEvent::broken_off)
      .def_readonly("mode", &TraceEvent::mode)
      .def_property_readonly("reason", [](const TraceEvent& e) { return std::string(to_string(e.reason)); })
      .def_readonly("layer", &TraceEvent::layer)
      .def_readonly("op", &TraceEvent::op)
      .def_readonly("peer", &TraceEvent::peer)
      .def_readonly("rows", &TraceEvent::rows)
      .def_readonly("bytes", &TraceEvent::bytes)
      .def_readonly("begin", &TraceEvent::begin, "nanoseconds of CLOCK_MONOTONIC, which processes of a host share")
      .def_readonly("end", &TraceEvent::end);
  py::class_<Trace>(m, "Trace")
      .def_readonly("events", &Trace::events)
      .def_readonly("dropped", &Trace::dropped)
      .def_readonly("unfinished", &Trace::unfinished)
      .def_readonly("stream_error_ns", &Trace::stream_error_ns);
}

}  // namespace sidp::bindings
