#include "torch_program.hpp"

#include <dlfcn.h>

#include <cstring>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "sidp/error.hpp"

namespace sidp::host {

namespace {

using Handle = void*;  // AtenTensorHandle: an owned reference
using StableValue = std::uint64_t;
using Status = std::int32_t;  // 0: success

struct TorchApi {
  Status (*from_blob)(void*, std::int64_t, const std::int64_t*, const std::int64_t*, std::int64_t, std::int32_t,
                      std::int32_t, std::int32_t, Handle*) = nullptr;
  Status (*new_handle)(Handle, Handle*) = nullptr;
  Status (*delete_tensor)(Handle) = nullptr;
  Status (*call)(const char*, const char*, StableValue*) = nullptr;
  Status (*data_ptr)(Handle, void**) = nullptr;
  Status (*dim)(Handle, std::int64_t*) = nullptr;
  Status (*size)(Handle, std::int64_t, std::int64_t*) = nullptr;
  Status (*stride)(Handle, std::int64_t, std::int64_t*) = nullptr;
  bool (*grad_enabled)() = nullptr;
  void (*set_grad_enabled)(bool) = nullptr;
  void (*init_num_threads)() = nullptr;
};

TorchApi api;
bool api_loaded = false;
std::mutex api_mutex;

template <typename Function>
void look_up(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(::dlsym(library, name));
  if (function == nullptr)
    throw Error(ErrorCode::kUnsupported,
                std::string("the loaded torch has no function ") + name + "; ops on the host need torch 2.8 or newer");
}

void check(Status status, const std::string& what) {
  if (status != 0) throw std::runtime_error(what + " failed in torch; its own message is on stderr");
}

class Tensor {
 public:
  explicit Tensor(Handle handle) : handle_(handle) {}
  ~Tensor() {
    if (handle_ != nullptr) api.delete_tensor(handle_);
  }
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&&) = delete;

  [[nodiscard]] Handle get() const { return handle_; }
  // A second reference, which the dispatcher takes over.
  [[nodiscard]] Handle share() const {
    Handle copy = nullptr;
    check(api.new_handle(handle_, &copy), "a tensor reference");
    return copy;
  }

