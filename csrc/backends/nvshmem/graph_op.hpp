// An op on the GPU: CUDA graphs captured beforehand, one for each place that its rows can come from and row bucket.
// Launching one computes the op and puts the answer, in one call and without Python.
#pragma once

#include <map>
#include <tuple>

#include "device.hpp"
#include "sidp/op.hpp"

namespace sidp::nvshmem {

class GraphOp final : public OpKernel {
 public:
  // Which request a graph answers: rows in the slot of `requester` at `owner`. Where the owner is another rank and the
  // requester this one, it is the stand-in for an owner that no longer answers, on its memory.
  struct Key {
    Rank owner;
    Rank requester;
    std::int64_t rows;
    auto operator<=>(const Key&) const = default;
  };

  explicit GraphOp(std::shared_ptr<const Device> device) : device_(std::move(device)) {}
  ~GraphOp() override;
  GraphOp(const GraphOp&) = delete;
  GraphOp& operator=(const GraphOp&) = delete;

  // Instantiates a captured graph, which may be destroyed afterwards; its memory may not. Throws Error(kDevice).
  void add(const Key& key, CUgraph graph);
  // Throws Error(kUnknownName) if nothing was captured for the key, Error(kDevice).
  void launch(const Key& key, CUstream stream) const;

  // There is no synchronous call on a GPU: throws Error(kUnsupported).
  void run(const std::byte* layer, const std::byte* x, std::int64_t rows, std::byte* y) const override;

 private:
  std::shared_ptr<const Device> device_;
  std::map<Key, CUgraphExec> graphs_;
};

}  // namespace sidp::nvshmem
