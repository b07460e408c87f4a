// CaS on streams. A requester's stream puts its rows into its slot at the owner and sets its request word, which lies
// in host memory that both processes map. A thread of the owner polls these words and launches the captured graph of
// (layer, op, row bucket), which puts the answer back and sets the reply flag that the requester's stream waits for.
//
// Requests of up to spin_rows rows do both ways in less time: the word is set before the rows are on their way, the
// graph begins with a wait for them, and each block of a put has a flag, on the GPU, that a kernel waits for.
//
// A request word goes 0 -> request (requester's stream) -> taken (who serves it, by compare-and-swap) -> 0 (requester's
// stream, when it has the answer). So exactly one process serves a request, and when an owner has died or hangs, the
// requester's own thread takes the word in its place and runs the op on the owner's memory, also for graphs that are
// being replayed.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "graph_op.hpp"
#include "kernels.hpp"
#include "run_ahead.hpp"
#include "sidp/activation_channel.hpp"
#include "sidp/error.hpp"

namespace sidp::nvshmem {

// What a request word says. Packed into the 32 bits that one store release publishes.
struct Request {
  static constexpr std::uint32_t kWaiting = 1U << 31;  // cleared when somebody takes it
  static constexpr LayerIndex kMaxLayers = 1 << 12;
  static constexpr OpIndex kMaxOps = 1 << 6;
  static constexpr std::int64_t kMaxRows = (1 << 13) - 1;

  LayerIndex layer;
  OpIndex op;
  std::int64_t rows;  // the bucket

  [[nodiscard]] std::uint32_t word() const;  // of a waiting request; never 0, as rows are not
  static Request from(std::uint32_t word);
};

// Where the words of one rank's channel lie.
struct ChannelMemory {
  struct Word {
    std::uint32_t* host;
    CUdeviceptr device;
  };
  // Request word of `requester` at `owner`, in host memory.
  std::function<Word(Rank owner, Rank requester)> request;
  // Reply flag for answers of `owner` to `requester`, in host memory.
  std::function<Word(Rank requester, Rank owner)> reply;
  // Flags of the blocks that put a request on the owner's GPU, an answer on the requester's: a line each.
  std::function<CUdeviceptr(Rank owner, Rank requester)> rows_flags;
  std::function<CUdeviceptr(Rank requester, Rank owner)> reply_flags;
  // Of the rows flags that were awaited last, their epoch; on the owner's GPU.
  std::function<CUdeviceptr(Rank owner, Rank requester)> rows_seen;
};

// Words that kernels, other processes and this one's threads share.
inline std::atomic_ref<std::uint32_t> atomic(std::uint32_t* word) { return std::atomic_ref<std::uint32_t>(*word); }

class StreamChannel final : public ActivationChannel {
 public:
  // Throws Error(kConfig) for more layers, ops or rows than a word can name, Error(kUnsupported) for a peer whose
  // memory is not mapped here.
  // kept: see HostWords.
  StreamChannel(std::shared_ptr<const Device> device, WeightPool& pool, const Mailbox& mailbox, ChannelMemory memory,
                const ChannelOptions& options, const std::shared_ptr<const bool>& kept);
  ~StreamChannel() override;

  void start() override;
  bool stop() noexcept override;
  void begin_step(Requests requests) override;
  void compute(Stream stream, LayerIndex layer, OpIndex op, const std::byte* x, std::int64_t rows, std::byte* y,
               bool owned_next) override;
  [[nodiscard]] const std::byte* lent(LayerIndex layer, std::int64_t rows) const override;
  void begin_turn(Stream stream, LayerIndex layer) override;
  void end_turn(Stream stream) override;
  void check() const override;
  void give_up() noexcept override;
  [[nodiscard]] bool available(Rank owner) const override;
  [[nodiscard]] RequesterStats requester_stats() const override;
  [[nodiscard]] ServiceStats service_stats() const override;

  // For the capture of an op: the slot that its rows come from, the wait that begins its graph (`bytes`: of the rows,
  // all of the bucket), and the puts that end it. `sources`: outputs one after the other, each of so many bytes.
  [[nodiscard]] const std::byte* slot(Rank owner, Rank requester) const;
  void await_rows(Stream stream, const GraphOp::Key& request, ByteCount bytes) const;
  void put_answer(Stream stream, const GraphOp::Key& request,
                  const std::vector<std::pair<const std::byte*, ByteCount>>& sources) const;
  // Where the graphs will run. Ops are captured here too: libraries keep workspaces by stream.
  [[nodiscard]] CUstream service_stream() const { return service_stream_.get(); }

 private:
  // Steps that may be under way when the next one, a graph, begins; so a graph of requests may be one of the last two.
  static constexpr int kStepsAhead = 2;
  // Words by rank, on the host and on the device: answers, rows and bytes as an owner; that its rows are not waited for
  // any more as a requester. On the device then the epoch of the rows flags at it as an owner.
  static constexpr std::size_t kCounts = 4;
  // Host words after those of all owners.
  enum class HostWord : std::uint8_t { kFailed, kTurn, kLaunched, kServed, kAnswered, kNumWords };

