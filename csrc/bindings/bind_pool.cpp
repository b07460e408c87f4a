#include "bindings.hpp"
#include "dlpack.hpp"
#include "sidp/weight_pool.hpp"

namespace py = pybind11;

namespace sidp::bindings {

void bind_pool(py::module_& m) {
  py::class_<ByteView>(m, "ByteView",
                       "Bytes of a pool; torch.from_dlpack() makes a uint8 tensor that keeps them alive.")
      .def_readonly("num_bytes", &ByteView::bytes)
      .def(
          "__dlpack__",
          [](const ByteView& view, const py::object&, const py::object&, const py::object&, const py::object&) {
            return view.dlpack();
          },
          py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
          py::arg("dl_device") = py::none(), py::arg("copy") = py::none(),
          "DLPack's protocol. On a GPU no stream is waited for: the memory is not a stream's.")
      .def("__dlpack_device__", [](const ByteView& view) {
        return std::make_pair(view.dl_device().device_type, view.dl_device().device_id);
      });

  py::class_<WeightPool, std::shared_ptr<WeightPool>>(m, "WeightPool")
      .def(py::init<std::shared_ptr<Backend>, Placement, const std::string&>(), py::arg("backend"),
           py::arg("placement"), py::arg("manifest"), ReleaseGil())
      .def_property_readonly("published", &WeightPool::published)
      .def("is_local", &WeightPool::is_local, py::arg("layer"))
      .def(
          "close_backend", [](WeightPool& pool) { return pool.backend().close(); }, ReleaseGil(),
          "Collective: frees what all ranks allocated together. False if a rank did not come; the memory then stays.")
      .def("publish", &WeightPool::publish, ReleaseGil())
      .def(
          "local_layer",
          [](const std::shared_ptr<WeightPool>& pool, LayerIndex layer) {
            return ByteView{pool->local_layer(layer), pool->placement().layer_bytes(layer), pool,
                            pool->backend().capabilities().device};
          },
          py::arg("layer"), "Bytes of a local layer.")
      .def(
          "ring_view",
          [](const std::shared_ptr<WeightPool>& pool, ByteCount offset, ByteCount bytes) {
            return ByteView{pool->ring() + offset, bytes, pool, pool->backend().capabilities().device};
          },
          py::arg("offset"), py::arg("bytes"), "Bytes of the ring; valid between fetch_layer and release_layer.");
}

}  // namespace sidp::bindings
