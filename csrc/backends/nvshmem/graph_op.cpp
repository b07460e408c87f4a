#include "graph_op.hpp"

#include "sidp/error.hpp"

namespace sidp::nvshmem {

GraphOp::~GraphOp() {
  const ContextScope scope(*device_);
  for (const auto& [key, graph] : graphs_) device_->api().cuGraphExecDestroy(graph);
}

void GraphOp::add(const Key& key, CUgraph graph) {
  const ContextScope scope(*device_);
  if (graphs_.contains(key)) throw Error(ErrorCode::kUsage, "an op was captured twice for one slot and row count");
  CUgraphExec executable = nullptr;
  device_->check(device_->api().cuGraphInstantiate(&executable, graph, 0), "cuGraphInstantiate of an op");
  graphs_.emplace(key, executable);
}

void GraphOp::launch(const Key& key, CUstream stream) const {
  const auto it = graphs_.find(key);
  if (it == graphs_.end())
    throw Error(ErrorCode::kUnknownName, "no graph was captured for " + std::to_string(key.rows) + " rows of rank " +
                                             std::to_string(key.requester) + " at rank " + std::to_string(key.owner));
  device_->check(device_->api().cuGraphLaunch(it->second, stream), "cuGraphLaunch of an op");
}

void GraphOp::run(const std::byte*, const std::byte*, std::int64_t, std::byte*) const {
  throw Error(ErrorCode::kUnsupported, "an op on a GPU runs as a captured graph only");
}

}  // namespace sidp::nvshmem
