// The emulated device: streams, events, contexts and memory of emulated_cuda.cpp.
#pragma once

#include <cuda.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "emulated_work.hpp"

namespace sidp::emulator {

struct Graph {
  std::vector<Work> nodes;
};

struct Stream {
  CUcontext context = nullptr;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Work> queue;
  bool busy = false;
  bool destroyed = false;
  Graph* capturing = nullptr;
  bool global_capture = false;

  void run() {
    std::unique_lock lock(mutex);
    while (true) {
      changed.wait(lock, [this] { return !queue.empty() || destroyed; });
      if (queue.empty()) return;
      const Work work = std::move(queue.front());
      queue.pop_front();
      busy = true;
      lock.unlock();
      work();
      lock.lock();
      busy = false;
      changed.notify_all();
    }
  }
  [[nodiscard]] bool idle() const { return queue.empty() && !busy; }
};

struct Event {
  CUcontext context = nullptr;
  std::atomic<std::uint64_t> recorded{0}, done{0};
  std::atomic<std::int64_t> done_ns{0};
  bool timed = false;
};

inline std::int64_t now_ns() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

// Never destroyed: stream threads may outlive main().
struct State {
  std::mutex mutex;
  std::map<CUstream, std::shared_ptr<Stream>> streams;
  std::map<CUdeviceptr, std::size_t> memory;
  std::map<CUdeviceptr, std::set<int>> mappings;  // of a peer's memory, each kMapping long: the devices let in
  int num_devices = 1, contexts = 0;
  std::atomic<bool> fail_access = false;
  std::size_t total = std::size_t{80} << 30, used = 0;
  std::uintptr_t next_stream = 0x1000;
  std::atomic<bool> fail_graph_launch = false;
  std::atomic<int> events = 0;              // that were created and not destroyed
  std::atomic<int> events_until_fail = -1;  // creations; below 0: none fails
  std::atomic<double> drift = 0;            // of the device's clock: by how much it is too fast
  std::atomic<int> global_captures = 0;     // that forbid calls to every thread
  std::atomic<bool> capture_broken = false;
  std::recursive_mutex context;  // what a call that waits for the device holds
};

inline State& state() {
  static auto* const s = new State;
  return *s;
}

// A thread's stack of contexts. Static storage: memory that a library's thread-local objects take dynamically is freed
// where ThreadSanitizer cannot see it.
__attribute__((tls_model("initial-exec"))) inline thread_local int pushed = 0;
__attribute__((tls_model("initial-exec"))) inline thread_local CUcontext stack[16] = {};
__attribute__((tls_model("initial-exec"))) inline thread_local CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
inline constexpr CUdeviceptr kMapping = 4096;

// A context's low byte is its device; the primary one has nothing above.
inline CUcontext context_of(int number, CUdevice device) {
  return reinterpret_cast<CUcontext>(0x10000 + 0x100 * static_cast<std::uintptr_t>(number) +
                                     static_cast<unsigned>(device));
}
inline CUcontext current() { return pushed == 0 ? nullptr : stack[pushed - 1]; }
inline int current_device() { return static_cast<int>(reinterpret_cast<std::uintptr_t>(current()) & 0xFF); }
inline CUresult push(CUcontext context) {
  if (pushed == std::ssize(stack)) return CUDA_ERROR_INVALID_VALUE;
  stack[pushed++] = context;
  return CUDA_SUCCESS;
}

// A device that is not the own one reads only the mappings that it was let into, and each byte of them.
inline bool may_read(CUdeviceptr begin, std::size_t bytes) {
  if (current_device() == 0) return true;
  const std::lock_guard lock(state().mutex);
  for (CUdeviceptr at = begin / kMapping * kMapping; at < begin + bytes; at += kMapping) {
    const auto found = state().mappings.find(at);
    if (found == state().mappings.end() || !found->second.contains(current_device())) return false;
  }
  return true;
}

// A call that a capture of mode GLOBAL forbids to threads that did not opt out, and which breaks that capture.
inline bool forbidden() {
  if (state().global_captures == 0 || mode == CU_STREAM_CAPTURE_MODE_RELAXED) return false;
  state().capture_broken = true;
  return true;
}

inline std::shared_ptr<Stream> find(CUstream handle) {
  const std::lock_guard lock(state().mutex);
  const auto found = state().streams.find(handle);
  return found == state().streams.end() ? nullptr : found->second;
}

inline CUresult enqueue(CUstream handle, Work work) {
  std::unique_lock held(state().context, std::defer_lock);
  if (current_device() == 0) held.lock();
  const auto stream = find(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->context != current()) return CUDA_ERROR_INVALID_CONTEXT;
  const std::lock_guard lock(stream->mutex);
  if (stream->capturing != nullptr) {
    stream->capturing->nodes.push_back(std::move(work));
  } else {
    stream->queue.push_back(std::move(work));
    stream->changed.notify_all();
  }
  return CUDA_SUCCESS;
}

}  // namespace sidp::emulator
