// Runtime: steps over a weight pool. One engine thread at a time; replicas never wait for each other's steps.
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "sidp/activation_channel.hpp"
#include "sidp/mode_policy.hpp"
#include "sidp/prefetcher.hpp"
#include "sidp/trace.hpp"
#include "sidp/weight_pool.hpp"

namespace sidp {

struct RuntimeOptions {
  Milliseconds deadline{30000};           // of every wait in a step
  std::int64_t max_rows = 0;              // of a request; 0 with no ops
  std::vector<std::int64_t> row_buckets;  // see Mailbox
  bool deferred_start = false;            // answer requests only once start() was called
  ByteCount row_bytes = 0;                // see StepShape
  std::int32_t ops_per_layer = 0;
  std::int32_t element_bytes = 4;
  PolicyConfig policy;
  MachineProfile profile;
  LaneOptions lane;                    // tests only
  ServiceOptions service;              // tests only
  std::int64_t spin_rows = kSpinRows;  // see ChannelOptions
};

// How the calls of a step reach the device. On a backend that is not stream-ordered every step runs.
enum class StepKind : std::uint8_t {
  kRun,      // as they are made
  kCapture,  // into a graph that is being captured; nothing runs and nothing is counted
  kReplay,   // by launching such a graph of the same mode, once: no calls are made
};

struct RuntimeStats {
  PrefetcherStats prefetcher;
  RequesterStats requester;
  ServiceStats service;
  std::array<std::uint64_t, 2> steps{};                // by Mode
  std::array<std::uint64_t, 2> tokens{};               // by Mode
  std::array<std::uint64_t, kNumReasons> decisions{};  // by Reason
  std::uint64_t steps_broken_off = 0;
  Decision last_decision{};
  std::vector<StepHistory::Entry> step_times;
  std::uint64_t mode_changes = 0;  // between steps of about one size
};

class Runtime {
 public:
  // Collective: ops and max_rows are compared on all ranks and the slots allocated; then the lane and the service
  // start.
  Runtime(std::shared_ptr<WeightPool> pool, std::vector<Op> ops, RuntimeOptions options);
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  // Collective after deferred_start: every rank is ready to answer, or all throw what one says of its failure.
  void start(const std::string& failure = {});

  // Begins a step of num_tokens rows on a stream and fixes its mode, which is the policy's, or `mode` when capturing.
  // A stream other than that of the step before waits for the end of that step. Throws Error(kUsage) inside another
  // step and what check() throws.
  Decision begin_step(Stream stream, std::int64_t num_tokens, StepKind kind = StepKind::kRun,
                      std::optional<Mode> mode = {});
  // Around the launch of the graph of a kReplay step on its stream: throws Error(kUsage) unless one may be launched
  // now; and says that it was. At once, as the graph's waits need the copies that this queues.
  void check_launch() const;
  void launched();
  // Ends the step. broken_off: what it did not use is consumed unread, so that the next step finds the lane in order;
  // otherwise a WaS step that skipped layers, or a kReplay step without launched(), throws Error(kUsage) after the
  // same.
  void end_step(bool broken_off);
  // Throws Error(kDeadline) or Error(kRemoteOp) if a stream-ordered request was not answered: what the streams computed
  // since is void. Call it when they are synchronised and before results are used.
  void check() const;

  // `stream` is that of the step in all three, or Error(kUsage).
  // First byte of the layer, valid until release_layer: its own memory for a local layer, the ring for a streamed one.
  // Streamed layers only in a WaS step. Errors as Prefetcher::fetch.
  const std::byte* fetch_layer(Stream stream, LayerIndex layer);
  void release_layer(Stream stream, LayerIndex layer);  // nothing to do for a local layer
  // Streamed layers only, in a CaS step only. Errors as Requester::compute. y null: no copy is made of the answer,
  // which stays where lent() says and is valid for what the stream does before the next request to the same owner.
  // Throws Error(kUsage) where that gives null.
  void remote_compute(Stream stream, LayerIndex layer, OpIndex op, const std::byte* x, std::int64_t rows, std::byte* y);

