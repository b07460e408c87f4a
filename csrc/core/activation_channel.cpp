#include "sidp/activation_channel.hpp"

#include <algorithm>
#include <limits>
#include <string>

#include "collective.hpp"
#include "sidp/error.hpp"

namespace sidp {

// Here, where the channel's type is complete.
std::unique_ptr<ActivationChannel> Backend::make_channel(WeightPool&, const Mailbox&, const ChannelOptions&) {
  return nullptr;
}

Mailbox::Mailbox(WeightPool& pool, std::vector<Op> ops, std::int64_t max_rows, std::vector<std::int64_t> row_buckets)
    : ops_(std::move(ops)), max_rows_(max_rows), row_buckets_(std::move(row_buckets)) {
  Backend& backend = pool.backend();
  if (max_rows_ < 1)
    throw Error(ErrorCode::kConfig, "max_rows is " + std::to_string(max_rows_) + ", must be at least 1");
  std::int64_t below = 0;
  for (const std::int64_t rows : row_buckets_) {
    if (rows <= below || rows > max_rows_)
      throw Error(ErrorCode::kConfig, "row buckets must ascend from 1 to max_rows " + std::to_string(max_rows_) + "; " +
                                          std::to_string(rows) + " comes after " + std::to_string(below));
    below = rows;
  }
  if (!row_buckets_.empty() && below != max_rows_)
    throw Error(ErrorCode::kConfig, "the largest row bucket is " + std::to_string(below) + ", max_rows is " +
                                        std::to_string(max_rows_) + "; they must be equal");
  const auto num_layers = static_cast<std::size_t>(pool.placement().num_layers());
  ByteCount in_bytes = 0, out_bytes = 0;
  std::string text = "max_rows " + std::to_string(max_rows_) + " buckets";
  for (const std::int64_t rows : row_buckets_) text += " " + std::to_string(rows);
  for (const Op& op : ops_) {
    if (op.kernels.size() != num_layers)
      throw Error(ErrorCode::kConfig, "op " + op.name + " has kernels for " + std::to_string(op.kernels.size()) +
                                          " layers, the pool has " + std::to_string(num_layers));
    in_bytes = std::max(in_bytes, op.in_row_bytes);
    out_bytes = std::max(out_bytes, op.out_row_bytes);
    text += "\nop " + op.name + " in " + std::to_string(op.in_row_bytes) + " out " + std::to_string(op.out_row_bytes) +
            " layers";
    for (std::size_t i = 0; i < num_layers; ++i) text += op.kernels[i] ? " " + std::to_string(i) : "";
    text += " computes " + op.description;
  }
  check_same_on_all_ranks(backend.bootstrap(), backend.rank(), "ops", text);
  const auto rows = static_cast<ByteCount>(max_rows_);
  const auto world_size = static_cast<ByteCount>(backend.world_size());
  // Beyond this the sizes below would wrap around and the slots come out too small.
  if (rows > (std::numeric_limits<ByteCount>::max() >> 2) / world_size / (in_bytes + out_bytes + 2 * kAlignment))
    throw Error(ErrorCode::kCapacity,
                "slots of max_rows " + std::to_string(max_rows_) + " rows of " + std::to_string(in_bytes + out_bytes) +
                    " bytes exceed the address space; lower max_rows",
                {.rank = backend.rank()});
  request_stride_ = kAlignment + align_up(rows * in_bytes);
  reply_stride_ = kAlignment + align_up(rows * out_bytes);
  replies_at_ = request_stride_ * world_size;
  const std::vector<ByteCount> bytes(world_size, replies_at_ + reply_stride_ * world_size);
  buffer_ = backend.allocate_symmetric(bytes, "mailbox", /*peer_writable=*/true);
}

std::int64_t Mailbox::bucket(LayerIndex layer, std::int64_t rows) const {
  if (rows < 1 || rows > max_rows_)
    throw Error(ErrorCode::kShape,
                "remote_compute of layer " + std::to_string(layer) + " was given " + std::to_string(rows) +
                    " rows; a slot holds 1 to " + std::to_string(max_rows_) +
                    ": raise max_rows, or let the policy choose WaS for large steps",
                {.layer = layer, .expected = max_rows_, .seen = rows});
  const auto it = std::lower_bound(row_buckets_.begin(), row_buckets_.end(), rows);
  return it == row_buckets_.end() ? rows : *it;
}

OpIndex Mailbox::op_index(const std::string& name) const {
  std::string known;
  for (std::size_t i = 0; i < ops_.size(); ++i) {
    if (ops_[i].name == name) return static_cast<OpIndex>(i);
    known += (i ? ", " : "") + ops_[i].name;
  }
  throw Error(ErrorCode::kUnknownName, "op '" + name + "' was not declared; the ops are: " + known);
}

const OpKernel& Mailbox::kernel(LayerIndex layer, OpIndex op) const {
  if (op < 0 || static_cast<std::size_t>(op) >= ops_.size())
    throw Error(ErrorCode::kUnknownName,
                "op index " + std::to_string(op) + " is not one of " + std::to_string(ops_.size()), {.layer = layer});
  const Op& entry = ops_[static_cast<std::size_t>(op)];
  if (layer < 0 || static_cast<std::size_t>(layer) >= entry.kernels.size() ||
      !entry.kernels[static_cast<std::size_t>(layer)])
    throw Error(ErrorCode::kUnknownName, "layer " + std::to_string(layer) + " has no op '" + entry.name + "'",
                {.layer = layer});
  return *entry.kernels[static_cast<std::size_t>(layer)];
}

Requester::Requester(WeightPool& pool, const Mailbox& mailbox, Milliseconds deadline)
    : pool_(pool), mailbox_(mailbox), deadline_(deadline) {
  const auto world_size = static_cast<std::size_t>(pool.placement().world_size());
  gave_up_.assign(world_size, false);
  stats_.requests_by_peer.assign(world_size, 0);
}

bool Requester::available(Rank owner) const {
  return !gave_up_[static_cast<std::size_t>(owner)] && pool_.backend().alive(owner);
}

void Requester::compute(Stream stream, LayerIndex layer, OpIndex op, const std::byte* x, std::int64_t rows,
                        std::byte* y) {
  Backend& backend = pool_.backend();
  const Rank rank = backend.rank();
  const OpKernel& kernel = mailbox_.kernel(layer, op);
  const Op& entry = mailbox_.ops()[static_cast<std::size_t>(op)];
  mailbox_.bucket(layer, rows);  // throws for rows that no slot holds
  const Rank owner = pool_.placement().owner(layer);
  const auto peer = static_cast<std::size_t>(owner);
  if (!gave_up_[peer]) {
    const RequestHeader header{layer, op, rows};
    const ByteCount in_bytes = static_cast<ByteCount>(rows) * entry.in_row_bytes;
    const ByteCount slot = mailbox_.request_offset(rank);
    backend.put(stream, mailbox_.buffer(), owner, slot, &header, sizeof header);
    backend.put(stream, mailbox_.buffer(), owner, slot + kAlignment, x, in_bytes);
    const auto start = Clock::now();
    TraceSpan span(backend.tracer(), backend.tracer().session(),
                   {.kind = TraceEvent::Kind::kWaitReply, .layer = layer, .op = op, .peer = owner});
    backend.signal(stream, {owner, pool_.request_flag(rank)}, kFull);
    const WaitResult result =
        backend.wait(stream, pool_.reply_flag(owner), kFull, {.deadline = deadline_, .peer = owner});
    stats_.wait_ns += static_cast<std::uint64_t>(std::chrono::nanoseconds(Clock::now() - start).count());
    span.close();
    if (result == WaitResult::kReady) {
      const std::byte* reply = mailbox_.buffer().local() + mailbox_.reply_offset(owner);
      ReplyHeader answer;
      backend.copy(stream, &answer, reply, sizeof answer);
      if (!answer.failed)
        backend.copy(stream, y, reply + kAlignment, static_cast<ByteCount>(rows) * entry.out_row_bytes);
      backend.signal(stream, {rank, pool_.reply_flag(owner)}, kEmpty);
      ++stats_.requests_by_peer[peer];
      stats_.rows_sent += static_cast<std::uint64_t>(rows);
      stats_.bytes_sent += in_bytes;
      answer.message[sizeof answer.message - 1] = '\0';  // it came from another process
      if (answer.failed)
        throw Error(ErrorCode::kRemoteOp,
                    "op '" + entry.name + "' of layer " + std::to_string(layer) + " failed at its owner, rank " +
                        std::to_string(owner) + ": " + answer.message,
                    {.rank = rank, .peer = owner, .layer = layer});
      return;
    }
    // A late answer may still land in the slot; it is never looked at, because this owner is not asked again.
    gave_up_[peer] = true;
  }
  const std::byte* weights = pool_.peer_layer(layer);
  if (weights == nullptr)
    throw Error(ErrorCode::kPeerDead,
                "rank " + std::to_string(owner) + ", owner of layer " + std::to_string(layer) +
                    ", no longer answers and its memory is not mapped here",
                {.rank = rank, .peer = owner, .layer = layer});
  ++stats_.fallbacks;
  const TraceSpan span(backend.tracer(), backend.tracer().session(),
                       {.kind = TraceEvent::Kind::kStandIn, .layer = layer, .op = op, .peer = owner, .rows = rows});
  try {
    kernel.run(weights, x, rows, y);
  } catch (const std::exception& error) {
    throw Error(ErrorCode::kRemoteOp,
                "op '" + entry.name + "' of layer " + std::to_string(layer) + " failed here, in place of rank " +
                    std::to_string(owner) + " which no longer answers: " + error.what(),
                {.rank = rank, .peer = owner, .layer = layer});
  }
}

}  // namespace sidp
