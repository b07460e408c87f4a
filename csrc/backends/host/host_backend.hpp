// The host backend: POSIX shared memory as symmetric heap, threads as lanes, futex words as flags. One process a rank.
// The caller's thread is its stream: calls that take a Stream have happened when they return.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "flag.hpp"
#include "shared_segment.hpp"
#include "sidp/backend.hpp"

namespace sidp::host {

struct HostOptions {
  Rank rank = 0;
  Rank world_size = 1;
  std::string token;  // secret of the group, the same on all ranks
};

class HostBackend final : public Backend {
 public:
  HostBackend(HostOptions options, std::shared_ptr<Bootstrap> bootstrap);
  ~HostBackend() override;

  [[nodiscard]] Rank rank() const override { return options_.rank; }
  [[nodiscard]] Rank world_size() const override { return options_.world_size; }
  [[nodiscard]] const Capabilities& capabilities() const override { return capabilities_; }
  [[nodiscard]] Bootstrap& bootstrap() override { return *bootstrap_; }

  void create_flags(std::uint32_t num_flags) override;
  std::unique_ptr<SymmetricBuffer> allocate_symmetric(std::span<const ByteCount> bytes_by_rank,
                                                      const std::string& label, bool peer_writable) override;
  std::unique_ptr<LocalBuffer> allocate_local(ByteCount bytes, const std::string& label) override;
  std::unique_ptr<Lane> make_lane(std::vector<LaneOp> program, const LaneOptions& options) override;
  std::thread start_thread(const std::string& name, std::function<void()> body) override;
  [[nodiscard]] bool alive(Rank rank) const override;
  void leave() noexcept override;

  WaitResult wait(Stream stream, std::uint32_t flag, FlagValue expected, const WaitOptions& options) override;
  void signal(Stream stream, FlagRef flag, FlagValue value) override;
  void put(Stream stream, const SymmetricBuffer& buffer, Rank peer, ByteCount offset, const void* src,
           ByteCount bytes) override;
  void copy(Stream stream, void* dst, const void* src, ByteCount bytes) override;
  [[nodiscard]] std::optional<FlagValue> peek(std::uint32_t flag) const override;
  bool wait_any_full(std::uint32_t first, std::uint32_t count, Milliseconds timeout,
                     const std::atomic<bool>& stop) override;
  void interrupt() noexcept override;

  // For a backend that keeps its host words here: a rank's control segment, and a flag's word in it. They stay mapped,
  // for the life of the process, once keep_control() was called.
  void keep_control() noexcept;
  [[nodiscard]] const SharedSegment& control(Rank rank) const { return *control_[static_cast<std::size_t>(rank)]; }
  [[nodiscard]] std::uint32_t* flag_word(FlagRef ref) const {
    return reinterpret_cast<std::uint32_t*>(&flag(ref).value);
  }

 private:
  // A rank's control segment: word 0 is the bell, rung with every signal to that rank; the flags follow.
  [[nodiscard]] Flag& bell(Rank rank) const;
  [[nodiscard]] Flag& flag(FlagRef ref) const;

  HostOptions options_;
  std::shared_ptr<Bootstrap> bootstrap_;
  Capabilities capabilities_{.name = "host", .direct_peer_access = true, .memory_outlives_owner = true};
  std::uint32_t num_flags_ = 0;
  std::vector<std::unique_ptr<SharedSegment>> control_;  // by rank
};

// Names of all segments that a group can have made, for removal after a start-up that did not complete.
void unlink_segments(const std::string& token, Rank world_size) noexcept;

}  // namespace sidp::host
