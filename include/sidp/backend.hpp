// What a backend provides: symmetric memory, flags, lanes and liveness. The protocols of csrc/core are written on
// this interface alone, so they run unchanged on the host, on GPUs and under the deterministic simulator.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "sidp/bootstrap.hpp"
#include "sidp/trace.hpp"
#include "sidp/types.hpp"

namespace sidp {

// A flag is a word that one side sets and the other waits for. It only ever holds these two constants, so the same
// operations are valid eagerly, in a replayed graph and across steps.
using FlagValue = std::uint32_t;
inline constexpr FlagValue kEmpty = 0;
inline constexpr FlagValue kFull = 1;

struct FlagRef {
  Rank rank;            // in whose memory the flag lies; only that rank waits for it
  std::uint32_t index;  // 0 .. num_flags-1
};

enum class WaitResult : std::uint8_t { kReady, kDeadline, kPeerDead, kStopped };

struct WaitOptions {
  Milliseconds deadline{30000};
  Rank peer = -1;                           // end the wait when this rank dies; -1: nobody
  const std::atomic<bool>* stop = nullptr;  // end the wait when it becomes true
};

// Memory that every rank of the group holds a piece of. Destroying it drops this process's mappings only: on the host
// a peer's mapping keeps the pages alive after the owner has gone.
class SymmetricBuffer {
 public:
  virtual ~SymmetricBuffer() = default;
  [[nodiscard]] virtual std::byte* local() const = 0;
  // The peer's piece as mapped here, or nullptr where the backend has no direct mapping. Read-only unless the buffer
  // was allocated with peer_writable.
  [[nodiscard]] virtual std::byte* peer(Rank rank) const = 0;
  [[nodiscard]] virtual ByteCount bytes(Rank rank) const = 0;
};

class LocalBuffer {
 public:
  virtual ~LocalBuffer() = default;
  [[nodiscard]] virtual std::byte* data() const = 0;
  [[nodiscard]] virtual ByteCount bytes() const = 0;
};

// One operation of a lane. Flags are the own rank's; src may be a peer's memory. kGet is a copy from a peer without a
// direct mapping: src is the address of the same bytes in the own piece of the symmetric buffer.
struct LaneOp {
  enum class Kind : std::uint8_t { kWait, kCopy, kGet, kSignal };
  Kind kind;
  std::uint32_t flag = 0;
  FlagValue value = kEmpty;
  Rank peer = -1;         // kCopy, kGet: where the bytes come from
  LayerIndex layer = -1;  // whose bytes they are; for traces
  std::byte* dst = nullptr;
  const std::byte* src = nullptr;
  ByteCount bytes = 0;
};

struct LaneStats {
  std::uint64_t copies = 0;  // that have arrived
  std::vector<ByteCount> bytes_by_peer;
  std::uint64_t copy_ns = 0;         // time inside copies; 0 where only the device can tell
  std::uint64_t wait_ns = 0;         // time blocked on empty slots; likewise
  std::vector<bool> owners_engines;  // by peer: whether its GPU's copy engine writes here, or this one's reads there
  std::string why_read;              // of a peer that could not be written from, or empty
  bool exclusive_links = false;      // copies wait until their owners serve nobody else
  std::uint64_t link_wait_ns = 0;    // they did for so long
  std::uint64_t links_taken = 0;     // from ranks that had died or held them long
};

// An ordered queue of asynchronous copies that repeats its program until it is stopped, always as far ahead of the
// consumer as there are slots, across steps. A signal is ordered after the copies before it (release).
class Lane {
 public:
  virtual ~Lane() = default;  // stops
  // False: it was given up, and copies that are under way may still arrive.
  virtual bool stop() noexcept = 0;
  [[nodiscard]] virtual LaneStats stats() const = 0;
  // The consumer's stream waits for the slot of this flag to be full, or empties it after its use. False: the consumer
  // does so by the flag. A lane that drives itself answers false; one of streams has cheaper means, and queues the
  // copies that can follow. Outside captures only. Throws Error(kDevice).
  virtual bool wait_full(Stream, std::uint32_t) { return false; }
  virtual bool set_empty(Stream, std::uint32_t) { return false; }
  // A graph that has just been launched waits for the slot and empties it, both by the flag.
  virtual void used_by_graph(std::uint32_t) {}
};

// Times of steps as the device sees them, read without waiting. One thread; at most one step is open.
class StepTimer {
 public:
  virtual ~StepTimer() = default;
  // Marks the start of a step on its stream. False if so many steps are still under way that this one goes untimed.
  virtual bool begin(Stream stream) noexcept = 0;
  virtual void end(Stream stream) noexcept = 0;  // of the step that was begun
  virtual void drop() noexcept = 0;              // that step does not count
  // Milliseconds of the oldest step that has ended and was not taken yet; empty: none has ended. 0: the
  // device could not tell. In the order in which they began.
  virtual std::optional<double> take() noexcept = 0;
};

struct LaneOptions {
  bool owners_engines = true;         // copies are made by the owners' copy engines, where a backend can
  bool exclusive_links = true;        // owners serve one reader at a time, where a backend can; the same on all ranks
  Milliseconds stop_deadline{10000};  // for copies that are under way when the lane is stopped
  std::uint32_t test_delay_us = 0;    // tests only: sleep before every copy
};

struct Capabilities {
  std::string name;                 // "host", "nvshmem"
  bool stream_ordered = false;      // calls that take a Stream only enqueue
  bool direct_peer_access = false;  // SymmetricBuffer::peer() is never null
  bool memory_outlives_owner = false;
  std::int32_t device = -1;  // ordinal of the GPU that holds all buffers; -1: host memory
};

class WeightPool;
class Mailbox;
class ActivationChannel;
struct ChannelOptions;

class Backend {
 public:
  virtual ~Backend() = default;
  [[nodiscard]] virtual Rank rank() const = 0;
  [[nodiscard]] virtual Rank world_size() const = 0;
  [[nodiscard]] virtual const Capabilities& capabilities() const = 0;
  [[nodiscard]] virtual Bootstrap& bootstrap() = 0;

