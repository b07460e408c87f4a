#include "driver_api.hpp"

#include <dlfcn.h>

namespace sidp::cuda {

namespace {

constexpr const char* kLibrary = "libcuda.so.1";

#define SIDP_CUDA_TEXT(name) #name
#define SIDP_CUDA_SYMBOL(name) SIDP_CUDA_TEXT(name)  // expands cuda.h's version macros first

std::string last_dl_error() {
  const char* text = dlerror();
  return text == nullptr ? "no reason given" : text;
}

template <typename Function>
bool look_up(void* library, const char* symbol, Function& function, Status& status) {
  // POSIX guarantees that a function pointer survives the trip through dlsym's void*.
  function = reinterpret_cast<Function>(dlsym(library, symbol));
  if (function != nullptr) return true;
  status.reason = std::string(kLibrary) + " lacks " + symbol + " (" + last_dl_error() +
                  "): the NVIDIA driver is too old for this build; install a driver for CUDA 12 or later";
  return false;
}

DriverApi load() {
  DriverApi api;
  // Never closed: the driver keeps threads and exit handlers of its own.
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    api.status.reason = std::string("the NVIDIA driver library ") + kLibrary + " cannot be loaded (" + last_dl_error() +
                        "): install the NVIDIA driver, or give the container its GPUs (docker run --gpus all)";
    return api;
  }
#define SIDP_CUDA_LOOK_UP(name) \
  if (!look_up(library, SIDP_CUDA_SYMBOL(name), api.name, api.status)) return DriverApi{.status = api.status};
  SIDP_CUDA_DRIVER_FUNCTIONS(SIDP_CUDA_LOOK_UP)
#undef SIDP_CUDA_LOOK_UP
  return api;
}

}  // namespace

const DriverApi& driver_api() {
  static const DriverApi api = load();
  return api;
}

Status check(const DriverApi& api, CUresult result, const std::string& what) {
  if (result == CUDA_SUCCESS) return {};
  const char* name = nullptr;
  const char* text = nullptr;
  // Both leave the pointer null for a code that the driver does not know.
  api.cuGetErrorName(result, &name);
  api.cuGetErrorString(result, &text);
  std::string reason = what + " failed: ";
  reason += name == nullptr ? "CUDA error " + std::to_string(static_cast<int>(result)) : std::string(name);
  if (text != nullptr) reason += std::string(" (") + text + ')';
  return {reason};
}

}  // namespace sidp::cuda