  // Where the answer to such a request is when it is not copied: the same place each time. Null: it always is.
  [[nodiscard]] const std::byte* lent(LayerIndex layer, std::int64_t rows) const {
    return channel_ && !pool_->is_local(layer) ? channel_->lent(layer, rows) : nullptr;
  }

  // The mode that the policy would choose now; nothing begins. For the choice of what to capture.
  [[nodiscard]] Decision preview(std::int64_t num_tokens) const;
  // What a step of so many rows is predicted to take, uncorrected.
  [[nodiscard]] StepTimes predict(std::int64_t num_tokens) const;
  [[nodiscard]] const WeightPool& pool() const { return *pool_; }
  [[nodiscard]] const Mailbox* mailbox() const { return mailbox_.get(); }
  [[nodiscard]] ActivationChannel* channel() const { return channel_.get(); }
  // By the thread of the steps. By another one while a step runs, what is read may be of different moments, or half
  // written: counters are plain words, and only those of lane and service are atomic.
  [[nodiscard]] RuntimeStats stats() const;

  // Records this rank's steps, calls, copies and requests, in memory for num_events that is taken here. Between steps;
  // waits for the end of the last one. Throws as Tracer::start, Error(kUsage) inside a step, Error(kDeadline).
  void start_trace(std::size_t num_events);
  // Waits for what streams have still to do. A step that is open is cut here, and marked as broken off in the trace; it
  // goes on. Also once closed. Throws as Tracer::stop.
  Trace stop_trace();
  // Stops lane and service and leaves the group; peers go on with this rank's bytes. Idempotent. False if a stream is
  // still at work after all deadlines: what it may touch stays allocated, and so must the memory of captured ops.
  bool close() noexcept;

 private:
  void check_open() const;
  void check_in_step(const char* call) const;
  void check_stream(const char* call, Stream stream) const;
  const std::byte* fetch(Stream stream, LayerIndex layer);
  [[nodiscard]] std::optional<Rank> unavailable_peer() const;
  void take_times();
  [[nodiscard]] bool takes_turns() const { return channel_ && decision_.mode == Mode::kCas; }
  [[nodiscard]] Tracer::Session trace_session() const;  // 0 also while calls go into a graph
  [[nodiscard]] TraceEvent request_event(LayerIndex layer, OpIndex op, std::int64_t rows) const;
  void end_step_span(bool broken_off) noexcept;
  void end_turn(bool broken_off);
  [[nodiscard]] bool owned_comes_after(LayerIndex layer, OpIndex op) const;

  struct UntakenStep {
    Mode mode;
    std::int64_t num_tokens;
  };

  std::shared_ptr<WeightPool> pool_;
  RuntimeOptions options_;
  StepShape shape_;
  std::vector<Rank> owners_;  // of streamed layers
  std::unique_ptr<Mailbox> mailbox_;
  std::unique_ptr<Prefetcher> prefetcher_;
  std::unique_ptr<ActivationChannel> channel_;
  RuntimeStats stats_;
  bool closed_ = false;
  bool idle_ = true;  // once closed
  bool in_step_ = false;
  bool lane_failed_ = false;  // a fetch outlived its deadline: the ring's state is unknown
  StepKind kind_ = StepKind::kRun;
  Stream stream_{};  // of the open step
  bool launched_ = false;
  Decision decision_{};
  std::int64_t step_tokens_ = 0;
  StepHistory history_;
  std::unique_ptr<StepTimer> timer_;
  bool timing_ = false;                // the open step
  std::deque<UntakenStep> untaken_{};  // timed, in order; their times come later
  Tracer& tracer_;
  std::optional<TraceSpan> step_span_;
  std::vector<std::optional<TraceSpan>> use_spans_;  // by layer; of the open step
};

}  // namespace sidp
