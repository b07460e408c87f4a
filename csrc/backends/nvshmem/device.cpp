#include "device.hpp"

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>

#include "sidp/error.hpp"

namespace sidp::nvshmem {

Device::Device(int ordinal) : api_(cuda::driver_api()), ordinal_(ordinal) {
  if (!api_.status.ok()) throw Error(ErrorCode::kUnsupported, api_.status.reason);
  check(api_.cuInit(0), "cuInit");
  check(api_.cuDeviceGet(&device_, ordinal), "cuDeviceGet");
  check(api_.cuDevicePrimaryCtxRetain(&context_, device_), "cuDevicePrimaryCtxRetain");
}

Device::Device(int ordinal, ForCopies) : api_(cuda::driver_api()), ordinal_(ordinal), primary_(false) {
  check(api_.cuDeviceGet(&device_, ordinal), "cuDeviceGet");
#if CUDA_VERSION >= 13000
  check(api_.cuCtxCreate(&context_, nullptr, 0, device_), "cuCtxCreate");
#else
  check(api_.cuCtxCreate(&context_, 0, device_), "cuCtxCreate");
#endif
  // No kernel, no stack: that is half of what a context takes. A driver that refuses only takes more.
  api_.cuCtxSetLimit(CU_LIMIT_STACK_SIZE, 64);
  CUcontext popped = nullptr;
  api_.cuCtxPopCurrent(&popped);
}

std::shared_ptr<const Device> Device::for_copies(int ordinal) {
  // Never destroyed: a process may end while copies are under way.
  static auto* const made = new std::map<int, std::shared_ptr<const Device>>;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  auto& device = (*made)[ordinal];
  if (!device) device.reset(new Device(ordinal, ForCopies{}));
  return device;
}

Device::~Device() {
  if (primary_)
    api_.cuDevicePrimaryCtxRelease(device_);
  else
    api_.cuCtxDestroy(context_);
}

void Device::use_memory_of(const Device& other) const {
  const CurrentContext scope(*this);
  const CUresult result = api_.cuCtxEnablePeerAccess(other.context_, 0);
  if (result == CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED) return;
  check(result, [&] { return "cuCtxEnablePeerAccess to device " + std::to_string(other.ordinal_); });
}

// An engine's thread has it already, and asking costs less than to push and to pop.
CurrentContext::CurrentContext(const Device& device) noexcept : device_(device), pushed_(false) {
  CUcontext current = nullptr;
  if (device.api_.cuCtxGetCurrent(&current) == CUDA_SUCCESS && current == device.context_) return;
  pushed_ = device.api_.cuCtxPushCurrent(device.context_) == CUDA_SUCCESS;
}

CurrentContext::~CurrentContext() {
  CUcontext popped = nullptr;
  if (pushed_) device_.api_.cuCtxPopCurrent(&popped);
}

ContextScope::ContextScope(const Device& device) noexcept : CurrentContext(device) {
  device.api().cuThreadExchangeStreamCaptureMode(&capture_mode_);
}

ContextScope::~ContextScope() { device_.api().cuThreadExchangeStreamCaptureMode(&capture_mode_); }

void Device::fail(CUresult result, const std::string& what) const {
  throw Error(result == CUDA_ERROR_OUT_OF_MEMORY ? ErrorCode::kCapacity : ErrorCode::kDevice,
              cuda::check(api_, result, what).reason + " on device " + std::to_string(ordinal_));
}

DeviceStream::DeviceStream(const Device& device, Priority priority) : device_(device) {
  const ContextScope scope(device);
  int lowest = 0, highest = 0;
  device.check(device.api().cuCtxGetStreamPriorityRange(&lowest, &highest), "cuCtxGetStreamPriorityRange");
  // Numerically lower is more urgent.
  const int chosen = priority == Priority::kDefault ? lowest : priority == Priority::kLane ? highest + 1 : highest;
  device.check(device.api().cuStreamCreateWithPriority(&stream_, CU_STREAM_NON_BLOCKING, chosen),
               "cuStreamCreateWithPriority");
}

DeviceStream::~DeviceStream() {
  const ContextScope scope(device_);
  device_.api().cuStreamDestroy(stream_);
}

namespace {

// What was given back, by device and size.
template <typename Thing>
class Spares {
 public:
  // Never destroyed: a process may end while some of them are in use.
  static Spares& all() {
    static auto* const spares = new Spares;
    return *spares;
  }
  std::optional<Thing> take(int ordinal, std::size_t size) {
    const std::lock_guard lock(mutex_);
    const auto it = things_.find({ordinal, size});
    if (it == things_.end()) return std::nullopt;
    std::optional<Thing> thing = std::move(it->second);
    things_.erase(it);
    return thing;
  }
  void give(int ordinal, std::size_t size, Thing thing) {
    const std::lock_guard lock(mutex_);
    things_.emplace(std::pair{ordinal, size}, std::move(thing));
  }

