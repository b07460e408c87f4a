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
                   ByteCount flag_stride, const std::vector<int>& gpus, std::vector<LaneOp> program,
                   const LaneOptions& options, std::optional<LinkQueue> queue, Tracer& tracer,
                   std::shared_ptr<const bool> kept)
    : device_(*device),
      nvshmem_(nvshmem),
      flags_(flags),
      flag_stride_(flag_stride),
      program_(std::move(program)),
      options_(options),
      tracer_(tracer),
      landing_(device_, nvshmem, program_),
      arrived_(device, 1, kept),
      stream_(device_, DeviceStream::Priority::kLane),
      engines_(gpus.size()),
      pass_bytes_by_peer_(gpus.size()) {
  const ContextScope scope(device_);
  std::uint32_t last_flag = 0;
  for (const LaneOp& op : program_) {
    last_flag = std::max(last_flag, op.flag);
    if (op.kind != LaneOp::Kind::kCopy && op.kind != LaneOp::Kind::kGet) continue;
    copies_.push_back(op);
    pass_bytes_by_peer_[static_cast<std::size_t>(op.peer)] += op.bytes;
  }
  if (options_.owners_engines) ask_owners(gpus);
  if (queue && !copies_.empty()) {
    std::vector<Rank> owners;
    for (const LaneOp& copy : copies_) owners.push_back(copy.peer);
    gate_.emplace(device, std::move(*queue), std::move(owners), std::move(kept));
  }
  for (std::uint32_t i = 0; i <= last_flag; ++i) {
    Slot& slot = slots_.emplace_back(device_);
    slot.marks.try_emplace(&device_, device_);
    for (const auto& engine : engines_)
      if (engine) slot.marks.try_emplace(&engine->device(), engine->device());
  }
  try {
    queue_next(kNoPass);
  } catch (...) {  // what was queued may still write the ring and the count
    stop();
    throw;
  }
}

CopyLane::~CopyLane() { stop(); }

void CopyLane::ask_owners(const std::vector<int>& gpus) {
  for (std::size_t peer = 0; peer < gpus.size(); ++peer) {
    const auto is_copied = [&](const LaneOp& op) {
      return op.kind == LaneOp::Kind::kCopy && static_cast<std::size_t>(op.peer) == peer;
    };
    if (gpus[peer] == device_.ordinal() || std::none_of(copies_.begin(), copies_.end(), is_copied)) continue;
    try {
      if (gpus[peer] < 0)
        throw Error(ErrorCode::kUnsupported, "its GPU is not visible to this process; see CUDA_VISIBLE_DEVICES");
      auto engine = std::make_unique<OwnerEngine>(device_, gpus[peer]);
      for (const LaneOp& op : copies_)
        if (is_copied(op)) engine->read(op.src, op.bytes);
      engines_[peer] = std::move(engine);
    } catch (const Error& error) {
      if (why_read_.empty()) why_read_ = "rank " + std::to_string(peer) + ": " + error.what();
    }
  }
  if (std::any_of(engines_.begin(), engines_.end(), [](const auto& engine) { return engine != nullptr; }))
    signals_.emplace(device_, DeviceStream::Priority::kLane);
}

bool CopyLane::wait_full(Stream stream, std::uint32_t flag) {
  const Slot& slot = slots_[flag];
  if (!slot.copied)  // to wait for its event would be to wait for an older copy
    throw Error(ErrorCode::kDevice, "no copy could be queued for ring slot " + std::to_string(flag) + " on device " +
                                        std::to_string(device_.ordinal()) + "; an earlier error says why");
  const CurrentContext scope(device_);  // a capture forbids no thread what is enqueued here
  wait_for(slot.full.load(std::memory_order_relaxed), static_cast<CUstream>(stream.handle));
  return true;
}

bool CopyLane::set_empty(Stream stream, std::uint32_t flag) {
  Slot& slot = slots_[flag];
  const CurrentContext scope(device_);
  auto* const on = static_cast<CUstream>(stream.handle);
  if (slot.flagged)
    device_.check(device_.api().cuStreamWriteValue32(on, this->flag(flag), kEmpty, 0), "cuStreamWriteValue32");
  record(slot.used.get(), on);
  slot.empty = slot.used_by_event = true;
  queue_next(slot.pass);
  return true;
}

