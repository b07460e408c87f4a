// A stand-in for libcuda.so.1 whose device is this machine: memory is the process's, a stream is a thread that works
// off a queue, a graph is a list of what was queued while capturing. It runs the GPU backend's C++ code, waits and all,
// where there is no GPU. It knows the kernels of csrc/backends/nvshmem/kernels.cu by name and does what they do;
// the kernels themselves, and whatever a real driver blocks on, show on a real GPU only.
#include <cuda.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "emulated_state.hpp"

using namespace sidp::emulator;

#define EMULATED extern "C" __attribute__((visibility("default")))

// --- For tests
EMULATED void emulator_set_total(std::size_t bytes) { state().total = bytes; }
EMULATED void emulator_use(std::int64_t bytes) {
  const std::lock_guard lock(state().mutex);
  state().used += static_cast<std::size_t>(bytes);
  if (state().used > state().total) std::abort();  // NVSHMEM may end the process then
}
// A call that holds the context until a stream is idle, as the loading of a kernel does.
EMULATED void emulator_hold_context(CUstream stream) {
  const std::lock_guard held(state().context);
  cuStreamSynchronize(stream);
}
EMULATED void emulator_hold_rows(bool hold) { rows_held = hold; }
EMULATED void emulator_die_in_answer() { dies_in_answer = true; }
EMULATED void emulator_slow_puts() { slow_puts = true; }
EMULATED void emulator_fail_graph_launch(bool fail) { state().fail_graph_launch = fail; }

EMULATED void emulator_set_num_devices(int count) { state().num_devices = count; }
EMULATED void emulator_fail_access() { state().fail_access = true; }
EMULATED void emulator_map(char* memory, std::size_t bytes, bool mapped) {
  const std::lock_guard lock(state().mutex);
  const auto begin = reinterpret_cast<CUdeviceptr>(memory);  // of whole pages
  for (CUdeviceptr at = begin; at < begin + bytes; at += kMapping)
    if (mapped)
      state().mappings[at];
    else
      state().mappings.erase(at);
}

EMULATED int emulator_num_events() { return state().events; }
EMULATED void emulator_fail_event(int after) { state().events_until_fail = after; }
EMULATED void emulator_set_drift(double drift) { state().drift = drift; }

// --- Device and context
EMULATED CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
EMULATED CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
EMULATED CUresult cuGetErrorName(CUresult, const char** name) {
  *name = "EMULATED_ERROR";
  return CUDA_SUCCESS;
}
EMULATED CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "the emulator was told to fail, or was used wrongly";
  return CUDA_SUCCESS;
}
EMULATED CUresult cuDeviceGetCount(int* count) {
  *count = state().num_devices;
  return CUDA_SUCCESS;
}
EMULATED CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal < state().num_devices ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
EMULATED CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = context_of(0, device);
  return CUDA_SUCCESS;
}
EMULATED CUresult cuCtxCreate(CUcontext* context, CUctxCreateParams*, unsigned, CUdevice device) {
  const std::lock_guard lock(state().mutex);
  *context = context_of(++state().contexts, device);
  return push(*context);
}
EMULATED CUresult cuCtxDestroy(CUcontext) { return CUDA_SUCCESS; }
EMULATED CUresult cuCtxSetLimit(CUlimit, std::size_t) { return CUDA_SUCCESS; }
EMULATED CUresult cuCtxEnablePeerAccess(CUcontext context, unsigned) {
  return context == current() ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}
EMULATED CUresult cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }
EMULATED CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = current();
  return CUDA_SUCCESS;
}
EMULATED CUresult cuCtxPushCurrent(CUcontext context) { return push(context); }
EMULATED CUresult cuCtxPopCurrent(CUcontext* context) {
  if (pushed == 0) return CUDA_ERROR_INVALID_CONTEXT;
  *context = stack[--pushed];
  return CUDA_SUCCESS;
}
EMULATED CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* exchanged) {
  std::swap(*exchanged, mode);
  return CUDA_SUCCESS;
}
EMULATED CUresult cuCtxGetStreamPriorityRange(int* lowest, int* highest) {
  *lowest = 0, *highest = -5;
  return CUDA_SUCCESS;
}

