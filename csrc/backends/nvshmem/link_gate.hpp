// A lane's copies wait in their owners' queues (core/link_queue.hpp). The lane's stream tells a thread, by words in
// page-locked memory, when a copy could start and when it has arrived, and waits for the thread's word in between. The
// thread makes no CUDA call, and no other rank's progress depends on what this process still has to queue.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "core/link_queue.hpp"
#include "device.hpp"

namespace sidp::nvshmem {

class LinkGate {
 public:
  // owners: of the copies of one pass, in order. kept: see HostWords.
  LinkGate(const std::shared_ptr<const Device>& device, LinkQueue queue, std::vector<Rank> owners,
           std::shared_ptr<const bool> kept);
  ~LinkGate() { stop(); }
  LinkGate(const LinkGate&) = delete;
  LinkGate& operator=(const LinkGate&) = delete;

  // On a stream of the own GPU, around copy number 1, 2 ... (its low 32 bits). Throw Error(kDevice).
  void enter(CUstream stream, std::uint32_t number) const;
  void leave(CUstream stream, std::uint32_t number) const;

  // From now on nothing waits here.
  void stop() noexcept;
  [[nodiscard]] std::uint64_t waited_ns() const { return waited_ns_.load(std::memory_order_relaxed); }
  [[nodiscard]] std::uint64_t taken() const { return taken_.load(std::memory_order_relaxed); }

 private:
  enum class Word : std::uint8_t { kAsks, kMayEnter, kLeft, kNumWords };  // numbers of copies
  [[nodiscard]] bool reached(Word word, std::uint32_t number) const;
  void write(CUstream stream, Word word, std::uint32_t number) const;
  void run();

  const Device& device_;
  LinkQueue queue_;  // the thread's
  std::vector<Rank> owners_;
  HostWords words_;
  std::atomic<std::uint64_t> waited_ns_{0}, taken_{0};
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace sidp::nvshmem
