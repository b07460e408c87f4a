// The functions of the CUDA driver, looked up at run time. Nothing links libcuda, so the module imports on a
// machine without a GPU or a driver; what is missing is a Status that says so.
#pragma once

#include <cuda.h>

#include <string>

namespace sidp::cuda {

// Empty reason: everything is there.
struct Status {
  std::string reason;
  [[nodiscard]] bool ok() const noexcept { return reason.empty(); }
};

// One row per function. cuda.h maps a name to the ABI it declares (cuDeviceTotalMem is cuDeviceTotalMem_v2),
// and the same mapping gives the symbol that is looked up, so a signature can never meet another version's
// code. cuDeviceGetUuid_v2 is spelled out because CUDA 12 headers still map the short name to the first
// version.
#define SIDP_CUDA_DRIVER_FUNCTIONS(X)  \
  X(cuInit)                            \
  X(cuDriverGetVersion)                \
  X(cuGetErrorName)                    \
  X(cuGetErrorString)                  \
  X(cuDeviceGetCount)                  \
  X(cuDeviceGet)                       \
  X(cuDeviceGetName)                   \
  X(cuDeviceGetUuid_v2)                \
  X(cuDeviceTotalMem)                  \
  X(cuDeviceGetAttribute)              \
  X(cuDeviceCanAccessPeer)             \
  X(cuDevicePrimaryCtxRetain)          \
  X(cuDevicePrimaryCtxRelease)         \
  X(cuCtxCreate)                       \
  X(cuCtxDestroy)                      \
  X(cuCtxSetLimit)                     \
  X(cuCtxGetCurrent)                   \
  X(cuCtxPushCurrent)                  \
  X(cuCtxPopCurrent)                   \
  X(cuThreadExchangeStreamCaptureMode) \
  X(cuCtxGetStreamPriorityRange)       \
  X(cuCtxEnablePeerAccess)             \
  X(cuMemGetInfo)                      \
  X(cuMemSetAccess)                    \
  X(cuPointerGetAttribute)             \
  X(cuMemAlloc)                        \
  X(cuMemFree)                         \
  X(cuMemHostAlloc)                    \
  X(cuMemHostGetDevicePointer)         \
  X(cuMemHostRegister)                 \
  X(cuMemHostUnregister)               \
  X(cuMemcpyAsync)                     \
  X(cuMemcpyDtoDAsync)                 \
  X(cuMemcpyPeerAsync)                 \
  X(cuMemsetD8Async)                   \
  X(cuStreamCreateWithPriority)        \
  X(cuStreamDestroy)                   \
  X(cuStreamQuery)                     \
  X(cuStreamSynchronize)               \
  X(cuStreamWaitEvent)                 \
  X(cuStreamWaitValue32)               \
  X(cuStreamWriteValue32)              \
  X(cuStreamBatchMemOp)                \
  X(cuLibraryLoadData)                 \
  X(cuLibraryGetKernel)                \
  X(cuLaunchKernelEx)                  \
  X(cuLaunchHostFunc)                  \
  X(cuEventCreate)                     \
  X(cuEventDestroy)                    \
  X(cuEventQuery)                      \
  X(cuEventRecord)                     \
  X(cuEventElapsedTime)                \
  X(cuGraphInstantiate)                \
  X(cuGraphLaunch)                     \
  X(cuGraphExecDestroy)

struct DriverApi {
  Status status;  // not ok(): every function below is null
#define SIDP_CUDA_MEMBER(name) decltype(&::name) name = nullptr;
  SIDP_CUDA_DRIVER_FUNCTIONS(SIDP_CUDA_MEMBER)
#undef SIDP_CUDA_MEMBER
};

// The process's table, loaded by the first call (thread-safe) and kept until the process ends. A failure is
// kept too: a driver that appears later is seen by a new process.
const DriverApi& driver_api();

// Ok for CUDA_SUCCESS, else e.g. "cuInit failed: CUDA_ERROR_NO_DEVICE (no CUDA-capable device is detected)".
// Requires api.status.ok().
Status check(const DriverApi& api, CUresult result, const std::string& what);

}  // namespace sidp::cuda