// --- Memory
EMULATED CUresult cuMemGetInfo(std::size_t* free, std::size_t* total) {
  const std::lock_guard lock(state().mutex);
  *total = state().total, *free = state().total - state().used;
  return pushed == 0 ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}
EMULATED CUresult cuMemAlloc(CUdeviceptr* memory, std::size_t bytes) {
  if (forbidden()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  const std::lock_guard lock(state().mutex);
  if (pushed == 0) return CUDA_ERROR_INVALID_CONTEXT;
  if (bytes > state().total - state().used) return CUDA_ERROR_OUT_OF_MEMORY;
  *memory = reinterpret_cast<CUdeviceptr>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  state().used += state().memory[*memory] = bytes;
  return CUDA_SUCCESS;
}
EMULATED CUresult cuMemFree(CUdeviceptr memory) {
  if (forbidden()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  const std::lock_guard lock(state().mutex);
  const auto found = state().memory.find(memory);
  if (found == state().memory.end()) return CUDA_ERROR_INVALID_VALUE;
  state().used -= found->second;
  state().memory.erase(found);
  std::free(reinterpret_cast<void*>(memory));
  return CUDA_SUCCESS;
}
EMULATED CUresult cuMemHostAlloc(void** memory, std::size_t bytes, unsigned) {
  *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  return CUDA_SUCCESS;
}
EMULATED CUresult cuMemHostGetDevicePointer(CUdeviceptr* mapped, void* memory, unsigned) {
  *mapped = reinterpret_cast<CUdeviceptr>(memory);
  return CUDA_SUCCESS;
}
EMULATED CUresult cuMemHostRegister(void*, std::size_t, unsigned) { return CUDA_SUCCESS; }
EMULATED CUresult cuMemHostUnregister(void*) { return CUDA_SUCCESS; }
EMULATED CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  const std::lock_guard lock(state().mutex);
  const CUdeviceptr mapping = pointer / kMapping * kMapping;
  if (!state().mappings.contains(mapping)) return CUDA_ERROR_INVALID_VALUE;
  if (attribute == CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR)
    *static_cast<CUdeviceptr*>(data) = mapping;
  else
    *static_cast<std::size_t*>(data) = kMapping;
  return CUDA_SUCCESS;
}
EMULATED CUresult cuMemSetAccess(CUdeviceptr pointer, std::size_t bytes, const CUmemAccessDesc* access, std::size_t) {
  const std::lock_guard lock(state().mutex);
  const auto found = state().mappings.find(pointer);
  if (found == state().mappings.end() || bytes != kMapping || state().fail_access) return CUDA_ERROR_INVALID_VALUE;
  found->second.insert(access->location.id);
  return CUDA_SUCCESS;
}
EMULATED CUresult cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, std::size_t bytes, CUstream stream) {
  if (!may_read(src, bytes)) return CUDA_ERROR_INVALID_VALUE;
  return enqueue(stream, [=] { std::memcpy(reinterpret_cast<void*>(dst), reinterpret_cast<void*>(src), bytes); });
}
EMULATED CUresult cuMemcpyDtoDAsync(CUdeviceptr dst, CUdeviceptr src, std::size_t bytes, CUstream stream) {
  return cuMemcpyAsync(dst, src, bytes, stream);
}
EMULATED CUresult cuMemsetD8Async(CUdeviceptr dst, unsigned char value, std::size_t count, CUstream stream) {
  return enqueue(stream, [=] { std::memset(reinterpret_cast<void*>(dst), value, count); });
}

