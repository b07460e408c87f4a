// One GPU: its primary context (the one that torch uses), streams, memory and errors.
#pragma once

#include <cuda.h>

#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/driver_api.hpp"
#include "sidp/backend.hpp"

namespace sidp::nvshmem {

class Device {
 public:
  // Retains the primary context. Throws Error(kUnsupported) without a driver, Error(kDevice) for a bad ordinal.
  explicit Device(int ordinal);
  // A context of its own on that GPU, where no kernel runs: 276 MiB of an H200's memory. Made once for each GPU and
  // kept as long as the process lives. Throws Error(kDevice) or Error(kCapacity).
  static std::shared_ptr<const Device> for_copies(int ordinal);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  [[nodiscard]] int ordinal() const { return ordinal_; }
  // Streams of this context may use what the other's cuMemAlloc gave.
  void use_memory_of(const Device& other) const;
  [[nodiscard]] const cuda::DriverApi& api() const { return api_; }
  // Throws Error(kDevice), or Error(kCapacity) for want of memory, unless the call succeeded.
  // `what`: words, or a function that gives them, as making them costs more than some calls.
  template <typename What>
  void check(CUresult result, const What& what) const {
    if (result == CUDA_SUCCESS) [[likely]]
      return;
    if constexpr (std::is_invocable_v<const What&>)
      fail(result, what());
    else
      fail(result, what);
  }

 private:
  friend class CurrentContext;
  struct ForCopies {};
  Device(int ordinal, ForCopies);
  [[noreturn]] void fail(CUresult result, const std::string& what) const;
  const cuda::DriverApi& api_;
  int ordinal_;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  bool primary_ = true;
};

// The device's context is the calling thread's while this lives; then again the one that was before.
class CurrentContext {
 public:
  explicit CurrentContext(const Device& device) noexcept;  // a failure is that of the next call
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 protected:
  const Device& device_;

 private:
  bool pushed_;
};

// The same at the entry of a call, so that a caller who works on several devices finds his own as he left it. Meanwhile
// a capture, of whatever thread, forbids this one no call on streams that are not being captured: a pool may be closed
// or collected while an engine captures.
class ContextScope : public CurrentContext {
 public:
  explicit ContextScope(const Device& device) noexcept;
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

 private:
  CUstreamCaptureMode capture_mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;  // what the thread's mode is exchanged for
};

// Does not wait for the default stream. Destroying it does not wait either.
class DeviceStream {
 public:
  // Streams of one priority may share a hardware queue (CUDA_DEVICE_MAX_CONNECTIONS), where one that is blocked on a
  // flag blocks the others. The engine's streams block (torch takes the four lowest priorities), so lanes and services,
  // which release them, have priorities of their own.
  enum class Priority : std::uint8_t { kDefault, kLane, kService };
  DeviceStream(const Device& device, Priority priority);
  ~DeviceStream();
  DeviceStream(const DeviceStream&) = delete;
  DeviceStream& operator=(const DeviceStream&) = delete;

  [[nodiscard]] CUstream get() const { return stream_; }
  [[nodiscard]] bool idle() const;
  void synchronize() const;

 private:
  const Device& device_;
  CUstream stream_ = nullptr;
};

// The stream of one service at a time. Libraries keep memory by stream as long as the process lives (cuBLAS on Hopper
// 32 MiB of workspace), so streams are given back and taken again: one for each service that was open at the same time.
class ServiceStream {
 public:
  explicit ServiceStream(std::shared_ptr<const Device> device);
  ~ServiceStream();  // one that is still busy is not given back
  ServiceStream(const ServiceStream&) = delete;
  ServiceStream& operator=(const ServiceStream&) = delete;

  [[nodiscard]] CUstream get() const { return stream_->get(); }
  [[nodiscard]] bool idle() const { return stream_->idle(); }

 private:
  std::shared_ptr<const Device> device_;  // before the stream, which needs it
  std::unique_ptr<DeviceStream> stream_;
};

// What a query of a stream or event says: not done, or not known because some capture forbids to ask. Any other error
// means that the device runs nothing any more.
bool is_pending(CUresult result);

class DeviceEvent {
 public:
  enum class Kind : std::uint8_t { kOrder, kTimed };  // one that only orders costs less
  DeviceEvent(const Device& device, Kind kind);       // throws Error(kDevice)
  ~DeviceEvent();
  DeviceEvent(DeviceEvent&& other) noexcept : device_(other.device_), event_(std::exchange(other.event_, nullptr)) {}
  DeviceEvent& operator=(DeviceEvent&&) = delete;
  [[nodiscard]] CUevent get() const { return event_; }

 private:
  const Device& device_;
  CUevent event_ = nullptr;
};

// Device memory of this process, zeroed. Not freed once *kept is true: work that is under way may still touch it.
class DeviceBuffer final : public LocalBuffer {
 public:
  DeviceBuffer(const Device& device, ByteCount bytes, const std::string& label,
               std::shared_ptr<const bool> kept = nullptr);
  ~DeviceBuffer() override;
  [[nodiscard]] std::byte* data() const override { return reinterpret_cast<std::byte*>(memory_); }
  [[nodiscard]] ByteCount bytes() const override { return bytes_; }
  [[nodiscard]] CUdeviceptr at(ByteCount offset) const { return memory_ + offset; }

 private:
  const Device& device_;
  CUdeviceptr memory_ = 0;
  ByteCount bytes_;
  std::shared_ptr<const bool> kept_;
};

// Words that kernels and streams share with this process's threads; zeroed. They are not freed but given back and taken
// again: see csrc/DESIGN.md, "What a runtime does not free". Once *kept is true they are not given back: work that is
// under way may still write them.
class DeviceWords {
 public:
  DeviceWords(std::shared_ptr<const Device> device, ByteCount bytes, std::shared_ptr<const bool> kept);
  ~DeviceWords();
  DeviceWords(const DeviceWords&) = delete;
  DeviceWords& operator=(const DeviceWords&) = delete;
  [[nodiscard]] CUdeviceptr at(ByteCount offset) const { return memory_->at(offset); }

 private:
  std::shared_ptr<const Device> device_;
  std::unique_ptr<DeviceBuffer> memory_;
  std::shared_ptr<const bool> kept_;
};

// Of 64 bits, in page-locked host memory. A stream that writes 32 bits sets the lower half.
class HostWords {
 public:
  HostWords(std::shared_ptr<const Device> device, std::size_t count, std::shared_ptr<const bool> kept);
  ~HostWords();
  HostWords(const HostWords&) = delete;
  HostWords& operator=(const HostWords&) = delete;
  [[nodiscard]] std::uint64_t load(std::size_t index) const;
  void store(std::size_t index, std::uint64_t value) const;
  [[nodiscard]] CUdeviceptr on_device(std::size_t index) const { return mapped_ + index * sizeof(std::uint64_t); }

 private:
  std::shared_ptr<const Device> device_;
  std::size_t count_;
  std::uint64_t* words_ = nullptr;
  CUdeviceptr mapped_ = 0;
  std::shared_ptr<const bool> kept_;
};

inline CUdeviceptr device_pointer(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

}  // namespace sidp::nvshmem
