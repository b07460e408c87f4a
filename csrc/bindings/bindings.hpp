// The only folder that includes Python. One bind_<component>.cpp each.
//
// The GIL is the outermost lock: calls that can block, allocate or copy release it, library threads never take it, and
// the bootstrap (set-up only) takes it back for the call into Python.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

namespace sidp::bindings {

void bind_exceptions(pybind11::module_& m);
void bind_placement(pybind11::module_& m);
void bind_backend(pybind11::module_& m);
void bind_ops(pybind11::module_& m);
void bind_policy(pybind11::module_& m);
void bind_pool(pybind11::module_& m);
void bind_trace(pybind11::module_& m);
void bind_runtime(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);
void bind_graphs(pybind11::module_& m);

using ReleaseGil = pybind11::call_guard<pybind11::gil_scoped_release>;

}  // namespace sidp::bindings
