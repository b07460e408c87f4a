// A stand-in for libcuda.so.1 with two devices, so that the CUDA report is tested without a GPU.
// FAKE_CUDA_INIT gives the result of cuInit, FAKE_CUDA_DEVICES the device count, FAKE_CUDA_FAIL_ATTRIBUTE an
// attribute that fails. With -DWITHOUT_UUID it is a driver that lacks a function.
#include <stdlib.h>
#include <string.h>

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

// The GPU backend's functions: there, and never called by the report.
#define NOT_CALLED(name) \
  int name(void) { return 999; }
NOT_CALLED(cuDevicePrimaryCtxRetain)
NOT_CALLED(cuDevicePrimaryCtxRelease_v2)
NOT_CALLED(cuCtxPushCurrent_v2)
NOT_CALLED(cuCtxPopCurrent_v2)
NOT_CALLED(cuCtxGetStreamPriorityRange)
NOT_CALLED(cuMemGetInfo_v2)
NOT_CALLED(cuMemAlloc_v2)
NOT_CALLED(cuMemFree_v2)
NOT_CALLED(cuMemHostAlloc)
NOT_CALLED(cuMemFreeHost)
NOT_CALLED(cuMemHostGetDevicePointer_v2)
NOT_CALLED(cuMemHostRegister_v2)
NOT_CALLED(cuMemHostUnregister)
NOT_CALLED(cuMemcpyAsync)
NOT_CALLED(cuMemsetD8Async)
NOT_CALLED(cuStreamCreateWithPriority)
NOT_CALLED(cuStreamDestroy_v2)
NOT_CALLED(cuStreamQuery)
NOT_CALLED(cuStreamSynchronize)
NOT_CALLED(cuStreamWaitEvent)
NOT_CALLED(cuStreamWaitValue32_v2)
NOT_CALLED(cuStreamWriteValue32_v2)
NOT_CALLED(cuStreamBatchMemOp_v2)
NOT_CALLED(cuLibraryLoadData)
NOT_CALLED(cuLibraryUnload)
NOT_CALLED(cuLibraryGetKernel)
NOT_CALLED(cuLaunchKernel)
NOT_CALLED(cuEventCreate)
NOT_CALLED(cuEventDestroy_v2)
NOT_CALLED(cuEventQuery)
NOT_CALLED(cuEventRecord)
NOT_CALLED(cuGraphInstantiateWithFlags)
NOT_CALLED(cuGraphLaunch)
NOT_CALLED(cuGraphExecDestroy)
NOT_CALLED(cuLaunchHostFunc)
