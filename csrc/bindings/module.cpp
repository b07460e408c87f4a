#include "bindings.hpp"

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ core of sidp_runtime. Use the Python classes of sidp_runtime instead.";
  sidp::bindings::bind_exceptions(m);
  sidp::bindings::bind_placement(m);
  sidp::bindings::bind_backend(m);
  sidp::bindings::bind_ops(m);
  sidp::bindings::bind_policy(m);
  sidp::bindings::bind_pool(m);
  sidp::bindings::bind_trace(m);
  sidp::bindings::bind_runtime(m);
  sidp::bindings::bind_cuda(m);
  sidp::bindings::bind_graphs(m);
}
