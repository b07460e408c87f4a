// The workload on the GPU backend, over an emulated device (tests/cpp/emulator): its steps run on a stream, checks and
// all.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>

#include "workload.hpp"

namespace sidp::test {

class EmulatedGpu {
 public:
  virtual ~EmulatedGpu() = default;
  // By rank, in this process: its own device is the first, then come those of the ranks after it.
  [[nodiscard]] virtual std::vector<int> ordinals() const = 0;
  virtual void set_total(std::size_t bytes) = 0;  // memory of the device
  virtual void take(std::int64_t bytes) = 0;      // so much of it is used by somebody else
  virtual void fail_launches() = 0;               // of graphs
  virtual void fail_registration() = 0;           // of memory with NVSHMEM
  // From now on: "hide_peers", whose devices are not visible; "fail_access" of these to their memory from here;
  // "die_in_answer" when its first block has arrived; "slow_puts", whose first block comes last, and late. Or "".
  virtual void misbehave(const std::string& how) = 0;
  virtual void hold_gets() = 0;     // from now on they never arrive
  virtual void hold_context() = 0;  // until the stream of the steps is idle
  [[nodiscard]] virtual WorkloadHooks hooks() = 0;
  // Ops of captured graphs in the place of the given ones, and their capture once the runtime is made.
  virtual std::vector<Op> ops(Backend& backend, const std::vector<Op>& plain) const = 0;
  virtual void capture(Runtime& runtime, const std::vector<Op>& plain) = 0;
  [[nodiscard]] virtual int num_pieces() const = 0;  // allocations on the symmetric heap
  // Runs it while a stream is captured in a mode that forbids calls to all threads; the capture must come through.
  virtual void in_capture(const std::function<void()>& calls) = 0;
  [[nodiscard]] virtual int num_registered() const = 0;  // pieces of local memory
  virtual void wait() = 0;                               // for the streams
  virtual void finish() = 0;                             // waits, then throws what a check on them found

  // Times of marks on a device whose clock drifts; and a timer that cannot be made leaves no event.
  virtual void check_events() = 0;
  // Steps that alternate between two streams, the first of which is kept busy.
  virtual void check_streams(Workload& workload, Runtime& runtime) = 0;
  // A step of one request, which rings and whose rows are then held back until `meanwhile` returns.
  virtual void hold_rows(Workload& workload, Runtime& runtime, const std::function<void()>& meanwhile) = 0;
  // Requests in runtimes one after the other, each on a pool of its own.
  virtual void check_reopened(const std::shared_ptr<Bootstrap>& bootstrap, Rank rank, const WorkloadSpec& spec,
                              const std::string& token) = 0;
  // Steps in graphs, in both modes, between eager ones; and what replay steps refuse.
  virtual void check_replay(Workload& workload, Runtime& runtime) = 0;
};

// Loads the emulated driver and NVSHMEM in the place of the real ones. Before make_backend. The ranks share `folder`.
// Throws Error(kUnsupported) if the GPU backend is not in this build.
std::unique_ptr<EmulatedGpu> make_emulated_gpu(const std::filesystem::path& folder, Rank rank, Rank world_size);

}  // namespace sidp::test
