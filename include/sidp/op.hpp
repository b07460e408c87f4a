// Ops: token-wise functions of a layer, the unit of remote_compute.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "sidp/types.hpp"

namespace sidp {

// Computes an op from a layer's bytes. One object serves every copy of a layer: the owner's, a ring slot, a peer's
// mapping. run() is called from the service thread and from the engine's thread at once, and never with the GIL needed.
class OpKernel {
 public:
  virtual ~OpKernel() = default;
  // x: `rows` rows of in_row_bytes, y: room for `rows` rows of out_row_bytes, both contiguous. An op with several
  // outputs writes them one after the other, each as a block of `rows` rows. Throws std::exception on failure.
  virtual void run(const std::byte* layer, const std::byte* x, std::int64_t rows, std::byte* y) const = 0;
};

// An OpKernel from a C++ callable.
class FunctionOpKernel final : public OpKernel {
 public:
  using Function = std::function<void(const std::byte*, const std::byte*, std::int64_t, std::byte*)>;
  explicit FunctionOpKernel(Function function) : function_(std::move(function)) {}
  void run(const std::byte* layer, const std::byte* x, std::int64_t rows, std::byte* y) const override {
    function_(layer, x, rows, y);
  }

 private:
  Function function_;
};

// An op and its kernel for each layer that has it (nullptr elsewhere). All ranks declare the same ops in the same
// order, which for those of a layer is that of their use.
struct Op {
  std::string name;
  std::string description;  // canonical text of what it computes; compared on all ranks
  ByteCount in_row_bytes = 0;
  ByteCount out_row_bytes = 0;                           // of all outputs together
  std::vector<std::shared_ptr<const OpKernel>> kernels;  // by layer
};

}  // namespace sidp
