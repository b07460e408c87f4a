// A stand-in for libcuda.so.1 with two devices, so that the CUDA report is tested without a GPU.
// FAKE_CUDA_INIT gives the result of cuInit, FAKE_CUDA_DEVICES the device count, FAKE_CUDA_FAIL_ATTRIBUTE an
// attribute that fails. With -DWITHOUT_UUID it is a driver that lacks a function. A copy takes the time of 40 GB/s into
// device 0, which maps the other, and of 20 GB/s into device 1, which does not; with FAKE_CUDA_HANG it never ends.
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int number(const char* name, int fallback) {
  const char* text = getenv(name);
  return text == NULL ? fallback : atoi(text);
}

int cuInit(unsigned flags) {
  (void)flags;
  return number("FAKE_CUDA_INIT", 0);
}

int cuDriverGetVersion(int* version) {
  *version = 13010;
  return 0;
}

int cuGetErrorName(int error, const char** name) {
  *name = error == 100 ? "CUDA_ERROR_NO_DEVICE" : NULL;
  return error == 100 ? 0 : 1;
}

int cuGetErrorString(int error, const char** text) {
  *text = error == 100 ? "no CUDA-capable device is detected" : NULL;
  return error == 100 ? 0 : 1;
}

int cuDeviceGetCount(int* count) {
  *count = number("FAKE_CUDA_DEVICES", 2);
  return 0;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}

int cuDeviceGetName(char* name, int length, int device) {
  strncpy(name, device == 0 ? "Fake GPU zero" : "Fake GPU one", (size_t)length);
  return 0;
}

#ifndef WITHOUT_UUID
int cuDeviceGetUuid_v2(char* uuid, int device) {
  for (int i = 0; i < 16; ++i) uuid[i] = (char)(0xF0 + i - 0x10 * device);
  return 0;
}
#endif

int cuDeviceTotalMem_v2(size_t* bytes, int device) {
  *bytes = ((size_t)80 + (size_t)device) << 30;
  return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (attribute == number("FAKE_CUDA_FAIL_ATTRIBUTE", -1)) return 999;
  switch (attribute) {
    case 16:  // multiprocessors
      *value = 132;
      return 0;
    case 40:  // async engines
      *value = 3;
      return 0;
    case 75:  // compute capability, major
      *value = 9;
      return 0;
    case 98:  // flush remote writes
      *value = device;
      return 0;
    case 122:  // 64-bit stream memory operations
    case 123:  // wait for NOR
      *value = 1;
      return 0;
    default:
      *value = 0;
      return 0;
  }
}

int cuDeviceCanAccessPeer(int* can_access, int device, int peer) {
  *can_access = device == 0 && peer == 1;
  return 0;
}

// What the measurement of copies calls. A context is its device's ordinal plus one.
static long current = 0;

int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = (void*)(long)(device + 1);
  return 0;
}
int cuDevicePrimaryCtxRelease_v2(int device) {
  (void)device;
  return 0;
}
int cuCtxPushCurrent_v2(void* context) {
  if (current != 0) return 201;
  current = (long)context;
  return 0;
}
int cuCtxPopCurrent_v2(void** context) {
  *context = (void*)current;
  current = 0;
  return 0;
}
int cuCtxEnablePeerAccess(void* peer, unsigned flags) {
  (void)flags;
  return current == 1 && (long)peer == 2 ? 0 : 217;
}
int cuMemAlloc_v2(unsigned long long* memory, size_t bytes) {
  *memory = 0x1000;
  if (current == 0) return 201;
  return number("FAKE_CUDA_FULL", 0) && bytes > 0 ? 2 : 0;
}
int cuMemFree_v2(unsigned long long memory) { return memory == 0x1000 ? 0 : 1; }
int cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
  (void)flags, (void)priority;
  *stream = (void*)0x2000;
  return current == 0 ? 201 : 0;
}
int cuStreamDestroy_v2(void* stream) { return stream == (void*)0x2000 ? 0 : 1; }
int cuStreamSynchronize(void* stream) { return stream == (void*)0x2000 ? 0 : 1; }
int cuMemcpyPeerAsync(unsigned long long dst, void* dst_context, unsigned long long src, void* src_context, size_t bytes,
                      void* stream) {
  (void)dst, (void)src, (void)stream;
  if ((long)dst_context != current || dst_context == src_context) return 1;
  while (number("FAKE_CUDA_HANG", 0)) sleep(1);
  const struct timespec duration = {0, (long)((double)bytes / (current == 1 ? 40 : 20))};
  nanosleep(&duration, NULL);
  return 0;
}

// The GPU backend's functions: there, and never called here.
#define NOT_CALLED(name) \
  int name(void) { return 999; }
NOT_CALLED(cuThreadExchangeStreamCaptureMode)
NOT_CALLED(cuCtxGetStreamPriorityRange)
NOT_CALLED(cuCtxCreate_v4)
NOT_CALLED(cuCtxCreate_v2)
NOT_CALLED(cuCtxDestroy_v2)
NOT_CALLED(cuCtxSetLimit)
NOT_CALLED(cuCtxGetCurrent)
NOT_CALLED(cuMemGetInfo_v2)
NOT_CALLED(cuMemSetAccess)
NOT_CALLED(cuPointerGetAttribute)
NOT_CALLED(cuMemHostAlloc)
NOT_CALLED(cuMemHostGetDevicePointer_v2)
NOT_CALLED(cuMemHostRegister_v2)
NOT_CALLED(cuMemHostUnregister)
NOT_CALLED(cuMemcpyAsync)
NOT_CALLED(cuMemcpyDtoDAsync_v2)
NOT_CALLED(cuMemsetD8Async)
NOT_CALLED(cuStreamQuery)
NOT_CALLED(cuStreamWaitEvent)
NOT_CALLED(cuStreamWaitValue32_v2)
NOT_CALLED(cuStreamWriteValue32_v2)
NOT_CALLED(cuStreamBatchMemOp_v2)
NOT_CALLED(cuLibraryLoadData)
NOT_CALLED(cuLibraryGetKernel)
NOT_CALLED(cuLaunchKernelEx)
NOT_CALLED(cuEventCreate)
NOT_CALLED(cuEventDestroy_v2)
NOT_CALLED(cuEventQuery)
NOT_CALLED(cuEventRecord)
NOT_CALLED(cuEventElapsedTime)     // to be looked up by one name or the other, as cuda.h
NOT_CALLED(cuEventElapsedTime_v2)  // of CUDA 12 or 13 has it
NOT_CALLED(cuGraphInstantiateWithFlags)
NOT_CALLED(cuGraphLaunch)
NOT_CALLED(cuGraphExecDestroy)
NOT_CALLED(cuLaunchHostFunc)
