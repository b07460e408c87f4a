#include "bindings.hpp"
#include "dlpack.hpp"
#include "sidp/error.hpp"
#include "sidp/runtime.hpp"

namespace py = pybind11;

namespace sidp::bindings {

namespace {

py::typing::Dict<py::str, py::object> to_dict(const RuntimeStats& s) {
  py::dict steps, tokens, decisions;
  for (const Mode mode : {Mode::kWas, Mode::kCas}) {
    const py::str name{std::string(to_string(mode))};
    steps[name] = s.steps[static_cast<std::size_t>(mode)];
    tokens[name] = s.tokens[static_cast<std::size_t>(mode)];
  }
  for (std::size_t i = 0; i < s.decisions.size(); ++i)
    decisions[py::str(std::string(to_string(static_cast<Reason>(i))))] = s.decisions[i];
  py::typing::Dict<py::str, py::object> d;
  d["steps"] = steps;
  d["tokens"] = tokens;
  d["decisions"] = decisions;
  d["steps_broken_off"] = s.steps_broken_off;
  py::list step_times;
  for (const StepHistory::Entry& entry : s.step_times) {
    py::dict times;
    times["mode"] = std::string(to_string(entry.mode));
    times["from_tokens"] = entry.from_tokens;
    times["to_tokens"] = entry.to_tokens;
    times["steps_timed"] = entry.steps;
    times["predicted_ms"] = entry.predicted_ms;
    times["measured_ms"] = entry.measured_ms;
    times["correction"] = entry.correction;
    step_times.append(times);
  }
  d["step_times"] = step_times;
  d["mode_changes"] = s.mode_changes;
  d["last_decision"] = s.last_decision.num_tokens == 0 ? "" : explain(s.last_decision);
  d["fetches"] = s.prefetcher.fetches;
  d["ring_hits"] = s.prefetcher.ring_hits;
  d["fetch_wait_ns"] = s.prefetcher.wait_ns;
  d["layers_drained"] = s.prefetcher.drained;
  d["copies"] = s.prefetcher.lane.copies;
  d["bytes_by_peer"] = s.prefetcher.lane.bytes_by_peer;
  d["copy_ns"] = s.prefetcher.lane.copy_ns;
  d["owners_engines"] = s.prefetcher.lane.owners_engines;
  d["why_read"] = s.prefetcher.lane.why_read;
  d["exclusive_links"] = s.prefetcher.lane.exclusive_links;
  d["link_wait_ns"] = s.prefetcher.lane.link_wait_ns;
  d["links_taken"] = s.prefetcher.lane.links_taken;
  d["lane_wait_ns"] = s.prefetcher.lane.wait_ns;
  d["requests_by_peer"] = s.requester.requests_by_peer;
  d["request_rows"] = s.requester.rows_sent;
  d["request_bytes"] = s.requester.bytes_sent;
  d["reply_wait_ns"] = s.requester.wait_ns;
  d["fallbacks"] = s.requester.fallbacks;
  d["served_by_peer"] = s.service.served_by_peer;
  d["deferred"] = s.service.deferred;
  d["served_rows"] = s.service.rows;
  d["served_failed"] = s.service.failed;
  d["served_compute_ns"] = s.service.compute_ns;
  return d;
}

using Rows = std::tuple<std::uintptr_t, std::int64_t, ByteCount>;  // row-major memory: address, rows, bytes a row

Stream stream_of(std::uintptr_t handle) { return {reinterpret_cast<void*>(handle)}; }

void remote_compute(Runtime& runtime, LayerIndex layer, OpIndex op, const Rows& x, const Rows& y,
                    std::uintptr_t stream) {
  const auto [x_address, x_rows, x_row_bytes] = x;
  const auto [y_address, y_rows, y_row_bytes] = y;
  if (runtime.mailbox() != nullptr && op >= 0 && static_cast<std::size_t>(op) < runtime.mailbox()->ops().size()) {
    const Op& entry = runtime.mailbox()->ops()[static_cast<std::size_t>(op)];
    const std::int64_t bucket = runtime.mailbox()->bucket(layer, x_rows);
    if (x_row_bytes != entry.in_row_bytes || y_row_bytes != entry.out_row_bytes || y_rows != bucket)
      throw Error(ErrorCode::kShape,
                  "op '" + entry.name + "' takes rows of " + std::to_string(entry.in_row_bytes) + " bytes and gives " +
                      std::to_string(entry.out_row_bytes) + "; x has " + std::to_string(x_rows) + " rows of " +
                      std::to_string(x_row_bytes) + ", y " + std::to_string(y_rows) + " of " +
                      std::to_string(y_row_bytes) + " where " + std::to_string(bucket) + " rows come back",
                  {.layer = layer});
  }
  runtime.remote_compute(stream_of(stream), layer, op, reinterpret_cast<const std::byte*>(x_address), x_rows,
                         reinterpret_cast<std::byte*>(y_address));
}

}  // namespace

void bind_runtime(py::module_& m) {
  m.attr("SPIN_ROWS") = kSpinRows;
  py::enum_<StepKind>(m, "StepKind", "How the calls of a step reach the device.")
      .value("RUN", StepKind::kRun)
      .value("CAPTURE", StepKind::kCapture)
      .value("REPLAY", StepKind::kReplay);
  py::class_<Runtime, std::shared_ptr<Runtime>>(m, "Runtime")
      .def(py::init([](std::shared_ptr<WeightPool> pool, std::vector<Op> ops, std::int64_t deadline_ms,
                       std::int64_t max_rows, ByteCount row_bytes, std::int32_t element_bytes,
                       const MachineProfile& profile, std::optional<Mode> fixed,
                       std::vector<std::pair<std::int64_t, Mode>> fixed_sizes, double hysteresis,
                       std::vector<std::int64_t> row_buckets, bool deferred_start, std::int64_t spin_rows,
                       bool owners_engines, bool exclusive_links, std::uint32_t test_lane_delay_us,
                       std::uint32_t test_service_delay_us) {
             RuntimeOptions options;
             options.deadline = Milliseconds(deadline_ms);
             options.max_rows = max_rows;
             options.row_bytes = row_bytes;
             options.ops_per_layer = static_cast<std::int32_t>(ops.size());
             options.element_bytes = element_bytes;
             options.profile = profile;
             options.policy = {fixed, std::move(fixed_sizes), hysteresis};
             options.row_buckets = std::move(row_buckets);
             options.deferred_start = deferred_start;
             options.spin_rows = spin_rows;
             options.lane.owners_engines = owners_engines;
             options.lane.exclusive_links = exclusive_links;
             options.lane.test_delay_us = test_lane_delay_us;
             options.service.test_delay_us = test_service_delay_us;
             return std::make_shared<Runtime>(std::move(pool), std::move(ops), options);
           }),
           py::arg("pool"), py::arg("ops"), py::kw_only(), py::arg("deadline_ms"), py::arg("max_rows"),
           py::arg("row_bytes"), py::arg("element_bytes"), py::arg("profile"), py::arg("fixed"), py::arg("fixed_sizes"),
           py::arg("hysteresis"), py::arg("row_buckets") = std::vector<std::int64_t>{},
           py::arg("deferred_start") = false, py::arg("spin_rows") = kSpinRows, py::arg("owners_engines") = true,
           py::arg("exclusive_links") = true, py::arg("test_lane_delay_us") = 0, py::arg("test_service_delay_us") = 0,
           ReleaseGil())
      .def(
          "start", &Runtime::start, py::arg("failure") = "", ReleaseGil(),
          "Collective after deferred_start: begins to answer the other ranks. failure: why this one cannot; all raise.")
      .def(
          "begin_step",
          [](Runtime& r, std::int64_t num_tokens, std::uintptr_t stream, StepKind kind, std::optional<Mode> mode) {
            return r.begin_step(stream_of(stream), num_tokens, kind, mode);
          },
          py::arg("num_tokens"), py::arg("stream") = 0, py::arg_v("kind", StepKind::kRun, "StepKind.RUN"),
          py::arg("mode") = py::none(), ReleaseGil())
      .def("preview", &Runtime::preview, py::arg("num_tokens"), "What the policy would decide now; nothing begins.")
      .def("predict", &Runtime::predict, py::arg("num_tokens"), "Predicted times of such a step, uncorrected.")
      .def("check_launch", &Runtime::check_launch, "Raises unless a graph may be launched now, in a replay step.")
      .def("launched", &Runtime::launched, ReleaseGil(), "It has been launched; call at once.")
      .def("end_step", &Runtime::end_step, py::arg("broken_off"), ReleaseGil())
      .def("check", &Runtime::check, "Throws if a stream-ordered request was not answered.")
      .def(
          "fetch_layer",
          [](Runtime& r, LayerIndex layer, std::uintptr_t stream) { r.fetch_layer(stream_of(stream), layer); },
          py::arg("layer"), py::arg("stream") = 0, ReleaseGil(),
          "Waits for the layer, or makes the stream wait; its bytes are at the address that the placement gives.")
      .def(
          "release_layer",
          [](Runtime& r, LayerIndex layer, std::uintptr_t stream) { r.release_layer(stream_of(stream), layer); },
          py::arg("layer"), py::arg("stream") = 0, ReleaseGil())
      .def("remote_compute", &remote_compute, py::arg("layer"), py::arg("op"), py::arg("x"), py::arg("y"),
           py::arg("stream") = 0, ReleaseGil(),
           "y = op(layer, x); x and y: (address, rows, bytes a row) of row-major memory on the pool's device, which "
           "must "
           "outlive the call, and on a GPU the work that the stream has then. y at address 0: the answer is lent().")
      .def(
          "lent",
          [](const std::shared_ptr<Runtime>& r, LayerIndex layer, std::int64_t rows,
             ByteCount num_bytes) -> std::optional<ByteView> {
            auto* const bytes = const_cast<std::byte*>(r->lent(layer, rows));
            if (bytes == nullptr) return std::nullopt;
            return ByteView{bytes, num_bytes, r, r->pool().backend().capabilities().device};
          },
          py::arg("layer"), py::arg("rows"), py::arg("num_bytes"),
          "Where the answer to a request of so many rows is when it is not copied; None: it always is.")
      .def(
          "bucket",
          [](const Runtime& r, LayerIndex layer, std::int64_t rows) { return r.mailbox()->bucket(layer, rows); },
          py::arg("layer"), py::arg("rows"), "Rows of the result that a request of so many rows needs room for.")
      .def("stats",
           [](const Runtime& r) {
             RuntimeStats stats;
             {
               const py::gil_scoped_release released;  // it asks the device
               stats = r.stats();
             }
             return to_dict(stats);
           })
      .def("start_trace", &Runtime::start_trace, py::arg("num_events"), ReleaseGil(),
           "Records what this rank does, between steps; see include/sidp/trace.hpp.")
      .def("stop_trace", &Runtime::stop_trace, ReleaseGil(), "Cuts an open step, which goes on; also once closed.")
      .def("close", &Runtime::close, ReleaseGil(),
           "False if a stream is still at work: keep the memory of captured ops.");
}

}  // namespace sidp::bindings