 private:
  std::mutex mutex_;
  std::multimap<std::pair<int, std::size_t>, Thing> things_;
};

// The device lives as long as what needs it.
using SpareStream = std::pair<std::shared_ptr<const Device>, std::unique_ptr<DeviceStream>>;
using SpareBuffer = std::pair<std::shared_ptr<const Device>, std::unique_ptr<DeviceBuffer>>;
using SpareWords = std::tuple<std::shared_ptr<const Device>, std::uint64_t*, CUdeviceptr>;

void zero(const Device& device, CUdeviceptr memory, ByteCount bytes) {
  const DeviceStream stream(device, DeviceStream::Priority::kDefault);
  device.check(device.api().cuMemsetD8Async(memory, 0, bytes, stream.get()), "cuMemsetD8Async");
  stream.synchronize();
}

}  // namespace

ServiceStream::ServiceStream(std::shared_ptr<const Device> device) : device_(std::move(device)) {
  if (auto spare = Spares<SpareStream>::all().take(device_->ordinal(), 0))
    std::tie(device_, stream_) = std::move(*spare);
  else
    stream_ = std::make_unique<DeviceStream>(*device_, DeviceStream::Priority::kService);
}

ServiceStream::~ServiceStream() {
  const ContextScope scope(*device_);
  if (!stream_->idle()) return;
  const int ordinal = device_->ordinal();
  Spares<SpareStream>::all().give(ordinal, 0, {std::move(device_), std::move(stream_)});
}

bool is_pending(CUresult result) {
  return result == CUDA_ERROR_NOT_READY ||
         (result >= CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED && result <= CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
}

bool DeviceStream::idle() const {
  const CurrentContext scope(device_);
  return !is_pending(device_.api().cuStreamQuery(stream_));
}

void DeviceStream::synchronize() const {
  device_.check(device_.api().cuStreamSynchronize(stream_), "cuStreamSynchronize");
}

DeviceEvent::DeviceEvent(const Device& device, Kind kind) : device_(device) {
  const ContextScope scope(device);
  device.check(device.api().cuEventCreate(&event_, kind == Kind::kTimed ? CU_EVENT_DEFAULT : CU_EVENT_DISABLE_TIMING),
               "cuEventCreate");
}

DeviceEvent::~DeviceEvent() {
  if (event_ == nullptr) return;
  const ContextScope scope(device_);
  device_.api().cuEventDestroy(event_);
}

DeviceBuffer::DeviceBuffer(const Device& device, ByteCount bytes, const std::string& label,
                           std::shared_ptr<const bool> kept)
    : device_(device), bytes_(bytes), kept_(std::move(kept)) {
  const ContextScope scope(device);
  const CUresult result = device.api().cuMemAlloc(&memory_, bytes);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) {
    std::size_t free = 0, total = 0;
    device.api().cuMemGetInfo(&free, &total);
    throw Error(ErrorCode::kCapacity,
                label + ": " + std::to_string(bytes) + " bytes do not fit on device " +
                    std::to_string(device.ordinal()) + ", which has " + std::to_string(free) + " of " +
                    std::to_string(total) + " free",
                {.num_bytes = static_cast<std::int64_t>(bytes)});
  }
  device.check(result, "cuMemAlloc of " + std::to_string(bytes) + " bytes");
  try {
    zero(device, memory_, bytes);
  } catch (...) {
    device.api().cuMemFree(memory_);
    throw;
  }
}

DeviceBuffer::~DeviceBuffer() {
  if (kept_ && *kept_) return;
  const ContextScope scope(device_);
  device_.api().cuMemFree(memory_);
}

DeviceWords::DeviceWords(std::shared_ptr<const Device> device, ByteCount bytes, std::shared_ptr<const bool> kept)
    : device_(std::move(device)), kept_(std::move(kept)) {
  if (auto spare = Spares<SpareBuffer>::all().take(device_->ordinal(), bytes)) {
    std::tie(device_, memory_) = std::move(*spare);
    const ContextScope scope(*device_);
    zero(*device_, memory_->at(0), bytes);
  } else {
    memory_ = std::make_unique<DeviceBuffer>(*device_, bytes, "words of the activation channel");
  }
}

DeviceWords::~DeviceWords() {
  if (*kept_) {
    static_cast<void>(memory_.release());
    return;
  }
  const int ordinal = device_->ordinal();
  const ByteCount bytes = memory_->bytes();
  Spares<SpareBuffer>::all().give(ordinal, bytes, {std::move(device_), std::move(memory_)});
}

HostWords::HostWords(std::shared_ptr<const Device> device, std::size_t count, std::shared_ptr<const bool> kept)
    : device_(std::move(device)), count_(count), kept_(std::move(kept)) {
  const ContextScope scope(*device_);
  const auto& api = device_->api();
  if (auto spare = Spares<SpareWords>::all().take(device_->ordinal(), count)) {
    std::tie(device_, words_, mapped_) = std::move(*spare);
  } else {
    void* memory = nullptr;
    device_->check(api.cuMemHostAlloc(&memory, count * sizeof(std::uint64_t),
                                      CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP),
                   "cuMemHostAlloc");
    words_ = static_cast<std::uint64_t*>(memory);
    device_->check(api.cuMemHostGetDevicePointer(&mapped_, memory, 0), "cuMemHostGetDevicePointer");
  }
  std::memset(words_, 0, count * sizeof(std::uint64_t));
}

HostWords::~HostWords() {
  if (*kept_) return;
  const int ordinal = device_->ordinal();
  Spares<SpareWords>::all().give(ordinal, count_, {std::move(device_), words_, mapped_});
}

std::uint64_t HostWords::load(std::size_t index) const {
  return std::atomic_ref<std::uint64_t>(words_[index]).load(std::memory_order_acquire);
}

void HostWords::store(std::size_t index, std::uint64_t value) const {
  std::atomic_ref<std::uint64_t>(words_[index]).store(value, std::memory_order_release);
}

}  // namespace sidp::nvshmem
