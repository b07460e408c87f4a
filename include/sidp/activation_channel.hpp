// CaS: a requester puts rows into its slot at the owner of a layer; the owner's service computes and puts rows back.
// One request in flight per (requester, owner), so both flags are constants.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "sidp/op.hpp"
#include "sidp/weight_pool.hpp"

namespace sidp {

// First bytes of a request slot; the rows follow at kAlignment.
struct RequestHeader {
  LayerIndex layer;
  OpIndex op;
  std::int64_t rows;
};

// First bytes of a reply slot; the rows follow at kAlignment.
struct ReplyHeader {
  std::int32_t failed;  // 0: the rows follow; 1: `message` says why there are none
  char message[240];    // NUL-terminated, cut to fit
};
static_assert(sizeof(RequestHeader) <= kAlignment && sizeof(ReplyHeader) <= kAlignment);

// Request and reply slots of all ranks and the ops that may be asked for.
class Mailbox {
 public:
  // Collective: the op tables, max_rows and buckets are compared on all ranks, then the slots allocated.
  // row_buckets: the row counts that owners compute, ascending, the last one max_rows; empty: every count.
  Mailbox(WeightPool& pool, std::vector<Op> ops, std::int64_t max_rows, std::vector<std::int64_t> row_buckets = {});

  [[nodiscard]] const std::vector<Op>& ops() const { return ops_; }
  [[nodiscard]] std::int64_t max_rows() const { return max_rows_; }
  [[nodiscard]] const std::vector<std::int64_t>& row_buckets() const { return row_buckets_; }
  // Rows that the owner computes for a request of `rows`: the smallest bucket that holds them. The result of a request
  // has room for that many. Throws Error(kShape) for rows outside 1 .. max_rows.
  std::int64_t bucket(LayerIndex layer, std::int64_t rows) const;
  [[nodiscard]] const SymmetricBuffer& buffer() const { return *buffer_; }
  // Bytes from the start of the owner's piece to the slot of that requester, and of the requester's to that owner's.
  [[nodiscard]] ByteCount request_offset(Rank requester) const { return request_stride_ * rank_index(requester); }
  [[nodiscard]] ByteCount reply_offset(Rank owner) const { return replies_at_ + reply_stride_ * rank_index(owner); }
  // Index of the op of that name, or Error(kUnknownName).
  [[nodiscard]] OpIndex op_index(const std::string& name) const;
  // The kernel of an op for a layer, or Error(kUnknownName).
  [[nodiscard]] const OpKernel& kernel(LayerIndex layer, OpIndex op) const;

 private:
  static ByteCount rank_index(Rank rank) { return static_cast<ByteCount>(rank); }

  std::vector<Op> ops_;
  std::int64_t max_rows_;
  std::vector<std::int64_t> row_buckets_;
  ByteCount request_stride_ = 0;
  ByteCount reply_stride_ = 0;
  ByteCount replies_at_ = 0;
  std::unique_ptr<SymmetricBuffer> buffer_;
};

struct RequesterStats {
  // Answered by the peer; where streams keep count also the fallbacks and requests that nobody answered.
  std::vector<std::uint64_t> requests_by_peer;
  std::uint64_t rows_sent = 0;
  ByteCount bytes_sent = 0;
  std::uint64_t wait_ns = 0;    // time blocked on replies
  std::uint64_t fallbacks = 0;  // computed here on the owner's bytes, because it no longer answers
};

class Requester {
 public:
  Requester(WeightPool& pool, const Mailbox& mailbox, Milliseconds deadline);

  // y = op(layer, x) for `rows` rows, x and y as OpKernel::run. If the owner is dead or does not answer within the
  // deadline it is not asked again: the op runs here, on the owner's bytes, which outlive it.
  // Throws Error(kShape) for rows outside 1 .. max_rows, Error(kUnknownName), Error(kRemoteOp) with the owner's words.
  void compute(Stream stream, LayerIndex layer, OpIndex op, const std::byte* x, std::int64_t rows, std::byte* y);

  // False once the rank was found dead or did not answer.
  [[nodiscard]] bool available(Rank owner) const;
  [[nodiscard]] const RequesterStats& stats() const { return stats_; }

