#include "device.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "sidp/error.hpp"

namespace sidp::nvshmem {

Device::Device(int ordinal) : api_(cuda::driver_api()), ordinal_(ordinal) {
  if (!api_.status.ok()) throw Error(ErrorCode::kUnsupported, api_.status.reason);
  check(api_.cuInit(0), "cuInit");
  check(api_.cuDeviceGet(&device_, ordinal), "cuDeviceGet");
  check(api_.cuDevicePrimaryCtxRetain(&context_, device_), "cuDevicePrimaryCtxRetain");
}

Device::~Device() { api_.cuDevicePrimaryCtxRelease(device_); }

ContextScope::ContextScope(const Device& device) noexcept
    : device_(device), pushed_(device.api_.cuCtxPushCurrent(device.context_) == CUDA_SUCCESS) {
  device.api_.cuThreadExchangeStreamCaptureMode(&capture_mode_);
}

ContextScope::~ContextScope() {
  device_.api_.cuThreadExchangeStreamCaptureMode(&capture_mode_);
  CUcontext popped = nullptr;
  if (pushed_) device_.api_.cuCtxPopCurrent(&popped);
}

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

// Of all services that have ended. Never destroyed: a process may end while a service lives.
struct IdleStreams {
  struct Entry {
    std::shared_ptr<const Device> device;
    std::unique_ptr<DeviceStream> stream;
  };
  std::mutex mutex;
  std::vector<Entry> entries;

  static IdleStreams& all() {
    static auto* const streams = new IdleStreams;
    return *streams;
  }
};

}  // namespace

ServiceStream::ServiceStream(std::shared_ptr<const Device> device) : device_(std::move(device)) {
  {
    IdleStreams& idle = IdleStreams::all();
    const std::lock_guard lock(idle.mutex);
    const auto it = std::find_if(idle.entries.begin(), idle.entries.end(), [&](const IdleStreams::Entry& entry) {
      return entry.device->ordinal() == device_->ordinal();
    });
    if (it != idle.entries.end()) {
      device_ = std::move(it->device);
      stream_ = std::move(it->stream);
      idle.entries.erase(it);
      return;
    }
  }
  stream_ = std::make_unique<DeviceStream>(*device_, DeviceStream::Priority::kService);
}

ServiceStream::~ServiceStream() {
  if (!stream_->idle()) return;
  IdleStreams& idle = IdleStreams::all();
  const std::lock_guard lock(idle.mutex);
  idle.entries.push_back({std::move(device_), std::move(stream_)});
}

bool is_pending(CUresult result) {
  return result == CUDA_ERROR_NOT_READY ||
         (result >= CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED && result <= CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
}

bool DeviceStream::idle() const { return !is_pending(device_.api().cuStreamQuery(stream_)); }

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
    const DeviceStream stream(device, DeviceStream::Priority::kDefault);
    device.check(device.api().cuMemsetD8Async(memory_, 0, bytes, stream.get()), "cuMemsetD8Async");
    stream.synchronize();
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

HostWords::HostWords(const Device& device, std::size_t count) : device_(device) {
  const ContextScope scope(device);
  void* memory = nullptr;
  device.check(device.api().cuMemHostAlloc(&memory, count * sizeof(std::uint64_t),
                                           CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP),
               "cuMemHostAlloc");
  words_ = static_cast<std::uint64_t*>(memory);
  std::memset(words_, 0, count * sizeof(std::uint64_t));
  device.check(device.api().cuMemHostGetDevicePointer(&mapped_, memory, 0), "cuMemHostGetDevicePointer");
}

HostWords::~HostWords() {
  if (abandoned_) return;
  const ContextScope scope(device_);
  device_.api().cuMemFreeHost(words_);
}

std::uint64_t HostWords::load(std::size_t index) const {
  return std::atomic_ref<std::uint64_t>(words_[index]).load(std::memory_order_acquire);
}

void HostWords::store(std::size_t index, std::uint64_t value) const {
  std::atomic_ref<std::uint64_t>(words_[index]).store(value, std::memory_order_release);
}

}  // namespace sidp::nvshmem
