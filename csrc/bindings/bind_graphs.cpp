// What the capture of ops on a GPU needs; without the GPU backend in this build the calls raise UnsupportedError.
#include "bindings.hpp"
#include "dlpack.hpp"
#include "sidp/runtime.hpp"
#ifdef SIDP_HAS_NVSHMEM
#include "backends/nvshmem/nvshmem_backend.hpp"
#include "backends/nvshmem/one_sided.hpp"
#include "backends/nvshmem/stream_channel.hpp"
#endif

namespace py = pybind11;

namespace sidp::bindings {

namespace {

[[noreturn]] [[maybe_unused]] void not_here() {
  throw Error(ErrorCode::kUnsupported, "this needs the nvshmem backend");
}

#ifdef SIDP_HAS_NVSHMEM

using nvshmem::OneSided;

const nvshmem::StreamChannel& channel_of(const Runtime& runtime) {
  const auto* channel = dynamic_cast<const nvshmem::StreamChannel*>(runtime.channel());
  if (channel == nullptr) not_here();
  return *channel;
}

std::shared_ptr<OpKernel> graph_op(Backend& backend) {
  auto* gpu = dynamic_cast<nvshmem::NvshmemBackend*>(&backend);
  if (gpu == nullptr) not_here();
  return std::make_shared<nvshmem::GraphOp>(gpu->device());
}

void add_graph(OpKernel& op, Rank owner, Rank requester, std::int64_t rows, std::uintptr_t graph) {
  auto* captured = dynamic_cast<nvshmem::GraphOp*>(&op);
  if (captured == nullptr) not_here();
  captured->add({owner, requester, rows}, reinterpret_cast<CUgraph>(graph));
}

ByteView request_slot(const std::shared_ptr<Runtime>& runtime, Rank owner, Rank requester, ByteCount bytes) {
  auto* rows = const_cast<std::byte*>(channel_of(*runtime).slot(owner, requester));
  return {rows, bytes, runtime, runtime->pool().backend().capabilities().device};
}

void await_rows(const Runtime& runtime, Rank owner, Rank requester, std::int64_t rows, ByteCount bytes,
                std::uintptr_t stream) {
  channel_of(runtime).await_rows({reinterpret_cast<void*>(stream)}, {owner, requester, rows}, bytes);
}

void put_answer(const Runtime& runtime, Rank owner, Rank requester, std::int64_t rows,
                const std::vector<std::pair<std::uintptr_t, ByteCount>>& sources, std::uintptr_t stream) {
  std::vector<std::pair<const std::byte*, ByteCount>> blocks;
  for (const auto& [address, bytes] : sources) blocks.emplace_back(reinterpret_cast<const std::byte*>(address), bytes);
  channel_of(runtime).put_answer({reinterpret_cast<void*>(stream)}, {owner, requester, rows}, blocks);
}

std::uintptr_t service_stream(const Runtime& runtime) {
  return reinterpret_cast<std::uintptr_t>(channel_of(runtime).service_stream());
}

ByteView peer_layer(const std::shared_ptr<WeightPool>& pool, LayerIndex layer) {
  auto* bytes = const_cast<std::byte*>(pool->peer_layer(layer));
  if (bytes == nullptr)
    throw Error(ErrorCode::kUnsupported, "layer " + std::to_string(layer) + " is not mapped here", {.layer = layer});
  return {bytes, pool->placement().layer_bytes(layer), pool, pool->backend().capabilities().device};
}

std::unique_ptr<OneSided> one_sided(int device) {
  const py::gil_scoped_release release;
  return std::make_unique<OneSided>(device);
}
void put(const OneSided& puts, std::uintptr_t dst, std::uintptr_t src, ByteCount num_bytes, std::uintptr_t flag,
         std::uintptr_t stream) {
  puts.put(reinterpret_cast<CUstream>(stream), dst, src, num_bytes, flag);
}
void wait(const OneSided& puts, std::uintptr_t flag, std::uintptr_t stream) {
  puts.wait(reinterpret_cast<CUstream>(stream), flag);
}

#else

struct OneSided {  // never made
  void release() const {}
  [[nodiscard]] bool failed() const { return false; }
};
std::unique_ptr<OneSided> one_sided(int) { not_here(); }
void put(const OneSided&, std::uintptr_t, std::uintptr_t, ByteCount, std::uintptr_t, std::uintptr_t) { not_here(); }
void wait(const OneSided&, std::uintptr_t, std::uintptr_t) { not_here(); }
std::shared_ptr<OpKernel> graph_op(Backend&) { not_here(); }
void add_graph(OpKernel&, Rank, Rank, std::int64_t, std::uintptr_t) { not_here(); }
ByteView request_slot(const std::shared_ptr<Runtime>&, Rank, Rank, ByteCount) { not_here(); }
void await_rows(const Runtime&, Rank, Rank, std::int64_t, ByteCount, std::uintptr_t) { not_here(); }
void put_answer(const Runtime&, Rank, Rank, std::int64_t, const std::vector<std::pair<std::uintptr_t, ByteCount>>&,
                std::uintptr_t) {
  not_here();
}
std::uintptr_t service_stream(const Runtime&) { not_here(); }
ByteView peer_layer(const std::shared_ptr<WeightPool>&, LayerIndex) { not_here(); }

#endif

}  // namespace

void bind_graphs(py::module_& m) {
  py::class_<OneSided>(m, "OneSided",
                       "Rows and a flag to another GPU, and the wait for a flag; see backends/nvshmem/one_sided.hpp. "
                       "Addresses are of memory of this GPU or mapped here. Lives as long as graphs made with it.")
      .def(py::init(&one_sided), py::arg("device"))
      .def("put", &put, py::arg("dst"), py::arg("src"), py::arg("num_bytes"), py::arg("flag"), py::arg("stream"),
           ReleaseGil(), "Enqueues a copy and then a 1 in the 32 bits of the flag.")
      .def("wait", &wait, py::arg("flag"), py::arg("stream"), ReleaseGil(),
           "Makes the stream wait for a flag in this GPU's memory, and sets it to 0.")
      .def("release", &OneSided::release, "Ends all waits, for a peer that died. From any thread.")
      .def("failed", &OneSided::failed, "Whether a wait ended by release().");
  m.def("graph_op", &graph_op, py::arg("backend"), "An op that runs as captured CUDA graphs; add_graph() fills it.");
  m.def("add_graph", &add_graph, py::arg("op"), py::arg("owner"), py::arg("requester"), py::arg("rows"),
        py::arg("graph"),
        "graph: a cudaGraph_t that begins with await_rows(), computes `rows` rows from request_slot() and ends in "
        "put_answer().");
  m.def("request_slot", &request_slot, py::arg("runtime"), py::arg("owner"), py::arg("requester"), py::arg("bytes"),
        "The slot that a requester's rows come to at an owner, as mapped here.");
  m.def("await_rows", &await_rows, py::arg("runtime"), py::arg("owner"), py::arg("requester"), py::arg("rows"),
        py::arg("bytes"), py::arg("stream"),
        "Enqueues the wait for the rows of a request, `bytes` in request_slot(), where it is announced before them.");
  m.def("put_answer", &put_answer, py::arg("runtime"), py::arg("owner"), py::arg("requester"), py::arg("rows"),
        py::arg("sources"), py::arg("stream"),
        "Enqueues the answer to a request of `rows` rows, a bucket: sources are (address, bytes), one after the other "
        "into the slot.");
  m.def("service_stream", &service_stream, py::arg("runtime"), "The stream that the owner's graphs are launched on.");
  m.def("peer_layer", &peer_layer, py::arg("pool"), py::arg("layer"),
        "A streamed layer at its owner as mapped here; read-only.");
}

}  // namespace sidp::bindings
