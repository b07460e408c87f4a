#include <algorithm>

#include "bindings.hpp"
#include "sidp/placement.hpp"

namespace py = pybind11;

namespace sidp::bindings {

void bind_placement(py::module_& m) {
  m.attr("ALIGNMENT") = kAlignment;
  m.attr("LINK_GRACE_SHARE") = kLinkGraceShare;
  m.def(
      "next_reader",
      [](Rank last, Rank world_size, const std::vector<Rank>& waiting) {
        return next_reader(last, world_size, [&](Rank reader) {
          return std::find(waiting.begin(), waiting.end(), reader) != waiting.end();
        });
      },
      py::arg("last"), py::arg("world_size"), py::arg("waiting"),
      "Whom an owner's link serves next: the first of last-1, last-2 ... (modulo world_size) that waits, or -1.");
  py::class_<RingEntry>(m, "RingEntry", "One copy of a step: a layer, its slot and the layer to be released first.")
      .def_readonly("layer", &RingEntry::layer)
      .def_readonly("slot", &RingEntry::slot)
      .def_readonly("offset", &RingEntry::offset)
      .def_readonly("bytes", &RingEntry::bytes)
      .def_readonly("after_layer", &RingEntry::after_layer);
  py::class_<Placement>(m, "Placement", "Who owns which layer, and where everything lies. Pure: equal on all ranks.")
      .def_static(
          "by_layer",
          [](const std::vector<ByteCount>& layer_bytes, Rank world_size, std::int32_t ring_slots,
             const std::vector<LayerIndex>& resident_layers) {
            return Placement::by_layer(layer_bytes, {world_size, ring_slots, resident_layers});
          },
          py::arg("layer_bytes"), py::arg("world_size"), py::kw_only(), py::arg("ring_slots") = 2,
          py::arg("resident_layers") = std::vector<LayerIndex>{},
          "Whole layers in order, each to the rank that holds fewest bytes so far.\n\n"
          "layer_bytes: bytes of each layer, above 0. ring_slots: upper bound of a rank's slots. resident_layers: kept "
          "on\n"
          "every rank. No rank holds more than total / world_size + the largest layer. Raises ConfigError.")
      .def_property_readonly("world_size", &Placement::world_size)
      .def_property_readonly("num_layers", &Placement::num_layers)
      .def_property_readonly("resident_bytes", &Placement::resident_bytes,
                             "Bytes of the resident layers, on each rank.")
      .def("layer_bytes", &Placement::layer_bytes, py::arg("layer"))
      .def("owner", &Placement::owner, py::arg("layer"), "Owner of a layer; -1 for a resident one.")
      .def("is_resident", &Placement::is_resident, py::arg("layer"))
      .def("is_local", &Placement::is_local, py::arg("rank"), py::arg("layer"))
      .def("offset", &Placement::offset, py::arg("layer"), "Bytes from the start of the owner's pool.")
      .def("pool_bytes", &Placement::pool_bytes, py::arg("rank"), "Bytes of the layers that the rank owns.")
      .def("streamed_layers", &Placement::streamed_layers, py::arg("rank"), "Layers owned elsewhere, in order of use.")
      .def("ring_plan", &Placement::ring_plan, py::arg("rank"))
      .def("num_slots", &Placement::num_slots, py::arg("rank"))
      .def("slot_bytes", &Placement::slot_bytes, py::arg("rank"))
      .def("ring_bytes", &Placement::ring_bytes, py::arg("rank"));
}

}  // namespace sidp::bindings