  // What the watchdog knows of the own request at an owner.
  struct Watch {
    std::uint64_t answers = 0;  // count when the request was first seen
    std::optional<Clock::time_point> since;
    std::optional<Clock::time_point> dead_since;
    std::optional<Clock::time_point> handed_over;  // to the service thread, which answers in the owner's place
    bool over = false;                             // given up
  };

  // And of another rank's request that this one has taken.
  struct InWork {
    std::uint64_t launch = 0;
    std::optional<Clock::time_point> since;
  };

  // How long the ops of late took, from launch to answer.
  struct ServiceTime {
    std::optional<std::uint64_t> launch;  // that is being timed: its number
    Clock::time_point start;
    Clock::duration mean = std::chrono::milliseconds(1);  // until one was timed
  };

  void run();
  bool take_requests();
  // Whether a request may be served now: in the engine's turn only one that goes on with a layer, or has waited long.
  bool may_serve(Rank requester, const Request& request);
  void time_services();
  void launch(const GraphOp::Key& key, const Request& request);
  void serve(Rank requester, const Request& request);
  void watch(Rank owner);
  void watch_rows(Rank requester);
  void hand_over(Rank owner, std::uint32_t word);
  void give_up_on(Rank owner, const std::string& what);
  void stand_in(Rank owner, const Request& request);
  // Around the launch of an op, on the service's stream.
  [[nodiscard]] TraceSpan service_span(TraceEvent::Kind kind, Rank peer, const Request& request) const;
  // Releases a requester without an answer: its step is void.
  void not_answered(Rank requester, Rank owner);
  void record(Error error);
  bool claim(Rank owner, Rank requester, std::uint32_t word) const;
  [[nodiscard]] const GraphOp& graph(const Request& request) const;
  [[nodiscard]] std::size_t answers_index(Rank owner) const { return kCounts * static_cast<std::size_t>(owner); }
  [[nodiscard]] std::size_t index(HostWord word) const {
    return answers_index(world_size_) + static_cast<std::size_t>(word);
  }
  [[nodiscard]] bool spins(std::int64_t rows) const { return rows <= options_.spin_rows; }
  [[nodiscard]] std::size_t given_up_index(Rank requester) const { return answers_index(requester) + kCounts - 1; }
  // Set by the wait for rows that was given up: their answer is withheld.
  [[nodiscard]] CUdeviceptr withheld_word(Rank requester) const {
    return words_.at(static_cast<ByteCount>(requester) * 64 + (kCounts - 1) * sizeof(std::uint64_t));
  }
  [[nodiscard]] CUdeviceptr epoch_word(Rank owner) const {
    return words_.at(static_cast<ByteCount>(owner) * 64 + kCounts * sizeof(std::uint64_t));
  }
  [[nodiscard]] const std::byte* reply_slot(Rank owner) const {
    return mailbox_.buffer().local() + mailbox_.reply_offset(owner) + kAlignment;
  }
  [[nodiscard]] TurnWords turn_words() const;
  [[nodiscard]] CUdeviceptr served_word() const;
  [[nodiscard]] CUdeviceptr local_word(std::size_t index) const { return words_.at(index * 64); }

  std::shared_ptr<const Device> device_;
  WeightPool& pool_;
  const Mailbox& mailbox_;
  ChannelMemory memory_;
  ChannelOptions options_;
  Rank rank_;
  Rank world_size_;
  Kernels kernels_;
  HostWords host_;     // kCounts by rank, then a HostWord each
  DeviceWords words_;  // device's counts and block counters, see stream_channel.cpp
  ServiceStream service_stream_;
  std::vector<Watch> watches_;
  std::vector<InWork> in_work_;
  std::vector<std::atomic<std::uint64_t>> launch_for_;  // by requester: number of the last one
  std::vector<std::atomic<bool>> gave_up_;
  std::vector<std::atomic<std::uint32_t>> stand_ins_;             // by owner: request word to answer in its place, or 0
  bool in_turn_ = false;                                          // what is enqueued now; the engine's thread
  bool one_by_one_ = false;                                       // the step's requests; likewise
  int steps_since_graph_ = kStepsAhead;                           // of requests, up to this; likewise
  RunAhead run_ahead_;                                            // likewise
  std::uint64_t launched_ = 0;                                    // answers; the service's thread
  std::vector<std::optional<Clock::time_point>> deferred_since_;  // by requester; the service's thread
  std::vector<std::optional<Request>> last_served_;               // by requester; the service's thread
  ServiceTime service_time_;                                      // the service's thread
  std::vector<std::atomic<std::uint64_t>> served_by_peer_;
  std::atomic<std::uint64_t> deferred_{0};
  std::atomic<std::uint64_t> served_rows_{0};
  std::atomic<std::uint64_t> served_failed_{0};
  std::atomic<std::uint64_t> stood_in_{0};
  mutable std::mutex mutex_;
  std::optional<Error> failure_;   // the first; under mutex_
  std::atomic<bool> void_{false};  // the step is void: nobody waits for the rest of its answers
  std::atomic<bool> stop_{false};
  std::thread thread_;        // serves: launches graphs
  std::thread watch_thread_;  // sees to deadlines, also while a launch of the other blocks
};

}  // namespace sidp::nvshmem