// --- Streams and events
EMULATED CUresult cuStreamCreateWithPriority(CUstream* handle, unsigned, int) {
  if (pushed == 0) return CUDA_ERROR_INVALID_CONTEXT;
  const auto stream = std::make_shared<Stream>();
  stream->context = current();
  const std::lock_guard lock(state().mutex);
  *handle = reinterpret_cast<CUstream>(state().next_stream += 0x10);
  state().streams[*handle] = stream;
  std::thread([stream] {
    push(stream->context);
    stream->run();
  }).detach();
  return CUDA_SUCCESS;
}
EMULATED CUresult cuStreamDestroy(CUstream handle) {
  const auto stream = find(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  {
    const std::lock_guard lock(state().mutex);
    state().streams.erase(handle);
  }
  const std::lock_guard lock(stream->mutex);
  stream->destroyed = true;
  stream->changed.notify_all();
  return CUDA_SUCCESS;
}
EMULATED CUresult cuStreamQuery(CUstream handle) {
  if (forbidden()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  const auto stream = find(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  const std::lock_guard lock(stream->mutex);
  return stream->idle() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
EMULATED CUresult cuStreamSynchronize(CUstream handle) {
  const auto stream = find(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  std::unique_lock lock(stream->mutex);
  stream->changed.wait(lock, [&] { return stream->idle(); });
  return CUDA_SUCCESS;
}
EMULATED CUresult cuStreamWaitValue32(CUstream stream, CUdeviceptr address, cuuint32_t value, unsigned flags) {
  return enqueue(stream, wait_value(address, value, flags));
}
EMULATED CUresult cuStreamWriteValue32(CUstream stream, CUdeviceptr address, cuuint32_t value, unsigned) {
  return enqueue(stream, write_value(address, value));
}
EMULATED CUresult cuStreamBatchMemOp(CUstream stream, unsigned count, CUstreamBatchMemOpParams* ops, unsigned) {
  // Late, so that what does not wait for the writes is seen.
  if (const CUresult result = enqueue(stream, [] { std::this_thread::sleep_for(std::chrono::milliseconds(1)); });
      result != CUDA_SUCCESS)
    return result;
  for (unsigned i = 0; i < count; ++i)
    if (const CUresult result = enqueue(stream, write_value(ops[i].writeValue.address, ops[i].writeValue.value));
        result != CUDA_SUCCESS)
      return result;
  return CUDA_SUCCESS;
}
EMULATED CUresult cuEventCreate(CUevent* event, unsigned flags) {
  if (state().events_until_fail >= 0 && state().events_until_fail-- == 0) return CUDA_ERROR_UNKNOWN;
  ++state().events;
  auto* const made = new Event;
  made->context = current();
  made->timed = (flags & CU_EVENT_DISABLE_TIMING) == 0;
  *event = reinterpret_cast<CUevent>(made);
  return CUDA_SUCCESS;
}
EMULATED CUresult cuEventDestroy(CUevent) {
  --state().events;
  return CUDA_SUCCESS;  // and no more: streams may still refer to it
}
EMULATED CUresult cuEventRecord(CUevent handle, CUstream stream) {
  auto* const event = reinterpret_cast<Event*>(handle);
  if (event->context != current()) return CUDA_ERROR_INVALID_HANDLE;
  return enqueue(stream, [event, number = ++event->recorded] {
    event->done_ns = now_ns();
    event->done = number;
  });
}
EMULATED CUresult cuEventQuery(CUevent handle) {
  if (forbidden()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  const auto* const event = reinterpret_cast<Event*>(handle);
  return event->done >= event->recorded ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
EMULATED CUresult cuEventElapsedTime(float* ms, CUevent first, CUevent last) {
  const auto* const start = reinterpret_cast<Event*>(first);
  const auto* const end = reinterpret_cast<Event*>(last);
  if (!start->timed || !end->timed || start->recorded == 0 || end->recorded == 0) return CUDA_ERROR_INVALID_HANDLE;
  if (start->done < start->recorded || end->done < end->recorded) return CUDA_ERROR_NOT_READY;
  *ms = static_cast<float>(static_cast<double>(end->done_ns - start->done_ns) * (1 + state().drift) / 1e6);
  return CUDA_SUCCESS;
}
EMULATED CUresult cuStreamWaitEvent(CUstream stream, CUevent handle, unsigned) {
  auto* const event = reinterpret_cast<Event*>(handle);
  return enqueue(stream, [event, number = event->recorded.load()] {
    while (event->done < number) nap();
  });
}

// --- Kernels and graphs
EMULATED CUresult cuLibraryLoadData(CUlibrary* library, const void*, CUjit_option*, void**, unsigned, CUlibraryOption*,
                                    void**, unsigned) {
  *library = reinterpret_cast<CUlibrary>(0x20);
  return CUDA_SUCCESS;
}
EMULATED CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary, const char* name) {
  for (const char* known : {kPut, kTake, kTurn, kAwait})
    if (std::strcmp(name, known) == 0) *kernel = reinterpret_cast<CUkernel>(const_cast<char*>(known));
  return *kernel == nullptr ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}
EMULATED CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void**) {
  const void* const kernel = function;
  const Work work = kernel == kPut    ? put(arguments, config->gridDimX)
                    : kernel == kTake ? take(arguments)
                    : kernel == kTurn ? turn(arguments)
                                      : await(arguments);
  const CUresult result = enqueue(config->hStream, work);
  return result == CUDA_SUCCESS && std::getenv("CUDA_LAUNCH_BLOCKING") != nullptr ? cuStreamSynchronize(config->hStream)
                                                                                  : result;
}
EMULATED CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data) {
  return enqueue(stream, [=] { function(data); });
}
EMULATED CUresult cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode how) {
  const auto stream = find(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  const std::lock_guard lock(stream->mutex);
  stream->capturing = new Graph;
  stream->global_capture = how == CU_STREAM_CAPTURE_MODE_GLOBAL;
  if (stream->global_capture) ++state().global_captures;
  return CUDA_SUCCESS;
}
EMULATED CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
  const auto stream = find(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  const std::lock_guard lock(stream->mutex);
  *graph = reinterpret_cast<CUgraph>(stream->capturing);
  stream->capturing = nullptr;
  if (!stream->global_capture) return CUDA_SUCCESS;
  --state().global_captures;
  return state().capture_broken ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
}
EMULATED CUresult cuGraphDestroy(CUgraph graph) {
  delete reinterpret_cast<Graph*>(graph);
  return CUDA_SUCCESS;
}
EMULATED CUresult cuGraphInstantiate(CUgraphExec* executable, CUgraph graph, unsigned long long) {
  *executable = reinterpret_cast<CUgraphExec>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return CUDA_SUCCESS;
}
EMULATED CUresult cuGraphLaunch(CUgraphExec graph, CUstream stream) {
  if (state().fail_graph_launch) return CUDA_ERROR_LAUNCH_FAILED;
  return enqueue(stream, [nodes = reinterpret_cast<Graph*>(graph)->nodes] {
    for (const Work& node : nodes) node();
  });
}
EMULATED CUresult cuGraphExecDestroy(CUgraphExec graph) {
  delete reinterpret_cast<Graph*>(graph);
  return CUDA_SUCCESS;
}

// --- Looked up by the backend, used by the report of devices only
#define NOT_EMULATED(name, ...) \
  EMULATED CUresult name(__VA_ARGS__) { return CUDA_ERROR_NOT_SUPPORTED; }
NOT_EMULATED(cuDeviceGetName, char*, int, CUdevice)
NOT_EMULATED(cuDeviceGetUuid_v2, CUuuid*, CUdevice)
NOT_EMULATED(cuDeviceTotalMem, std::size_t*, CUdevice)
NOT_EMULATED(cuDeviceGetAttribute, int*, CUdevice_attribute, CUdevice)
NOT_EMULATED(cuDeviceCanAccessPeer, int*, CUdevice, CUdevice)
NOT_EMULATED(cuMemcpyPeerAsync, CUdeviceptr, CUcontext, CUdeviceptr, CUcontext, std::size_t, CUstream)
