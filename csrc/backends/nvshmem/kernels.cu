// The two kernels of the activation channel. Both end with a word that is set by the last block to finish, after the
// rows of all blocks are visible to every observer of the system (PTX memory model: bar.sync, then fence.sys, then a
// release at system scope).
#include <cstdint>

namespace {

__device__ inline void store_release(std::uint32_t* word, std::uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ inline void store_release(std::uint64_t* word, std::uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

__device__ inline std::uint32_t load_acquire(const std::uint32_t* word) {
  std::uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

__device__ inline void copy_bytes(char* dst, const char* src, std::uint64_t bytes) {
  const std::uint64_t first = blockIdx.x * static_cast<std::uint64_t>(blockDim.x) + threadIdx.x;
  const std::uint64_t step = static_cast<std::uint64_t>(gridDim.x) * blockDim.x;
  std::uint64_t done = 0;
  if (((reinterpret_cast<std::uint64_t>(dst) | reinterpret_cast<std::uint64_t>(src)) & 15) == 0) {
    auto* to = reinterpret_cast<uint4*>(dst);
    const auto* from = reinterpret_cast<const uint4*>(src);
    const std::uint64_t count = bytes / 16;
    std::uint64_t i = first;
    for (; i + 3 * step < count; i += 4 * step) {  // four loads in flight a thread
      const uint4 a = from[i], b = from[i + step], c = from[i + 2 * step], d = from[i + 3 * step];
      to[i] = a, to[i + step] = b, to[i + 2 * step] = c, to[i + 3 * step] = d;
    }
    for (; i < count; i += step) to[i] = from[i];
    done = count * 16;
  }
  for (std::uint64_t i = done + first; i < bytes; i += step) dst[i] = src[i];
}

// True in one thread, once every block has come here.
__device__ inline bool last_to_finish(unsigned* finished) {
  __syncthreads();
  if (threadIdx.x != 0) return false;
  __threadfence_system();
  if (atomicInc(finished, gridDim.x - 1) != gridDim.x - 1) return false;  // wraps to 0 for the next launch
  __threadfence_system();
  return true;
}

// What a requester has had answered by one owner.
struct Counts {
  std::uint64_t answers, rows, bytes;
};

}  // namespace

// Copies rows to another GPU, or to the own one, and then sets a word there; word may be null.
extern "C" __global__ void sidp_put(char* dst, const char* src, std::uint64_t bytes, std::uint32_t* word,
                                    std::uint32_t value, unsigned* finished) {
  copy_bytes(dst, src, bytes);
  if (last_to_finish(finished) && word != nullptr) store_release(word, value);
}

// Takes an answer out of its slot, then frees the slot. `flag` was seen set by the stream before: 1 rows, 2 no answer.
// request: the requester's word at the owner, set back to 0. sent_rows, sent_bytes: of the request, for the counts,
// which are kept on the device and copied to the host.
extern "C" __global__ void sidp_take(char* dst, const char* src, std::uint64_t bytes, std::uint32_t* flag,
                                     std::uint32_t* request, std::uint64_t sent_rows, std::uint64_t sent_bytes,
                                     Counts* counts, Counts* counts_host, std::uint64_t* failed_host,
                                     unsigned* finished) {
  __shared__ bool failed;  // the flag is in host memory: one thread of a block reads it
  if (threadIdx.x == 0) failed = load_acquire(flag) != 1;
  __syncthreads();
  if (!failed) copy_bytes(dst, src, bytes);
  if (!last_to_finish(finished)) return;
  *flag = 0;
  store_release(request, 0);
  if (failed) store_release(failed_host, 1);
  const Counts now{counts->answers + 1, counts->rows + sent_rows, counts->bytes + sent_bytes};
  *counts = now;
  counts_host->rows = now.rows;
  counts_host->bytes = now.bytes;
  store_release(&counts_host->answers, now.answers);
}