  // --- Collective: every rank calls them, in the same order. On a failure of any rank all ranks throw and none keeps
  // anything. Throws Error(kCapacity), Error(kDeadline).
  virtual void create_flags(std::uint32_t num_flags) = 0;  // once; all kEmpty; starts peer liveness
  virtual std::unique_ptr<SymmetricBuffer> allocate_symmetric(std::span<const ByteCount> bytes_by_rank,
                                                              const std::string& label, bool peer_writable) = 0;

  // --- Local. Throws Error(kCapacity).
  virtual std::unique_ptr<LocalBuffer> allocate_local(ByteCount bytes, const std::string& label) = 0;
  virtual std::unique_ptr<Lane> make_lane(std::vector<LaneOp> program, const LaneOptions& options) = 0;
  // A channel of the backend's own. nullptr: requests go through the flags and puts below (FlagChannel).
  virtual std::unique_ptr<ActivationChannel> make_channel(WeightPool& pool, const Mailbox& mailbox,
                                                          const ChannelOptions& options);
  virtual std::thread start_thread(const std::string& name, std::function<void()> body) = 0;
  // For a trace, with room for so many marks; while no stream is blocked. nullptr: calls do not outlast themselves.
  virtual std::unique_ptr<StreamClock> make_stream_clock(std::size_t) { return nullptr; }
  // Where this rank's threads record what they do.
  [[nodiscard]] Tracer& tracer() { return tracer_; }
  // False once the rank has left or its process has ended, however it ended. A stopped (hung) process counts as alive.
  [[nodiscard]] virtual bool alive(Rank rank) const = 0;
  // Tells the peers that this rank no longer answers; its memory stays readable where they have mapped it.
  virtual void leave() noexcept = 0;
  // Remembers a point of a stream, after the waits of a step. Then: waits, for at most the deadline, until the last
  // such point is past, when no stream waits for this rank's lane or service any more, or with `but_one` the one before
  // it; or makes another stream wait for it. Nothing to do where calls do not outlast a step.
  virtual void mark_step_end(Stream) noexcept {}
  virtual bool wait_step_end(Milliseconds, [[maybe_unused]] bool but_one = false) noexcept { return true; }
  virtual void follow_step_end(Stream) {}
  // By the clock of this machine where calls do not outlast a step, else by the device's events.
  virtual std::unique_ptr<StepTimer> make_step_timer();
  // A stream, the engine's or the lane's, did not come to its end: close() frees nothing on any rank.
  virtual void keep_memory() noexcept {}
  // Collective, last: frees symmetric memory once every living rank has come here. If a rank died or does not come
  // within the deadline of the bootstrap the memory stays allocated until the process ends, and false is returned.
  virtual bool close() { return true; }

  // --- Data path. On a stream-ordered backend these enqueue on `stream` and return kReady.
  // Waits until the own flag equals `expected` (acquire).
  virtual WaitResult wait(Stream stream, std::uint32_t flag, FlagValue expected, const WaitOptions& options) = 0;
  // Sets a flag of any rank, ordered after everything this thread or stream wrote before (release).
  virtual void signal(Stream stream, FlagRef flag, FlagValue value) = 0;
  // Copies into `peer`'s piece of `buffer` at byte `offset`.
  virtual void put(Stream stream, const SymmetricBuffer& buffer, Rank peer, ByteCount offset, const void* src,
                   ByteCount bytes) = 0;
  virtual void copy(Stream stream, void* dst, const void* src, ByteCount bytes) = 0;
  // The flag's value now, without ordering; for counters. Empty where only the device can tell.
  [[nodiscard]] virtual std::optional<FlagValue> peek(std::uint32_t flag) const = 0;
  // Blocks until one of the own flags first .. first+count-1 is kFull, `stop` is true, or `timeout` has passed.
  virtual bool wait_any_full(std::uint32_t first, std::uint32_t count, Milliseconds timeout,
                             const std::atomic<bool>& stop) = 0;
  // Makes waits that watch a stop flag look at it again.
  virtual void interrupt() noexcept = 0;

 private:
  Tracer tracer_;
};

}  // namespace sidp
