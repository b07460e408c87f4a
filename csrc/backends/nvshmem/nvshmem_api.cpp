#include "nvshmem_api.hpp"

#include <dlfcn.h>

namespace sidp::nvshmem {

namespace {

constexpr const char* kLibrary = "libnvshmem_host.so.3";

template <typename Function>
void look_up(void* library, const char* symbol, Function& function, std::string& missing) {
  function = reinterpret_cast<Function>(dlsym(library, symbol));
  if (function == nullptr && missing.empty()) missing = std::string(kLibrary) + " lacks " + symbol;
}

}  // namespace

NvshmemApi nvshmem_api() {
  NvshmemApi api;
  // NOLOAD: the one that nvshmem4py initialised, never a second copy with a state of its own.
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) {
    api.missing = std::string(kLibrary) + " is not loaded in this process; initialise NVSHMEM with nvshmem4py first";
    return api;
  }
  look_up(library, "nvshmem_my_pe", api.my_pe, api.missing);
  look_up(library, "nvshmem_n_pes", api.n_pes, api.missing);
  look_up(library, "nvshmem_malloc", api.malloc, api.missing);
  look_up(library, "nvshmem_free", api.free, api.missing);
  look_up(library, "nvshmem_ptr", api.ptr, api.missing);
  look_up(library, "nvshmemx_getmem_on_stream", api.getmem_on_stream, api.missing);
  look_up(library, "nvshmemx_buffer_register", api.buffer_register, api.missing);
  look_up(library, "nvshmemx_buffer_unregister", api.buffer_unregister, api.missing);
  return api;
}

}  // namespace sidp::nvshmem