 private:
  WeightPool& pool_;
  const Mailbox& mailbox_;
  Milliseconds deadline_;
  std::vector<bool> gave_up_;
  RequesterStats stats_;
};

struct ServiceStats {
  std::vector<std::uint64_t> served_by_peer;
  std::uint64_t failed = 0;
  std::uint64_t rows = 0;
  std::uint64_t deferred = 0;  // that had to wait for the owner's own layer
  std::uint64_t compute_ns = 0;
};

struct ServiceOptions {
  std::uint32_t test_delay_us = 0;  // tests only: sleep before answering, to play a hung owner
};

// Requests of so many rows or less wait for their answer by a kernel of one warp, others by a stream memory
// operation. The kernel is 4 us quicker, but no peer's op on this GPU gets its place on a multiprocessor: on two H200 a
// CaS step of 64 tokens took 1.071 x all layers here and 1.076 x by the operation, one of 512 tokens 1.102 x and 1.077
// x. An op that needs every multiprocessor at once (a cooperative launch) could never start beside it, and needs 0.
constexpr std::int64_t kSpinRows = 128;

struct ChannelOptions {
  Milliseconds deadline{30000};
  ServiceOptions service;
  std::int64_t spin_rows = kSpinRows;  // the same on all ranks
};

// Both sides of CaS on one rank. Every backend's channel keeps this contract.
class ActivationChannel {
 public:
  // What of a step reaches its stream call by call: nothing, as a graph is made; nothing, as one with requests is
  // launched, or one without; all of it, with requests or without.
  enum class Requests : std::uint8_t { kCaptured, kReplayed, kReplayedNone, kOneByOne, kNone };

  virtual ~ActivationChannel() = default;  // stops
  // Begins to answer the other ranks.
  virtual void start() = 0;
  // Answers nobody from now on. The request in work is finished; false if that took too long: it may still touch the
  // memory of pool and mailbox.
  virtual bool stop() noexcept = 0;
  virtual void begin_step(Requests) {}
  // As Requester::compute. A stream-ordered channel enqueues on `stream`, and what goes wrong there check() throws. It
  // may wait for answers to earlier requests: see csrc/DESIGN.md, "Launch queues".
  // owned_next: a layer that this rank owns comes next, so with the answer this rank's turn begins.
  // y null: the answer stays where lent() says, valid for what `stream` does before its next request to that owner.
  virtual void compute(Stream stream, LayerIndex layer, OpIndex op, const std::byte* x, std::int64_t rows, std::byte* y,
                       bool owned_next) = 0;
  // Where an answer of so many rows can be left, or null: it is always copied.
  [[nodiscard]] virtual const std::byte* lent(LayerIndex, std::int64_t) const { return nullptr; }
  // Around a layer of its own of a CaS step, for channels whose services run beside the engine on one device: in this
  // turn requests wait, though not for ever, and what `stream` does in it follows the services that had begun. A
  // resident layer, of which nobody asks anything, has none. Turns do not nest: a second begin, and an end without one,
  // do nothing; compute() ends a turn. They order work and protect nothing.
  virtual void begin_turn(Stream, LayerIndex) {}
  virtual void end_turn(Stream) {}
  // Throws Error(kDeadline) or Error(kRemoteOp) if an earlier request was not answered: the results of its step are
  // void. Also Error(kRemoteOp) at an owner that could not launch an op.
  virtual void check() const {}
  // Streams that still wait for answers go on without them: their steps are void.
  virtual void give_up() noexcept {}
  // False once the rank was found dead or did not answer.
  [[nodiscard]] virtual bool available(Rank owner) const = 0;
  [[nodiscard]] virtual RequesterStats requester_stats() const = 0;
  [[nodiscard]] virtual ServiceStats service_stats() const = 0;
};

// Answers requests on a thread of its own, in order of arrival, one at a time, whatever the owner's engine does.
class ComputeService {
 public:
  ComputeService(WeightPool& pool, const Mailbox& mailbox, const ServiceOptions& options);
  ~ComputeService();
  void start();
  ComputeService(const ComputeService&) = delete;
  ComputeService& operator=(const ComputeService&) = delete;

  void stop() noexcept;  // after the request in work
  [[nodiscard]] ServiceStats stats() const;

 private:
  void run();
  void serve(Rank requester);

  WeightPool& pool_;
  const Mailbox& mailbox_;
  ServiceOptions options_;
  std::atomic<bool> stop_{false};
  std::vector<std::byte> reply_;  // rows computed here, then put
  std::vector<std::atomic<std::uint64_t>> served_by_peer_;
  std::atomic<std::uint64_t> failed_{0};
  std::atomic<std::uint64_t> rows_{0};
  std::atomic<std::uint64_t> compute_ns_{0};
  std::thread thread_;
};

// The channel on a backend's flags and puts: the caller waits for each answer.
class FlagChannel final : public ActivationChannel {
 public:
  FlagChannel(WeightPool& pool, const Mailbox& mailbox, const ChannelOptions& options)
      : requester_(pool, mailbox, options.deadline), service_(pool, mailbox, options.service) {}
  void start() override { service_.start(); }
  bool stop() noexcept override {
    service_.stop();
    return true;
  }
  void compute(Stream stream, LayerIndex layer, OpIndex op, const std::byte* x, std::int64_t rows, std::byte* y,
               bool) override {
    requester_.compute(stream, layer, op, x, rows, y);
  }
  [[nodiscard]] bool available(Rank owner) const override { return requester_.available(owner); }
  [[nodiscard]] RequesterStats requester_stats() const override { return requester_.stats(); }
  [[nodiscard]] ServiceStats service_stats() const override { return service_.stats(); }

 private:
  Requester requester_;
  ComputeService service_;
};

}  // namespace sidp