void CopyLane::used_by_graph(std::uint32_t flag) {
  Slot& slot = slots_[flag];
  slot.empty = true;
  slot.used_by_event = false;
  const CurrentContext scope(device_);
  queue_next(kNoPass);
}

void CopyLane::queue_next(std::uint64_t by_event) {
  while (!stopped_ && slots_[program_[next_].flag].empty) {
    const LaneOp& copy = program_[next_ + 1];
    Slot& slot = slots_[program_[next_].flag];
    slot.empty = slot.copied = false;
    slot.number.store(0);
    slot.flagged = pass_ != by_event;
    slot.pass = pass_;
    const Tracer::Session session = tracer_.session();
    const TraceSpan queueing(tracer_, session, {.kind = TraceEvent::Kind::kQueueCopy, .layer = copy.layer});
    try {
      queue(copy, flag(program_[next_].flag), slot, session);
    } catch (...) {  // it may have entered a link and never leave it
      if (gate_) gate_->stop();
      throw;
    }
    slot.copied = true;
    slot.number.store(queued_);
    next_ = (next_ + 3) % program_.size();
    if (next_ == 0) ++pass_;
  }
}

void CopyLane::queue(const LaneOp& copy, CUdeviceptr flag, Slot& slot, Tracer::Session session) {
  const OwnerEngine* const engine = engines_[static_cast<std::size_t>(copy.peer)].get();
  const Device& device = engine != nullptr ? engine->device() : device_;
  const Marks& marks = slot.marks.at(&device);
  CUstream const on = engine != nullptr ? engine->stream().get() : stream_.get();
  // One for all of a lane, whoever copies: there the copy before has been timed, has left its link and set its flag.
  CUstream const signals = signals_ ? signals_->get() : stream_.get();
  if (!slot.used_by_event) {
    if (signals_) wait_for(slot.flag_set.get(), stream_.get());  // or the flag could still be empty from before
    device_.check(device_.api().cuStreamWaitValue32(stream_.get(), flag, kEmpty, CU_STREAM_WAIT_VALUE_EQ),
                  "cuStreamWaitValue32");
    record(slot.used.get(), stream_.get());
  }
  CUevent full = marks.full.get();
  if (session == 0) [[likely]] {
    const CurrentContext scope(device);
    start(on, slot);
    enter_link(on, signals, slot);
    move(on, copy);
    record(full, on);
    leave_link(on, signals, full);
  } else {
    // Timed on a stream of the own GPU, where the events of a trace belong.
    const auto span = [&](TraceEvent::Kind kind) {
      return TraceSpan(tracer_, session,
                       {.kind = kind,
                        .track = TraceEvent::Track::kLane,
                        .layer = copy.layer,
                        .peer = copy.peer,
                        .bytes = copy.bytes},
                       TraceSpan::Time::kStream, {signals});
    };
    const auto follow = [&](CUevent event) {
      if (signals != on) wait_for(event, signals);
    };
    {
      const TraceSpan waits = span(TraceEvent::Kind::kWaitEmpty);
      {
        const CurrentContext scope(device);
        start(on, slot);
        record(marks.started.get(), on);
      }
      follow(marks.started.get());
    }
    if (gate_) {
      const TraceSpan waits = span(TraceEvent::Kind::kWaitLink);
      const CurrentContext scope(device);
      enter_link(on, signals, slot);
    }
    {
      const TraceSpan copies = span(TraceEvent::Kind::kCopy);
      {
        const CurrentContext scope(device);
        move(on, copy);
        record(marks.full.get(), on);
      }
      follow(marks.full.get());
    }
    leave_link(on, signals, marks.full.get());
    full = slot.timed.get();  // so that no wait ends before its copy in the trace
    record(full, signals);
  }
  last_on_ = on;
  last_full_ = full;
  if (slot.flagged) {
    if (signals != on && session == 0 && !gate_) wait_for(full, signals);
    signal(signals, flag);
    full = slot.flag_set.get();  // or who waits by the event could empty the flag before it is set
    record(full, signals);
  }
  slot.full.store(full, std::memory_order_relaxed);
}

