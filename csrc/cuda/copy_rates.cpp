#include "copy_rates.hpp"

#include <algorithm>
#include <deque>
#include <limits>
#include <stdexcept>

#include "driver_api.hpp"

namespace sidp::cuda {

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

constexpr std::size_t kBytes = std::size_t{64} << 20;
constexpr int kMostQueued = 16;  // copies between two looks at the clock, which then cost nothing

// A GPU with 64 MiB of its memory and a stream. Its context is current in a Scope only.
class Gpu {
 public:
  Gpu(const DriverApi& api, int ordinal) : api_(api), ordinal_(ordinal) {
    try {
      must(api.cuDeviceGet(&device_, ordinal), "cuDeviceGet");
      must(api.cuDevicePrimaryCtxRetain(&context_, device_), "cuDevicePrimaryCtxRetain");
      const Scope scope(*this);
      must(api.cuMemAlloc(&memory_, kBytes), "cuMemAlloc of 64 MiB");
      must(api.cuStreamCreateWithPriority(&stream_, CU_STREAM_NON_BLOCKING, 0), "cuStreamCreateWithPriority");
    } catch (...) {
      release();
      throw;
    }
  }
  ~Gpu() { release(); }
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  bool map(const Gpu& src) const {
    int can_access = 0;
    must(api_.cuDeviceCanAccessPeer(&can_access, device_, src.device_), "cuDeviceCanAccessPeer");
    if (can_access == 0) return false;
    const Scope scope(*this);
    const CUresult result = api_.cuCtxEnablePeerAccess(src.context_, 0);
    if (result != CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED) must(result, "cuCtxEnablePeerAccess");
    return true;
  }

  // Of so many copies, queued together.
  Seconds time_copies(const Gpu& src, int count) const {
    const Scope scope(*this);
    const auto start = Clock::now();
    for (int i = 0; i < count; ++i)
      must(api_.cuMemcpyPeerAsync(memory_, context_, src.memory_, src.context_, kBytes, stream_), "cuMemcpyPeerAsync");
    must(api_.cuStreamSynchronize(stream_), "cuStreamSynchronize");
    return Clock::now() - start;
  }

 private:
  class Scope {
   public:
    explicit Scope(const Gpu& gpu) : api_(gpu.api_) {
      gpu.must(api_.cuCtxPushCurrent(gpu.context_), "cuCtxPushCurrent");
    }
    ~Scope() {
      CUcontext popped = nullptr;
      api_.cuCtxPopCurrent(&popped);
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    const DriverApi& api_;
  };

  void must(CUresult result, const char* what) const {
    const Status status = check(api_, result, what);
    if (!status.ok()) throw std::runtime_error(status.reason + " on device " + std::to_string(ordinal_));
  }

  void release() noexcept {
    if (context_ == nullptr) return;
    api_.cuCtxPushCurrent(context_);
    if (stream_ != nullptr) api_.cuStreamDestroy(stream_);
    if (memory_ != 0) api_.cuMemFree(memory_);
    CUcontext popped = nullptr;
    api_.cuCtxPopCurrent(&popped);
    api_.cuDevicePrimaryCtxRelease(device_);
  }

  const DriverApi& api_;
  int ordinal_;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  CUdeviceptr memory_ = 0;
  CUstream stream_ = nullptr;
};

double best_gbps(const Gpu& dst, const Gpu& src, Seconds share) {
  const auto start = Clock::now();
  dst.time_copies(src, 1);  // the first one maps
  const Seconds one = dst.time_copies(src, 1);
  const int queued = std::clamp(static_cast<int>(share / one / 4), 1, kMostQueued);
  double best = std::numeric_limits<double>::infinity();
  do {
    best = std::min(best, dst.time_copies(src, queued).count() / queued);
  } while (Clock::now() - start < share);
  return static_cast<double>(kBytes) / best / 1e9;
}

}  // namespace

CopyRates measure_copies(std::chrono::milliseconds budget) {
  CopyRates found;
  const DriverApi& api = driver_api();
  if (!api.status.ok()) return {api.status.reason, {}};
  int count = 0;
  for (const auto& [result, what] :
       {std::pair{api.cuInit(0), "cuInit"}, std::pair{api.cuDeviceGetCount(&count), "cuDeviceGetCount"}})
    if (Status status = check(api, result, what); !status.ok()) return {status.reason, {}};
  if (count < 2) return {count == 1 ? "one GPU: nothing to measure between GPUs" : "no GPU", {}};
  try {
    std::deque<Gpu> gpus;
    for (int ordinal = 0; ordinal < count; ++ordinal) gpus.emplace_back(api, ordinal);
    const Seconds share = Seconds(budget) / (count * (count - 1));
    for (int src = 0; src < count; ++src)
      for (int dst = 0; dst < count; ++dst) {
        if (src == dst) continue;
        const Gpu &from = gpus[static_cast<std::size_t>(src)], &to = gpus[static_cast<std::size_t>(dst)];
        const bool direct = to.map(from);
        found.rates.push_back({src, dst, direct, best_gbps(to, from, share)});
      }
  } catch (const std::runtime_error& error) {
    return {error.what(), {}};
  }
  return found;
}

}  // namespace sidp::cuda
