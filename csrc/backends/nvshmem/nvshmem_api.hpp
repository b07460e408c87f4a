// NVSHMEM's host functions, looked up in the library that nvshmem4py loaded into this process. Nothing links NVSHMEM.
#pragma once

#include <cstddef>
#include <string>

struct CUstream_st;

namespace sidp::nvshmem {

// Signatures: nvshmem_api.h and nvshmemx_api.h of NVSHMEM 3.
struct NvshmemApi {
  std::string missing;  // why nothing can be called; empty when all are there
  int (*my_pe)() = nullptr;
  int (*n_pes)() = nullptr;
  void* (*malloc)(std::size_t bytes) = nullptr;  // collective
  void (*free)(void* memory) = nullptr;          // collective
  void* (*ptr)(const void* memory, int pe) = nullptr;
  void (*getmem_on_stream)(void* dst, const void* src, std::size_t bytes, int pe, CUstream_st* stream) = nullptr;
  // Local. The transports of peers that are not mapped write only into the heap and into what was registered.
  int (*buffer_register)(void* memory, std::size_t bytes) = nullptr;  // 0: done; refuses overlaps
  int (*buffer_unregister)(void* memory) = nullptr;
};

// The process's table. A failure is not kept: NVSHMEM may be initialised later.
NvshmemApi nvshmem_api();

}  // namespace sidp::nvshmem
