#include <algorithm>
#include <cstring>
#include <deque>
#include <string>

#include "sidp/activation_channel.hpp"
#include "sidp/error.hpp"

namespace sidp {

ComputeService::ComputeService(WeightPool& pool, const Mailbox& mailbox, const ServiceOptions& options)
    : pool_(pool),
      mailbox_(mailbox),
      options_(options),
      served_by_peer_(static_cast<std::size_t>(pool.placement().world_size())) {
  ByteCount out_bytes = 0;
  for (const Op& op : mailbox.ops()) out_bytes = std::max(out_bytes, op.out_row_bytes);
  reply_.resize(static_cast<std::size_t>(out_bytes) * static_cast<std::size_t>(mailbox.max_rows()));
}

void ComputeService::start() {
  thread_ = pool_.backend().start_thread("sidp-service", [this] { run(); });
}

ComputeService::~ComputeService() { stop(); }

void ComputeService::stop() noexcept {
  stop_.store(true);
  pool_.backend().interrupt();
  if (thread_.joinable()) thread_.join();
}

void ComputeService::run() {
  Backend& backend = pool_.backend();
  const Rank world_size = backend.world_size();
  std::deque<Rank> arrived;  // in the order in which they were seen
  std::vector<bool> queued(static_cast<std::size_t>(world_size), false);
  Rank first = 0;  // scanning starts after the rank seen last, so that none is favoured
  while (!stop_.load()) {
    if (arrived.empty() && !backend.wait_any_full(pool_.request_flag(0), static_cast<std::uint32_t>(world_size),
                                                  Milliseconds(1000), stop_))
      continue;
    for (Rank i = 0; i < world_size; ++i) {
      const Rank requester = (first + i) % world_size;
      const bool seen = queued[static_cast<std::size_t>(requester)];
      if (seen ||
          backend.wait({}, pool_.request_flag(requester), kFull, {.deadline = Milliseconds(0)}) != WaitResult::kReady)
        continue;
      queued[static_cast<std::size_t>(requester)] = true;
      arrived.push_back(requester);
    }
    if (arrived.empty()) continue;
    const Rank requester = arrived.front();
    arrived.pop_front();
    queued[static_cast<std::size_t>(requester)] = false;
    first = (requester + 1) % world_size;
    serve(requester);
  }
}

void ComputeService::serve(Rank requester) {
  Backend& backend = pool_.backend();
  const Stream stream{};
  if (options_.test_delay_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(options_.test_delay_us));
  const std::byte* slot = mailbox_.buffer().local() + mailbox_.request_offset(requester);
  RequestHeader header;
  std::memcpy(&header, slot, sizeof header);
  Tracer& tracer = backend.tracer();
  TraceSpan span(tracer, tracer.session(),
                 {.kind = TraceEvent::Kind::kService,
                  .track = TraceEvent::Track::kService,
                  .layer = header.layer,
                  .op = header.op,
                  .peer = requester,
                  .rows = header.rows});
  ReplyHeader reply{};
  ByteCount out_bytes = 0;
  const auto start = Clock::now();
  try {
    // The header came from another process: nothing in it is trusted.
    const OpKernel& kernel = mailbox_.kernel(header.layer, header.op);
    if (header.rows < 1 || header.rows > mailbox_.max_rows())
      throw Error(ErrorCode::kShape, "request for " + std::to_string(header.rows) + " rows");
    out_bytes = static_cast<ByteCount>(header.rows) * mailbox_.ops()[static_cast<std::size_t>(header.op)].out_row_bytes;
    const TraceSpan op(tracer, tracer.session(),
                       {.kind = TraceEvent::Kind::kOp,
                        .track = TraceEvent::Track::kService,
                        .layer = header.layer,
                        .op = header.op,
                        .peer = requester,
                        .rows = header.rows});
    kernel.run(pool_.local_layer(header.layer), slot + kAlignment, header.rows, reply_.data());
  } catch (const std::exception& error) {
    reply.failed = 1;
    std::strncpy(reply.message, error.what(), sizeof reply.message - 1);
    failed_.fetch_add(1, std::memory_order_relaxed);
  }
  compute_ns_.fetch_add(static_cast<std::uint64_t>(std::chrono::nanoseconds(Clock::now() - start).count()),
                        std::memory_order_relaxed);
  rows_.fetch_add(static_cast<std::uint64_t>(std::max<std::int64_t>(header.rows, 0)), std::memory_order_relaxed);
  served_by_peer_[static_cast<std::size_t>(requester)].fetch_add(1, std::memory_order_relaxed);
  // The slot is free before the answer goes out: the requester may use it again as soon as it has the answer.
  backend.signal(stream, {backend.rank(), pool_.request_flag(requester)}, kEmpty);
  const ByteCount at = mailbox_.reply_offset(backend.rank());
  if (!reply.failed) backend.put(stream, mailbox_.buffer(), requester, at + kAlignment, reply_.data(), out_bytes);
  backend.put(stream, mailbox_.buffer(), requester, at, &reply, sizeof reply);
  span.close();  // recorded before its answer can arrive
  backend.signal(stream, {requester, pool_.reply_flag(backend.rank())}, kFull);
}

ServiceStats ComputeService::stats() const {
  ServiceStats stats;
  for (const auto& served : served_by_peer_) stats.served_by_peer.push_back(served.load(std::memory_order_relaxed));
  stats.failed = failed_.load(std::memory_order_relaxed);
  stats.rows = rows_.load(std::memory_order_relaxed);
  stats.compute_ns = compute_ns_.load(std::memory_order_relaxed);
  return stats;
}

}  // namespace sidp
