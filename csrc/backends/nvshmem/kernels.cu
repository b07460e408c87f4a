// The kernels of the activation channel. What follows the copy is done by the last block to finish, but for the flags
// that each block sets for itself. Words in host
// memory are a microsecond away, and a fence that follows a store to one waits for it: so few accesses, and no fence
// that the end of the kernel makes superfluous. (A take whose blocks all read the flag with acquire took 33 us instead
// of 4.)
#include <cstdint>

#include "kernel_words.hpp"

namespace {

using sidp::nvshmem::Counts;
using sidp::nvshmem::kNobodyWaits;
using sidp::nvshmem::RequestWords;
using sidp::nvshmem::TurnWords;
using sidp::nvshmem::WordAddress;

__device__ inline void store(std::uint32_t* word, std::uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ inline void store(std::uint64_t* word, std::uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

__device__ inline std::uint32_t load(const std::uint32_t* word) {
  std::uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

__device__ inline std::uint64_t load(const std::uint64_t* word) {
  std::uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

__device__ inline std::uint64_t now_ns() {
  std::uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

// Turns order work, they protect nothing: so a wait for one ends, come what may.
constexpr std::uint64_t kLongestWaitNs = 10'000'000;

__device__ inline std::uint32_t next_epoch(std::uint32_t epoch) {
  return epoch == kNobodyWaits ? epoch : epoch + 1 == kNobodyWaits ? 1 : epoch + 1;
}

__device__ inline std::uint32_t* word32(WordAddress address) { return reinterpret_cast<std::uint32_t*>(address); }
__device__ inline std::uint64_t* word64(WordAddress address) { return reinterpret_cast<std::uint64_t*>(address); }

// The engine's own layer waits here for the services that were launched before it.
__device__ inline void wait_for_services(std::uint64_t seen_launched, const TurnWords& words) {
  const std::uint64_t *launched_host = word64(words.launched_host), *served = word64(words.served);
  std::uint64_t last = seen_launched;
  const std::uint64_t start = now_ns();
  while (load(served) < last && now_ns() - start < kLongestWaitNs) {
    const std::uint64_t launched = load(launched_host);  // less than it was where a launch failed
    last = launched < seen_launched ? launched : seen_launched;
  }
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

// Where a launch may begin before the kernel in front of it has ended: waits for that end.
__device__ inline void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// True in one thread, once every block has come here. The fence orders what all blocks did before what this thread does
// next, for observers on the GPU or (PTX memory model: bar.sync, fence.sys, then a store) in the whole system.
template <void kFence()>
__device__ inline bool last_to_finish(unsigned* finished) {
  __syncthreads();
  if (threadIdx.x != 0) return false;
  kFence();
  if (atomicInc(finished, gridDim.x - 1) != gridDim.x - 1) return false;  // wraps to 0 for the next launch
  kFence();
  return true;
}

constexpr unsigned kWarp = 0xFFFFFFFF;

// The slot of the answer is free for the next one, and all of the request's words are; by one thread. failed: of what
// sidp_await found, now or before.
__device__ inline void end_request(const RequestWords& words, bool failed) {
  store(word32(words.flag), 0);
  if (failed) store(word64(words.failed_host), 1);
  store(word32(words.request), 0);
  auto* const counts = reinterpret_cast<Counts*>(words.counts);
  auto* const counts_host = reinterpret_cast<Counts*>(words.counts_host);
  const Counts before = *counts;
  const std::uint32_t epoch = words.epoch != 0 ? load(word32(words.epoch)) : 0;  // on its way with them
  const Counts now{before.answers + 1, before.rows + words.sent_rows, before.bytes + words.sent_bytes};
  *counts = now;
  store(&counts_host->rows, now.rows);
  store(&counts_host->bytes, now.bytes);
  store(&counts_host->answers, now.answers);
  if (words.answered_host != 0) store(word64(words.answered_host), words.number);
  if (words.epoch != 0) store(word32(words.epoch), failed ? kNobodyWaits : next_epoch(epoch));
}

}  // namespace

// Copies rows to another GPU, or to the own one, and then sets a word there; word may be null. block_flags (or null):
// each block sets the one of its number when it has copied, so no block waits for another; `word` is then set first, as
// a bell. Flags are set to what follows *epoch, or to 1 (null). withheld (or null): if it is not 0, no flag is set.
// turn: of this rank's engine, which ends here (or null). served, served_host: the service's count of answers, on the
// device and for the host, which this one adds to (or null).
extern "C" __global__ void sidp_put(char* dst, const char* src, std::uint64_t bytes, std::uint32_t* word,
                                    std::uint32_t value, unsigned* finished, std::uint32_t* block_flags,
                                    const std::uint32_t* epoch, const std::uint64_t* withheld, std::uint64_t* turn,
                                    std::uint64_t* served, std::uint64_t* served_host) {
  wait_for_predecessor();
  const std::uint64_t withholds = withheld != nullptr && threadIdx.x == 0 ? load(withheld) : 0;  // on its way meanwhile
  const std::uint32_t answered = epoch != nullptr && threadIdx.x == 0 ? load(epoch) : 0;         // likewise
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    if (word != nullptr && block_flags != nullptr) store(word, value);
    if (turn != nullptr) store(turn, 0);
  }
  copy_bytes(dst, src, bytes);
  if (block_flags != nullptr) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence_system();  // of what the whole block copied (PTX memory model: bar.sync, fence.sys, then a store)
    if (withholds == 0) store(block_flags + blockIdx.x, epoch != nullptr ? next_epoch(answered) : 1);
    if (served == nullptr || atomicInc(finished, gridDim.x - 1) != gridDim.x - 1) return;
  } else {
    if (!last_to_finish<__threadfence_system>(finished)) return;
    if (word != nullptr) store(word, value);
    if (served == nullptr) return;
  }
  const std::uint64_t count = *served + 1;
  store(served, count);
  store(served_host, count);
}

// Waits until `count` flags on the device are set, or for the host's release (the other word): then `failed` says so,
// and stays so. One warp, a flag each, as it holds its place on a multiprocessor while others compute. The fences make
// the relaxed loads acquires (PTX memory model), and the end of the kernel hands that on to what follows. Flags are set
// when they are what follows *epoch, which is then stored to *seen, or when they are 1 (null). reset: whether they are
// set to 0 here. request: ended here, as no take follows, unless its `request` is 0.
extern "C" __global__ void sidp_await(std::uint32_t* flags, unsigned count, const std::uint32_t* released,
                                      std::uint64_t* failed, unsigned reset, const std::uint32_t* epoch,
                                      std::uint32_t* seen, const RequestWords request) {
  wait_for_predecessor();
  const bool has_flag = threadIdx.x < count, ends = threadIdx.x == 0 && request.request != 0;
  std::uint32_t flag = has_flag ? load(flags + threadIdx.x) : 0;  // on its way with the next two
  const std::uint32_t before = epoch != nullptr ? load(epoch) : 0;
  const bool failed_before = ends && load(failed) != 0;
  const std::uint32_t wanted = epoch != nullptr ? next_epoch(before) : 1;
  bool answered = false;
  for (unsigned looks = 1;; ++looks) {
    answered = __all_sync(kWarp, !has_flag || flag == wanted || flag == kNobodyWaits);
    if (answered) break;
    // a look at the host takes as long as many at the device
    if (looks % 64 == 0 && __any_sync(kWarp, load(released) != 0)) break;
    if (has_flag) flag = load(flags + threadIdx.x);
  }
  if (answered) {
    __threadfence_system();
    if (has_flag && reset != 0) store(flags + threadIdx.x, 0);
    if (threadIdx.x == 0 && seen != nullptr) store(seen, wanted);
    // A stand-in's crosses the link, and the owner may be back for the next request, which waits for this one's answer.
    if (seen != epoch) __threadfence_system();
  } else if (threadIdx.x == 0) {
    store(failed, 1);
  }
  if (!ends) return;
  if (request.turn.turn != 0) store(word64(request.turn.turn), 1);
  const std::uint64_t launched = request.turn.turn != 0 ? load(word64(request.turn.launched_host)) : 0;
  end_request(request, !answered || failed_before);
  if (request.turn.turn != 0) wait_for_services(launched, request.turn);
}

// Takes the engine's turn before a layer of its own; see csrc/DESIGN.md.
extern "C" __global__ void sidp_turn(const TurnWords words) {
  wait_for_predecessor();
  store(word64(words.turn), 1);
  wait_for_services(load(word64(words.launched_host)), words);
}

// Takes an answer out of its slot, then ends the request. The stream has waited for its flag, so the rows are there: 1.
// Or 2, no answer: then the copy is of no use, and the host is told. Or it was sidp_await that waited, and said in
// `unanswered` if it failed.
extern "C" __global__ void sidp_take(char* dst, const char* src, std::uint64_t bytes, unsigned* finished,
                                     const RequestWords request) {
  wait_for_predecessor();
  const bool looks = blockIdx.x == 0 && threadIdx.x == 0, turns = looks && request.turn.turn != 0;
  const bool spun = request.unanswered != 0;
  if (turns) store(word64(request.turn.turn), 1);
  const std::uint32_t state = looks && !spun ? load(word32(request.flag)) : 1;  // on its way while this thread copies
  const std::uint64_t failed = threadIdx.x == 0 && spun ? load(word64(request.unanswered)) : 0;  // likewise
  const std::uint64_t launched = turns ? load(word64(request.turn.launched_host)) : 0;           // likewise
  copy_bytes(dst, src, bytes);
  if (state != 1) store(word64(request.failed_host), 1);
  if (last_to_finish<__threadfence>(finished)) end_request(request, failed != 0);
  if (turns) wait_for_services(launched, request.turn);
}
