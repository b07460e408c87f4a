#include "kernels.hpp"

#include <algorithm>
#include <string>

#include "cuda/versions.hpp"

// Made by the build from kernels.cu.
extern "C" const unsigned char sidp_kernels_fatbin[];

namespace sidp::nvshmem {

namespace {

constexpr unsigned kThreads = 512;
constexpr ByteCount kBytesPerBlock = ByteCount{kThreads} * 16;  // one 16-byte load a thread
constexpr unsigned kWarp = 32;
static_assert(Kernels::kMaxBlocks == kWarp, "a thread looks after the flag of one block");

}  // namespace

unsigned Kernels::blocks_for(ByteCount bytes) {
  return static_cast<unsigned>(std::clamp<ByteCount>((bytes + kBytesPerBlock - 1) / kBytesPerBlock, 1, kMaxBlocks));
}

// Loaded once and kept as long as the process lives: see csrc/DESIGN.md, "What a runtime does not free".
const Kernels::Functions& Kernels::functions(const Device& device) {
  static const Functions loaded = [&] {
    const ContextScope scope(device);
    const auto& api = device.api();
    CUlibrary library = nullptr;
    device.check(api.cuLibraryLoadData(&library, sidp_kernels_fatbin, nullptr, nullptr, 0, nullptr, nullptr, 0),
                 "cuLibraryLoadData of the kernels; is this GPU older than compute capability 8.0?");
    const auto look_up = [&](const char* name) {
      CUkernel kernel = nullptr;
      device.check(api.cuLibraryGetKernel(&kernel, library, name), std::string("cuLibraryGetKernel of ") + name);
      return reinterpret_cast<CUfunction>(kernel);  // a launch takes either (CUDA driver API)
    };
    return Functions{look_up("sidp_put"), look_up("sidp_take"), look_up("sidp_turn"), look_up("sidp_await")};
  }();
  return loaded;
}

Kernels::Kernels(const Device& device) : device_(device), functions_(functions(device)) {
  const auto& api = device.api();
  CUdevice handle = 0;
  int major = 0, driver = 0;
  early_ = api.cuDriverGetVersion(&driver) == CUDA_SUCCESS && driver >= cuda::kCapturesEarlyLaunches &&
           api.cuDeviceGet(&handle, device.ordinal()) == CUDA_SUCCESS &&
           api.cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle) == CUDA_SUCCESS &&
           major >= 9;
}

void Kernels::launch(CUfunction kernel, unsigned blocks, unsigned threads, CUstream stream, void** arguments,
                     const char* name) const {
  CUlaunchAttribute early = {};
  early.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  early.value.programmaticStreamSerializationAllowed = 1;
  CUlaunchConfig config = {};
  config.gridDimX = blocks;
  config.gridDimY = config.gridDimZ = 1;
  config.blockDimX = threads;
  config.blockDimY = config.blockDimZ = 1;
  config.hStream = stream;
  config.attrs = &early;
  config.numAttrs = early_ ? 1 : 0;
  device_.check(device_.api().cuLaunchKernelEx(&config, kernel, arguments, nullptr),
                [&] { return std::string("launch of ") + name; });
}

void Kernels::put(CUstream stream, CUdeviceptr dst, CUdeviceptr src, ByteCount bytes, const PutWords& words) const {
  PutWords w = words;
  void* arguments[] = {&dst,           &src,     &bytes,      &w.word, &w.value,  &w.finished,
                       &w.block_flags, &w.epoch, &w.withheld, &w.turn, &w.served, &w.served_host};
  launch(functions_.put, w.blocks != 0 ? w.blocks : blocks_for(bytes), kThreads, stream, arguments, "sidp_put");
}

void Kernels::take(CUstream stream, CUdeviceptr dst, CUdeviceptr src, ByteCount bytes, CUdeviceptr finished,
                   const RequestWords& request) const {
  RequestWords words = request;
  void* arguments[] = {&dst, &src, &bytes, &finished, &words};
  launch(functions_.take, blocks_for(bytes), kThreads, stream, arguments, "sidp_take");
}

void Kernels::turn(CUstream stream, const TurnWords& words) const {
  TurnWords w = words;
  void* arguments[] = {&w};
  launch(functions_.turn, 1, 1, stream, arguments, "sidp_turn");
}

void Kernels::await(CUstream stream, const AwaitWords& words, const RequestWords& request) const {
  AwaitWords w = words;
  RequestWords ended = request;
  unsigned reset = w.resets ? 1 : 0;
  void* arguments[] = {&w.flags, &w.count, &w.released, &w.failed, &reset, &w.epoch, &w.seen, &ended};
  launch(functions_.await, 1, kWarp, stream, arguments, "sidp_await");
}

}  // namespace sidp::nvshmem
