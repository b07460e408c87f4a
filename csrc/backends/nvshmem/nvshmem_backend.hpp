// The GPU backend: NVSHMEM's symmetric heap, copy engines as lanes, stream memory operations as flags, kernels for
// puts. One process and one GPU a rank. Request words, releases and liveness lie in the host backend's control
// segments, so the ranks of a group run on one host.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backends/host/host_backend.hpp"
#include "device.hpp"
#include "nvshmem_api.hpp"
#include "stream_channel.hpp"

namespace sidp::nvshmem {

struct NvshmemOptions {
  Rank rank = 0;
  Rank world_size = 1;
  std::string token;                   // secret of the group, the same on all ranks
  int device = 0;                      // ordinal of this rank's GPU; NVSHMEM is initialised on it
  std::vector<int> gpus{};             // by rank: its GPU's ordinal in this process, or -1; empty: all -1
  Milliseconds deadline{30000};        // of each collective
  bool test_without_mappings = false;  // tests only: reach peers as if none were mapped
};

class NvshmemBackend final : public Backend {
 public:
  // NVSHMEM must be initialised with the same rank and world_size. Throws Error(kUnsupported) saying what is missing.
  NvshmemBackend(NvshmemOptions options, std::shared_ptr<Bootstrap> bootstrap);
  ~NvshmemBackend() override;  // symmetric memory that close() did not free stays with NVSHMEM

  [[nodiscard]] Rank rank() const override { return options_.rank; }
  [[nodiscard]] Rank world_size() const override { return options_.world_size; }
  [[nodiscard]] const Capabilities& capabilities() const override { return capabilities_; }
  [[nodiscard]] Bootstrap& bootstrap() override { return *bootstrap_; }
  [[nodiscard]] const std::shared_ptr<const Device>& device() const { return device_; }

  void create_flags(std::uint32_t num_flags) override;
  // Every rank allocates the largest of the sizes: NVSHMEM's allocations are symmetric, ownership is not.
  std::unique_ptr<SymmetricBuffer> allocate_symmetric(std::span<const ByteCount> bytes_by_rank,
                                                      const std::string& label, bool peer_writable) override;
  std::unique_ptr<LocalBuffer> allocate_local(ByteCount bytes, const std::string& label) override;
  std::unique_ptr<Lane> make_lane(std::vector<LaneOp> program, const LaneOptions& options) override;
  std::unique_ptr<ActivationChannel> make_channel(WeightPool& pool, const Mailbox& mailbox,
                                                  const ChannelOptions& options) override;
  std::thread start_thread(const std::string& name, std::function<void()> body) override;
  std::unique_ptr<StreamClock> make_stream_clock(std::size_t num_marks) override;
  [[nodiscard]] bool alive(Rank rank) const override { return host_.alive(rank); }
  void leave() noexcept override;
  void mark_step_end(Stream stream) noexcept override;
  void follow_step_end(Stream stream) override;
  std::unique_ptr<StepTimer> make_step_timer() override;
  void keep_memory() noexcept override { *in_use_ = true; }
  bool wait_step_end(Milliseconds deadline, bool but_one) noexcept override;
  bool close() override;

  WaitResult wait(Stream stream, std::uint32_t flag, FlagValue expected, const WaitOptions& options) override;
  void signal(Stream stream, FlagRef flag, FlagValue value) override;
  void put(Stream stream, const SymmetricBuffer& buffer, Rank peer, ByteCount offset, const void* src,
           ByteCount bytes) override;
  void copy(Stream stream, void* dst, const void* src, ByteCount bytes) override;
  [[nodiscard]] std::optional<FlagValue> peek(std::uint32_t) const override { return std::nullopt; }
  // The channel of this backend polls words of its own: throws Error(kUnsupported).
  bool wait_any_full(std::uint32_t first, std::uint32_t count, Milliseconds timeout,
                     const std::atomic<bool>& stop) override;
  void interrupt() noexcept override {}

 private:
  struct Allocation {
    void* memory;
    ByteCount bytes;
  };

  // Runs a collective of NVSHMEM, which knows no deadline. Throws Error(kDeadline); the group is lost then.
  void within_deadline(const std::string& what, std::function<void()> collective);
  void* symmetric_malloc(ByteCount bytes, const std::string& label);
  [[nodiscard]] CUdeviceptr flag(FlagRef ref) const;
  // Of the channel's own, on the GPU: see ChannelMemory::rows_seen.
  [[nodiscard]] std::uint32_t seen_flag(Rank requester) const {
    return num_flags_ + static_cast<std::uint32_t>(requester);
  }
  [[nodiscard]] ChannelMemory::Word host_word(FlagRef ref) const;
  // Set by a rank that leaves, so that others can tell it from one that died.
  [[nodiscard]] std::atomic_ref<std::uint32_t> left(Rank rank) const;

  NvshmemOptions options_;
  std::shared_ptr<Bootstrap> bootstrap_;
  std::shared_ptr<const Device> device_;
  NvshmemApi nvshmem_;
  host::HostBackend host_;
  Capabilities capabilities_;
  std::uint32_t num_flags_ = 0;
  std::vector<CUdeviceptr> flags_;    // on the GPU, by rank as mapped here; 0 where it is not
  std::vector<CUdeviceptr> control_;  // control segments of all ranks as the GPU sees them
  CUevent step_end_ = nullptr;        // of the last step; made by the first
  CUevent earlier_end_ = nullptr;     // of the one before
  bool lost_ = false;                 // a collective of NVSHMEM did not come back
  // A stream still works with the memory, local and symmetric.
  std::shared_ptr<bool> in_use_ = std::make_shared<bool>(false);
  std::vector<Allocation> allocations_;  // in order, freed in order
};

}  // namespace sidp::nvshmem
