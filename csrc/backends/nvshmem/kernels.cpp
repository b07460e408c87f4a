#include "kernels.hpp"

#include <algorithm>

// Made by the build from kernels.cu.
extern "C" const unsigned char sidp_kernels_fatbin[];

namespace sidp::nvshmem {

namespace {

constexpr unsigned kThreads = 512;
constexpr ByteCount kBytesPerBlock = ByteCount{kThreads} * 16;  // one 16-byte load a thread
constexpr unsigned kMaxBlocks = 32;                             // a quarter of an H200: the rest computes on

unsigned blocks_for(ByteCount bytes) {
  return static_cast<unsigned>(std::clamp<ByteCount>((bytes + kBytesPerBlock - 1) / kBytesPerBlock, 1, kMaxBlocks));
}

}  // namespace

Kernels::Kernels(const Device& device) : device_(device) {
  const ContextScope scope(device);
  const auto& api = device.api();
  device.check(api.cuLibraryLoadData(&library_, sidp_kernels_fatbin, nullptr, nullptr, 0, nullptr, nullptr, 0),
               "cuLibraryLoadData of the kernels; is this GPU older than compute capability 8.0?");
  const auto look_up = [&](const char* name) {
    CUkernel kernel = nullptr;
    device.check(api.cuLibraryGetKernel(&kernel, library_, name), std::string("cuLibraryGetKernel of ") + name);
    return reinterpret_cast<CUfunction>(kernel);  // cuLaunchKernel takes either (CUDA driver API)
  };
  put_ = look_up("sidp_put");
  take_ = look_up("sidp_take");
  turn_ = look_up("sidp_turn");
}

Kernels::~Kernels() {
  const ContextScope scope(device_);
  device_.api().cuLibraryUnload(library_);
}

void Kernels::put(CUstream stream, CUdeviceptr dst, CUdeviceptr src, ByteCount bytes, const PutWords& words) const {
  PutWords w = words;
  void* arguments[] = {&dst, &src, &bytes, &w.word, &w.value, &w.finished, &w.turn, &w.served, &w.served_host};
  device_.check(
      device_.api().cuLaunchKernel(put_, blocks_for(bytes), 1, 1, kThreads, 1, 1, 0, stream, arguments, nullptr),
      "launch of sidp_put");
}

void Kernels::take(CUstream stream, CUdeviceptr dst, CUdeviceptr src, ByteCount bytes, const TakeWords& words) const {
  TakeWords w = words;
  void* arguments[] = {
      &dst,      &src,           &bytes,         &w.flag,     &w.request,   &w.sent_rows,          &w.sent_bytes,
      &w.counts, &w.counts_host, &w.failed_host, &w.finished, &w.turn.turn, &w.turn.launched_host, &w.turn.served};
  device_.check(
      device_.api().cuLaunchKernel(take_, blocks_for(bytes), 1, 1, kThreads, 1, 1, 0, stream, arguments, nullptr),
      "launch of sidp_take");
}

void Kernels::turn(CUstream stream, const TurnWords& words) const {
  TurnWords w = words;
  void* arguments[] = {&w.turn, &w.launched_host, &w.served};
  device_.check(device_.api().cuLaunchKernel(turn_, 1, 1, 1, 1, 1, 1, 0, stream, arguments, nullptr),
                "launch of sidp_turn");
}

}  // namespace sidp::nvshmem
