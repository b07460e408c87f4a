// Ops as straight-line ATen programs, run through libtorch's stable C interface.
//
// The functions are looked up at run time in the libtorch that the process has loaded: this extension neither links nor
// includes torch, so one build serves every torch version, and a program runs on the service thread without Python.
// Interface: torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/stableivalue_conversions.h (PyTorch >= 2.8).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "sidp/op.hpp"

namespace sidp::host {

// A tensor inside a layer.
struct TorchWeight {
  ByteCount offset;  // bytes from the layer's start
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  // in elements
  std::int32_t dtype;                 // torch's ScalarType number
};

struct TorchArgument {
  enum class Kind : std::uint8_t { kRegister, kWeight, kNone, kInt, kDouble, kBool };
  Kind kind = Kind::kNone;
  bool optional = false;   // the schema's type is optional
  std::int64_t index = 0;  // register or weight, or the integer
  double number = 0;
};

// One call of the dispatcher with one tensor result, which goes to the next register. Register 0 is x.
struct TorchCall {
  std::string name;      // "aten::linear"
  std::string overload;  // "" for default
  std::vector<TorchArgument> arguments;
};

struct TorchProgram {
  std::vector<TorchWeight> weights;
  std::vector<TorchCall> calls;
  std::vector<std::int64_t> outputs;         // registers, in the order of the op's outputs
  std::vector<std::int64_t> output_columns;  // of each output
  std::int64_t input_columns = 0;
  std::int32_t input_dtype = 0;
  std::vector<ByteCount> output_element_bytes;  // of each output
};

// Loads the function table once. `library` is the path of libtorch_cpu as this process loaded it.
// Throws Error(kUnsupported) naming the first function that is missing.
void load_torch(const std::string& library);

// Throws Error(kUsage) before load_torch(), Error(kConfig) for a register or weight that does not exist.
std::shared_ptr<const OpKernel> make_torch_kernel(TorchProgram program);

}  // namespace sidp::host