 private:
  Handle handle_;
};

Tensor blob(const void* data, const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides,
            std::int32_t dtype) {
  constexpr std::int32_t kCpu = 0;
  Handle handle = nullptr;
  check(api.from_blob(const_cast<void*>(data), static_cast<std::int64_t>(shape.size()), shape.data(), strides.data(), 0,
                      dtype, kCpu, -1, &handle),
        "a tensor view");
  return Tensor(handle);
}

StableValue pack(Handle handle) { return reinterpret_cast<StableValue>(handle); }

class NoGrad {
 public:
  NoGrad() : before_(api.grad_enabled()) { api.set_grad_enabled(false); }
  ~NoGrad() { api.set_grad_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

class TorchKernel final : public OpKernel {
 public:
  explicit TorchKernel(TorchProgram program) : program_(std::move(program)) {}

  void run(const std::byte* layer, const std::byte* x, std::int64_t rows, std::byte* y) const override {
    // Torch keeps its thread count for each thread, and another count splits sums another way: without this, the
    // service thread's results would not be bit-equal to the engine's.
    api.init_num_threads();
    const NoGrad no_grad;
    std::vector<Tensor> weights;
    for (const TorchWeight& w : program_.weights)
      weights.push_back(blob(layer + w.offset, w.shape, w.strides, w.dtype));
    std::vector<Tensor> registers;
    registers.reserve(program_.calls.size() + 1);
    registers.push_back(blob(x, {rows, program_.input_columns}, {program_.input_columns, 1}, program_.input_dtype));
    for (const TorchCall& call : program_.calls) {
      std::vector<StableValue> stack;
      for (const TorchArgument& argument : call.arguments) stack.push_back(pack_argument(argument, weights, registers));
      if (stack.empty()) stack.push_back(0);
      check(api.call(call.name.c_str(), call.overload.c_str(), stack.data()), call.name);
      registers.emplace_back(reinterpret_cast<Handle>(stack[0]));
    }
    for (std::size_t i = 0; i < program_.outputs.size(); ++i)
      y += write_rows(registers[static_cast<std::size_t>(program_.outputs[i])], rows, program_.output_columns[i],
                      program_.output_element_bytes[i], y);
  }

 private:
  static StableValue pack_argument(const TorchArgument& argument, const std::vector<Tensor>& weights,
                                   const std::vector<Tensor>& registers) {
    StableValue value = 0;
    switch (argument.kind) {
      case TorchArgument::Kind::kNone:
        return 0;
      case TorchArgument::Kind::kRegister:
        value = pack(registers[static_cast<std::size_t>(argument.index)].share());
        break;
      case TorchArgument::Kind::kWeight:
        value = pack(weights[static_cast<std::size_t>(argument.index)].share());
        break;
      case TorchArgument::Kind::kInt:
      case TorchArgument::Kind::kBool:
        value = static_cast<StableValue>(argument.index);
        break;
      case TorchArgument::Kind::kDouble:
        std::memcpy(&value, &argument.number, sizeof value);
        break;
    }
    // An optional travels as a heap cell, which the dispatcher deletes.
    return argument.optional ? reinterpret_cast<StableValue>(new StableValue(value)) : value;
  }

  static ByteCount write_rows(const Tensor& tensor, std::int64_t rows, std::int64_t columns, ByteCount element_bytes,
                              std::byte* y) {
    std::int64_t dim = 0;
    check(api.dim(tensor.get(), &dim), "reading a result's dimensions");
    std::int64_t size[2] = {0, 0}, stride[2] = {0, 0};
    for (std::int64_t d = 0; d < 2 && dim == 2; ++d) {
      check(api.size(tensor.get(), d, &size[d]), "reading a result's shape");
      check(api.stride(tensor.get(), d, &stride[d]), "reading a result's strides");
    }
    if (dim != 2 || size[0] != rows || size[1] != columns || (columns > 1 && stride[1] != 1))
      throw std::runtime_error("the op gave a result of " + std::to_string(size[0]) + " x " + std::to_string(size[1]) +
                               ", not " + std::to_string(rows) + " x " + std::to_string(columns) + " in row order");
    void* data = nullptr;
    check(api.data_ptr(tensor.get(), &data), "reading a result");
    const ByteCount row_bytes = static_cast<ByteCount>(columns) * element_bytes;
    const ByteCount pitch = static_cast<ByteCount>(stride[0]) * element_bytes;
    if (pitch == row_bytes || rows == 1) {
      std::memcpy(y, data, static_cast<ByteCount>(rows) * row_bytes);
    } else {
      for (std::int64_t r = 0; r < rows; ++r)
        std::memcpy(y + static_cast<ByteCount>(r) * row_bytes,
                    static_cast<const std::byte*>(data) + static_cast<ByteCount>(r) * pitch, row_bytes);
    }
    return static_cast<ByteCount>(rows) * row_bytes;
  }

  TorchProgram program_;
};

void check_index(std::int64_t index, std::size_t count, const char* what) {
  if (index < 0 || static_cast<std::size_t>(index) >= count)
    throw Error(ErrorCode::kConfig,
                std::string("an op names ") + what + " " + std::to_string(index) + " of " + std::to_string(count));
}

}  // namespace

void load_torch(const std::string& library) {
  const std::lock_guard lock(api_mutex);
  if (api_loaded) return;
  void* handle = ::dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (handle == nullptr)
    throw Error(ErrorCode::kUnsupported, "torch's library " + library + " is not loaded in this process");
  TorchApi table;
  look_up(handle, "aoti_torch_create_tensor_from_blob", table.from_blob);
  look_up(handle, "aoti_torch_new_tensor_handle", table.new_handle);
  look_up(handle, "aoti_torch_delete_tensor_object", table.delete_tensor);
  look_up(handle, "aoti_torch_call_dispatcher", table.call);
  look_up(handle, "aoti_torch_get_data_ptr", table.data_ptr);
  look_up(handle, "aoti_torch_get_dim", table.dim);
  look_up(handle, "aoti_torch_get_size", table.size);
  look_up(handle, "aoti_torch_get_stride", table.stride);
  look_up(handle, "aoti_torch_grad_mode_is_enabled", table.grad_enabled);
  look_up(handle, "aoti_torch_grad_mode_set_enabled", table.set_grad_enabled);
  look_up(handle, "_ZN2at16init_num_threadsEv", table.init_num_threads);
  api = table;
  api_loaded = true;
}

std::shared_ptr<const OpKernel> make_torch_kernel(TorchProgram program) {
  {
    const std::lock_guard lock(api_mutex);
    if (!api_loaded) throw Error(ErrorCode::kUsage, "load_torch() comes before the first torch op");
  }
  std::size_t registers = 1;
  for (const TorchCall& call : program.calls) {
    for (const TorchArgument& argument : call.arguments) {
      if (argument.kind == TorchArgument::Kind::kRegister) check_index(argument.index, registers, "register");
      if (argument.kind == TorchArgument::Kind::kWeight) check_index(argument.index, program.weights.size(), "weight");
    }
    ++registers;
  }
  for (const std::int64_t output : program.outputs) check_index(output, registers, "register");
  return std::make_shared<TorchKernel>(std::move(program));
}

}  // namespace sidp::host