void CopyLane::start(CUstream on, Slot& slot) {
  wait_for(slot.used.get(), on);
  if (last_on_ != nullptr && last_on_ != on) wait_for(last_full_, on);
}

void CopyLane::enter_link(CUstream on, CUstream signals, Slot& slot) {
  if (!gate_) return;
  {
    const CurrentContext scope(device_);
    if (signals != on) wait_for(slot.used.get(), signals);
    gate_->enter(signals, queued_ + 1);
    if (signals == on) return;
    record(slot.entered.get(), signals);
  }
  wait_for(slot.entered.get(), on);
}

void CopyLane::leave_link(CUstream on, CUstream signals, CUevent full) {
  if (!gate_) return;
  const CurrentContext scope(device_);
  if (signals != on) wait_for(full, signals);
  gate_->leave(signals, queued_);
}

void CopyLane::move(CUstream on, const LaneOp& copy) {
  if (options_.test_delay_us > 0)
    device_.check(device_.api().cuLaunchHostFunc(on, sleep_on_stream, &options_), "cuLaunchHostFunc");
  if (copy.kind == LaneOp::Kind::kCopy)
    device_.check(
        device_.api().cuMemcpyDtoDAsync(device_pointer(copy.dst), device_pointer(copy.src), copy.bytes, on), [&] {
          return "cuMemcpyDtoDAsync of " + std::to_string(copy.bytes) + " bytes from rank " + std::to_string(copy.peer);
        });
  else
    nvshmem_.getmem_on_stream(copy.dst, copy.src, copy.bytes, copy.peer, on);
  ++queued_;
}

// In this order: what a full flag promises has arrived, and is counted only then.
void CopyLane::signal(CUstream on, CUdeviceptr flag) {
  CUstreamBatchMemOpParams both[2] = {};
  both[0].writeValue = {
      .operation = CU_STREAM_MEM_OP_WRITE_VALUE_32, .address = flag, .value = kFull, .flags = 0, .alias = 0};
  both[1].writeValue = {.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32,
                        .address = arrived_.on_device(0),
                        .value = queued_,
                        .flags = 0,
                        .alias = 0};
  device_.check(device_.api().cuStreamBatchMemOp(on, 2, both, 0), "cuStreamBatchMemOp");
}

void CopyLane::record(CUevent event, CUstream stream) const {
  device_.check(device_.api().cuEventRecord(event, stream), "cuEventRecord");
}

void CopyLane::wait_for(CUevent event, CUstream stream) const {
  device_.check(device_.api().cuStreamWaitEvent(stream, event, 0), "cuStreamWaitEvent");
}

bool CopyLane::idle() const {
  return stream_.idle() && (!signals_ || signals_->idle()) &&
         std::all_of(engines_.begin(), engines_.end(),
                     [](const auto& engine) { return !engine || engine->stream().idle(); });
}

bool CopyLane::stop() noexcept {
  stopped_ = true;
  if (abandoned_) return false;
  const ContextScope scope(device_);
  const auto start = Clock::now();
  while (!idle() && Clock::now() - start < options_.stop_deadline)
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  abandoned_ = !idle();
  if (gate_) gate_->stop();
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
        number != 0 && device_.api().cuEventQuery(slot.full.load()) == CUDA_SUCCESS && slot.number.load() == number)
      count_up_to(number);
  LaneStats stats{.copies = arrived_total_,
                  .bytes_by_peer = pass_bytes_by_peer_,
                  .copy_ns = 0,
                  .wait_ns = 0,
                  .owners_engines = {},
                  .why_read = why_read_,
                  .exclusive_links = gate_.has_value(),
                  .link_wait_ns = gate_ ? gate_->waited_ns() : 0,
                  .links_taken = gate_ ? gate_->taken() : 0};
  for (const auto& engine : engines_) stats.owners_engines.push_back(engine != nullptr);
  const std::uint64_t passes = arrived_total_ / copies_.size();
  for (ByteCount& bytes : stats.bytes_by_peer) bytes *= passes;
  for (std::uint64_t i = 0; i < arrived_total_ % copies_.size(); ++i)
    stats.bytes_by_peer[static_cast<std::size_t>(copies_[i].peer)] += copies_[i].bytes;
  return stats;
}

}  // namespace sidp::nvshmem
