#include "copy_lane.hpp"

#include <algorithm>
#include <chrono>
#include <thread>

#include "sidp/error.hpp"

namespace sidp::nvshmem {

namespace {

void sleep_on_stream(void* options) {
  std::this_thread::sleep_for(std::chrono::microseconds(static_cast<const LaneOptions*>(options)->test_delay_us));
}

}  // namespace

Landing::Landing(const Device& device, const NvshmemApi& nvshmem, const std::vector<LaneOp>& program)
    : device_(device), nvshmem_(nvshmem) {
  std::byte* end = nullptr;
  Rank peer = -1;
  for (const LaneOp& op : program) {
    if (op.kind != LaneOp::Kind::kGet) continue;
    begin_ = begin_ == nullptr ? op.dst : std::min(begin_, op.dst);
    end = std::max(end, op.dst + op.bytes);
    peer = op.peer;
  }
  if (begin_ == nullptr) return;
  const ContextScope scope(device);
  const auto bytes = static_cast<std::size_t>(end - begin_);
  if (const int status = nvshmem.buffer_register(begin_, bytes); status != 0) {
    nvshmem.buffer_unregister(begin_);  // from the transports that took it
    throw Error(ErrorCode::kDevice,
                "NVSHMEM did not register the ring (nvshmemx_buffer_register of " + std::to_string(bytes) +
                    " bytes on device " + std::to_string(device.ordinal()) + ": status " + std::to_string(status) +
                    "), and rank " + std::to_string(peer) +
                    " is not mapped, so its layers cannot be read; NVSHMEM_DEBUG=INFO says why",
                {.peer = peer, .num_bytes = static_cast<std::int64_t>(bytes)});
  }
}

void Landing::unregister() noexcept {
  if (begin_ == nullptr) return;
  const ContextScope scope(device_);
  nvshmem_.buffer_unregister(begin_);
  begin_ = nullptr;
}

CopyLane::CopyLane(const std::shared_ptr<const Device>& device, const NvshmemApi& nvshmem, CUdeviceptr flags,
                   ByteCount flag_stride, Rank world_size, std::vector<LaneOp> program, const LaneOptions& options,
                   Tracer& tracer, std::shared_ptr<const bool> kept)
    : device_(*device),
      nvshmem_(nvshmem),
      flags_(flags),
      flag_stride_(flag_stride),
      program_(std::move(program)),
      options_(options),
      tracer_(tracer),
      landing_(device_, nvshmem, program_),
      arrived_(device, 1, std::move(kept)),
      stream_(device_, DeviceStream::Priority::kLane),
      pass_bytes_by_peer_(static_cast<std::size_t>(world_size)) {
  std::uint32_t last_flag = 0;
  for (const LaneOp& op : program_) {
    last_flag = std::max(last_flag, op.flag);
    if (op.kind != LaneOp::Kind::kCopy && op.kind != LaneOp::Kind::kGet) continue;
    copies_.push_back(op);
    pass_bytes_by_peer_[static_cast<std::size_t>(op.peer)] += op.bytes;
  }
  for (std::uint32_t i = 0; i <= last_flag; ++i) slots_.emplace_back(device_);
  const ContextScope scope(device_);
  try {
    queue_next(kNoPass);
  } catch (...) {  // what was queued may still write the ring and the count
    stop();
    throw;
  }
}

CopyLane::~CopyLane() { stop(); }

bool CopyLane::wait_full(Stream stream, std::uint32_t flag) {
  const Slot& slot = slots_[flag];
  if (!slot.copied)  // to wait for its event would be to wait for an older copy
    throw Error(ErrorCode::kDevice, "no copy could be queued for ring slot " + std::to_string(flag) + " on device " +
                                        std::to_string(device_.ordinal()) + "; an earlier error says why");
  const ContextScope scope(device_);
  device_.check(device_.api().cuStreamWaitEvent(static_cast<CUstream>(stream.handle), slot.full.get(), 0),
                "cuStreamWaitEvent");
  return true;
}

bool CopyLane::set_empty(Stream stream, std::uint32_t flag) {
  Slot& slot = slots_[flag];
  const ContextScope scope(device_);
  auto* const on = static_cast<CUstream>(stream.handle);
  if (slot.flagged)
    device_.check(device_.api().cuStreamWriteValue32(on, this->flag(flag), kEmpty, 0), "cuStreamWriteValue32");
  device_.check(device_.api().cuEventRecord(slot.used.get(), on), "cuEventRecord");
  slot.empty = slot.used_by_event = true;
  queue_next(slot.pass);
  return true;
}

void CopyLane::used_by_graph(std::uint32_t flag) {
  Slot& slot = slots_[flag];
  slot.empty = true;
  slot.used_by_event = false;
  const ContextScope scope(device_);
  queue_next(kNoPass);
}

void CopyLane::queue_next(std::uint64_t by_event) {
  while (!stopped_ && slots_[program_[next_].flag].empty) {
    Slot& slot = slots_[program_[next_].flag];
    slot.empty = slot.copied = false;
    slot.number.store(0);
    slot.flagged = pass_ != by_event;
    slot.pass = pass_;
    const Tracer::Session session = tracer_.session();
    const TraceSpan queueing(tracer_, session, {.kind = TraceEvent::Kind::kQueueCopy, .layer = program_[next_].layer});
    do {
      queue(program_[next_], slot, session);
      next_ = (next_ + 1) % program_.size();
    } while (program_[next_].kind != LaneOp::Kind::kWait);
    slot.copied = true;
    slot.number.store(queued_);
    if (next_ == 0) ++pass_;
  }
}

void CopyLane::queue(const LaneOp& op, Slot& slot, Tracer::Session session) {
  const auto& api = device_.api();
  const auto span = [&](TraceEvent::Kind kind) {
    return TraceSpan(
        tracer_, session,
        {.kind = kind, .track = TraceEvent::Track::kLane, .layer = op.layer, .peer = op.peer, .bytes = op.bytes},
        TraceSpan::Time::kStream, {stream_.get()});
  };
  switch (op.kind) {
    case LaneOp::Kind::kWait: {
      const TraceSpan wait = span(TraceEvent::Kind::kWaitEmpty);
      if (slot.used_by_event)
        device_.check(api.cuStreamWaitEvent(stream_.get(), slot.used.get(), 0), "cuStreamWaitEvent");
      else
        device_.check(api.cuStreamWaitValue32(stream_.get(), flag(op.flag), op.value, CU_STREAM_WAIT_VALUE_EQ),
                      "cuStreamWaitValue32");
    }
      if (options_.test_delay_us > 0)
        device_.check(api.cuLaunchHostFunc(stream_.get(), sleep_on_stream, &options_), "cuLaunchHostFunc");
      break;
    case LaneOp::Kind::kCopy: {
      const TraceSpan copy = span(TraceEvent::Kind::kCopy);
      device_.check(api.cuMemcpyAsync(device_pointer(op.dst), device_pointer(op.src), op.bytes, stream_.get()), [&] {
        return "cuMemcpyAsync of " + std::to_string(op.bytes) + " bytes from rank " + std::to_string(op.peer);
      });
      ++queued_;
      break;
    }
    case LaneOp::Kind::kGet: {
      const TraceSpan copy = span(TraceEvent::Kind::kCopy);
      nvshmem_.getmem_on_stream(op.dst, op.src, op.bytes, op.peer, stream_.get());
      ++queued_;
      break;
    }
    case LaneOp::Kind::kSignal: {
      if (slot.flagged) {
        // In this order: what a full flag promises has arrived, and is counted only then.
        CUstreamBatchMemOpParams both[2] = {};
        both[0].writeValue = {.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32,
                              .address = flag(op.flag),
                              .value = op.value,
                              .flags = 0,
                              .alias = 0};
        both[1].writeValue = {.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32,
                              .address = arrived_.on_device(0),
                              .value = queued_,
                              .flags = 0,
                              .alias = 0};
        device_.check(api.cuStreamBatchMemOp(stream_.get(), 2, both, 0), "cuStreamBatchMemOp");
      }
      device_.check(api.cuEventRecord(slot.full.get(), stream_.get()), "cuEventRecord");
      break;
    }
  }
}

bool CopyLane::stop() noexcept {
  stopped_ = true;
  if (abandoned_) return false;
  const ContextScope scope(device_);
  const auto start = Clock::now();
  while (!stream_.idle() && Clock::now() - start < options_.stop_deadline)
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  abandoned_ = !stream_.idle();
  if (abandoned_)
    landing_.abandon();
  else
    landing_.unregister();
  return !abandoned_;
}

LaneStats CopyLane::stats() const {
  const std::lock_guard lock(mutex_);
  const auto count_up_to = [&](std::uint32_t number) {  // the low half of a count that only grows
    if (const auto more = static_cast<std::int32_t>(number - static_cast<std::uint32_t>(arrived_total_)); more > 0)
      arrived_total_ += static_cast<std::uint32_t>(more);
  };
  count_up_to(static_cast<std::uint32_t>(arrived_.load(0)));
  const ContextScope scope(device_);
  for (const Slot& slot : slots_)  // copies that set no flag: their slots' events tell
    if (const std::uint32_t number = slot.number.load();
        number != 0 && device_.api().cuEventQuery(slot.full.get()) == CUDA_SUCCESS && slot.number.load() == number)
      count_up_to(number);
  LaneStats stats{.copies = arrived_total_, .bytes_by_peer = pass_bytes_by_peer_, .copy_ns = 0, .wait_ns = 0};
  const std::uint64_t passes = arrived_total_ / copies_.size();
  for (ByteCount& bytes : stats.bytes_by_peer) bytes *= passes;
  for (std::uint64_t i = 0; i < arrived_total_ % copies_.size(); ++i)
    stats.bytes_by_peer[static_cast<std::size_t>(copies_[i].peer)] += copies_[i].bytes;
  return stats;
}

}  // namespace sidp::nvshmem
