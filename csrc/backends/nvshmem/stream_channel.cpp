#include "stream_channel.hpp"

#include <pthread.h>

#include <algorithm>
#include <string>

#include "sidp/error.hpp"
#include "spin_or_nap.hpp"

namespace sidp::nvshmem {

namespace {

constexpr std::uint32_t kAnswered = 1;

constexpr std::chrono::microseconds kWatchPause{500};
constexpr Milliseconds kStopDeadline{10000};
// A request waits for the engine's turn to end for as long as so many ops take, within these bounds: if the engine's
// own layer takes longer than that, both are better off beside each other.
constexpr int kPatience = 4;
constexpr std::chrono::microseconds kLeastPatience{100}, kMostPatience{5000};

}  // namespace

std::uint32_t Request::word() const {
  return kWaiting | static_cast<std::uint32_t>(layer) << 19 | static_cast<std::uint32_t>(op) << 13 |
         static_cast<std::uint32_t>(rows);
}

Request Request::from(std::uint32_t word) {
  return {static_cast<LayerIndex>(word >> 19 & 0xFFF), static_cast<OpIndex>(word >> 13 & 0x3F), word & 0x1FFF};
}

// Lines of words on the device: kCounts and an epoch by rank, block counters of the engine's put and take by owner,
// block counter of the service's puts, count of its answers, whether a request of this rank was not answered.
StreamChannel::StreamChannel(std::shared_ptr<const Device> device, WeightPool& pool, const Mailbox& mailbox,
                             ChannelMemory memory, const ChannelOptions& options,
                             const std::shared_ptr<const bool>& kept)
    : device_(std::move(device)),
      pool_(pool),
      mailbox_(mailbox),
      memory_(std::move(memory)),
      options_(options),
      rank_(pool.backend().rank()),
      world_size_(pool.backend().world_size()),
      kernels_(*device_),
      host_(device_, index(HostWord::kNumWords), kept),
      words_(device_, (3 * static_cast<ByteCount>(world_size_) + 3) * 64, kept),
      service_stream_(device_),
      watches_(static_cast<std::size_t>(world_size_)),
      in_work_(static_cast<std::size_t>(world_size_)),
      launch_for_(static_cast<std::size_t>(world_size_)),
      gave_up_(static_cast<std::size_t>(world_size_)),
      stand_ins_(static_cast<std::size_t>(world_size_)),
      run_ahead_(host_, index(HostWord::kAnswered), options_.deadline),
      deferred_since_(static_cast<std::size_t>(world_size_)),
      last_served_(static_cast<std::size_t>(world_size_)),
      served_by_peer_(static_cast<std::size_t>(world_size_)) {
  if (pool.placement().num_layers() > Request::kMaxLayers || mailbox.ops().size() > Request::kMaxOps ||
      mailbox.max_rows() > Request::kMaxRows)
    throw Error(ErrorCode::kConfig, "a request names at most " + std::to_string(Request::kMaxLayers) + " layers, " +
                                        std::to_string(Request::kMaxOps) + " ops and " +
                                        std::to_string(Request::kMaxRows) + " rows");
  if (mailbox.row_buckets().empty())
    throw Error(ErrorCode::kConfig, "ops on a GPU are captured beforehand: give the row buckets to capture");
  for (Rank peer = 0; peer < world_size_; ++peer)
    if (mailbox.buffer().peer(peer) == nullptr)
      throw Error(ErrorCode::kUnsupported,
                  "memory of rank " + std::to_string(peer) +
                      " is not mapped here, so no activations can be put there; "
                      "use mode WaS without ops across such peers",
                  {.rank = rank_, .peer = peer});
}

StreamChannel::~StreamChannel() { stop(); }

void StreamChannel::start() {
  thread_ = std::thread([this] {
    name_and_sharpen("sidp-service");
    run();
  });
  watch_thread_ = std::thread([this] {
    ::pthread_setname_np(::pthread_self(), "sidp-watch");
    while (!stop_.load(std::memory_order_relaxed)) {
      for (Rank peer = 0; peer < world_size_; ++peer) {
        if (peer == rank_) continue;
        watch(peer);
        watch_rows(peer);
      }
      std::this_thread::sleep_for(kWatchPause);
    }
  });
}

bool StreamChannel::stop() noexcept {
  stop_.store(true);
  const ContextScope scope(*device_);
  if (!thread_.joinable()) return service_stream_.idle();
  thread_.join();
  watch_thread_.join();
  const auto start = Clock::now();
  while (!service_stream_.idle() && Clock::now() - start < kStopDeadline) {  // answers under way still arrive
    if (Clock::now() - start < kStopDeadline / 2)
      for (Rank peer = 0; peer < world_size_; ++peer) watch_rows(peer);
    else  // but rows that have not come by now do not
      for (Rank peer = 0; peer < world_size_; ++peer) host_.store(given_up_index(peer), 1);
    std::this_thread::sleep_for(kNap);
  }
  return service_stream_.idle();
}

const std::byte* StreamChannel::lent(LayerIndex layer, std::int64_t rows) const {
  return spins(mailbox_.bucket(layer, rows)) ? reply_slot(pool_.placement().owner(layer)) : nullptr;
}

const GraphOp& StreamChannel::graph(const Request& request) const {
  return dynamic_cast<const GraphOp&>(mailbox_.kernel(request.layer, request.op));
}

const std::byte* StreamChannel::slot(Rank owner, Rank requester) const {
  return mailbox_.buffer().peer(owner) + mailbox_.request_offset(requester) + kAlignment;
}

void StreamChannel::await_rows(Stream stream, const GraphOp::Key& request, ByteCount bytes) const {
  const auto [owner, requester, rows] = request;
  if (!spins(rows)) return;  // its word is set when they are there
  const ContextScope scope(*device_);
  const CUdeviceptr seen = memory_.rows_seen(owner, requester);
  kernels_.await(static_cast<CUstream>(stream.handle),
                 {.flags = memory_.rows_flags(owner, requester),
                  .count = Kernels::blocks_for(bytes),
                  .released = host_.on_device(given_up_index(requester)),
                  .failed = withheld_word(requester),
                  .epoch = owner == rank_ ? seen : epoch_word(owner),  // a dead owner may have seen them or not
                  .seen = seen});
}

void StreamChannel::put_answer(Stream stream, const GraphOp::Key& request,
                               const std::vector<std::pair<const std::byte*, ByteCount>>& sources) const {
  const auto [owner, requester, rows] = request;
  const ContextScope scope(*device_);
  const bool spun = spins(rows);
  ByteCount bytes = 0;
  for (const auto& [source, source_bytes] : sources) bytes += source_bytes;
  CUdeviceptr dst = device_pointer(mailbox_.buffer().peer(requester) + mailbox_.reply_offset(owner) + kAlignment);
  for (std::size_t i = 0; i < sources.size(); ++i) {
    const bool last = i + 1 == sources.size();
    kernels_.put(static_cast<CUstream>(stream.handle), dst, device_pointer(sources[i].first), sources[i].second,
                 {.word = last && !spun ? memory_.reply(requester, owner).device : 0,
                  .value = kAnswered,
                  .finished = local_word(3 * static_cast<std::size_t>(world_size_)),
                  .block_flags = last && spun ? memory_.reply_flags(requester, owner) : 0,
                  .blocks = last && spun ? Kernels::blocks_for(bytes) : 0,  // as the requester knows the whole only
                  .withheld = last && spun ? withheld_word(requester) : 0,
                  .served = last ? served_word() : 0,
                  .served_host = last ? host_.on_device(index(HostWord::kServed)) : 0});
    dst += sources[i].second;
  }
}

CUdeviceptr StreamChannel::served_word() const { return local_word(3 * static_cast<std::size_t>(world_size_) + 1); }

TurnWords StreamChannel::turn_words() const {
  return {.turn = host_.on_device(index(HostWord::kTurn)),
          .launched_host = host_.on_device(index(HostWord::kLaunched)),
          .served = served_word()};
}

void StreamChannel::begin_step(Requests requests) {
  one_by_one_ = requests == Requests::kOneByOne;
  if (requests == Requests::kCaptured) return;
  const bool is_graph = requests == Requests::kReplayed || requests == Requests::kReplayedNone;
  if (steps_since_graph_ < kStepsAhead) {
    bool ended = false;
    run_ahead_.time([&] { ended = pool_.backend().wait_step_end(options_.deadline, /*but_one=*/is_graph); });
    if (!ended) steps_since_graph_ = kStepsAhead;  // or each step to come would wait as long
  }
  if (requests == Requests::kReplayed)
    steps_since_graph_ = 0;
  else if (!is_graph)
    steps_since_graph_ = kStepsAhead;
  else if (steps_since_graph_ < kStepsAhead)
    ++steps_since_graph_;
  if (requests == Requests::kNone || requests == Requests::kReplayedNone) run_ahead_.settle();
}

void StreamChannel::begin_turn(Stream stream, LayerIndex layer) {
  if (one_by_one_) run_ahead_.begin_layer();
  if (in_turn_ || pool_.placement().is_resident(layer)) return;
  const ContextScope scope(*device_);
  kernels_.turn(static_cast<CUstream>(stream.handle), turn_words());
  in_turn_ = true;
}

void StreamChannel::end_turn(Stream stream) {
  if (!in_turn_) return;
  in_turn_ = false;
  const ContextScope scope(*device_);
  device_->check(device_->api().cuStreamWriteValue32(static_cast<CUstream>(stream.handle), turn_words().turn, 0, 0),
                 "cuStreamWriteValue32");
}

void StreamChannel::compute(Stream stream, LayerIndex layer, OpIndex op, const std::byte* x, std::int64_t rows,
                            std::byte* y, bool owned_next) {
  static_cast<void>(mailbox_.kernel(layer, op));  // throws for an unknown op
  const Op& entry = mailbox_.ops()[static_cast<std::size_t>(op)];
  const Request request{layer, op, mailbox_.bucket(layer, rows)};
  const Rank owner = pool_.placement().owner(layer);
  const auto peer = static_cast<std::size_t>(owner);
  const auto world = static_cast<std::size_t>(world_size_);
  const ByteCount in_bytes = static_cast<ByteCount>(rows) * entry.in_row_bytes;
  if (one_by_one_) run_ahead_.begin_layer();
  const ContextScope scope(*device_);
  auto* const on = static_cast<CUstream>(stream.handle);
  const ByteCount out_bytes = static_cast<ByteCount>(request.rows) * entry.out_row_bytes;
  const CUdeviceptr reply = memory_.reply(rank_, owner).device;
  const CUdeviceptr word = memory_.request(owner, rank_).device;
  const bool spun = spins(request.rows);
  const CUdeviceptr epoch = spun ? epoch_word(owner) : 0;
  const CUdeviceptr unanswered = spun ? local_word(3 * world + 2) : 0;
  kernels_.put(on, device_pointer(slot(owner, rank_)), device_pointer(x), in_bytes,
               {.word = word,
                .value = request.word(),
                .finished = local_word(world + peer),
                .block_flags = spun ? memory_.rows_flags(owner, rank_) : 0,
                .epoch = epoch,
                // as the owner knows the bucket only
                .blocks = spun ? Kernels::blocks_for(static_cast<ByteCount>(request.rows) * entry.in_row_bytes) : 0,
                .turn = in_turn_ ? turn_words().turn : 0});
  const RequestWords words{.flag = reply,
                           .request = word,
                           .epoch = epoch,
                           .unanswered = unanswered,
                           .sent_rows = static_cast<std::uint64_t>(rows),
                           .sent_bytes = in_bytes,
                           .counts = local_word(peer),
                           .counts_host = host_.on_device(answers_index(owner)),
                           .failed_host = host_.on_device(index(HostWord::kFailed)),
                           .number = run_ahead_.number(),
                           .answered_host = one_by_one_ ? host_.on_device(index(HostWord::kAnswered)) : 0,
                           .turn = owned_next ? turn_words() : TurnWords{}};
  if (spun)
    kernels_.await(on,
                   {.flags = memory_.reply_flags(rank_, owner),
                    .count = Kernels::blocks_for(out_bytes),
                    .released = reply,
                    .failed = unanswered,
                    .resets = true},
                   y == nullptr ? words : RequestWords{});
  else
    device_->check(device_->api().cuStreamWaitValue32(on, reply, kAnswered, CU_STREAM_WAIT_VALUE_GEQ),
                   "cuStreamWaitValue32");
  if (y != nullptr)
    kernels_.take(on, device_pointer(y), device_pointer(reply_slot(owner)), out_bytes, local_word(2 * world + peer),
                  words);
  if (one_by_one_) run_ahead_.requested();
  in_turn_ = owned_next;
}

bool StreamChannel::claim(Rank owner, Rank requester, std::uint32_t word) const {
  return atomic(memory_.request(owner, requester).host).compare_exchange_strong(word, word & ~Request::kWaiting);
}

void StreamChannel::run() {
  const ContextScope scope(*device_);
  auto last_request = Clock::now();
  while (!stop_.load(std::memory_order_relaxed)) {
    const bool busy = take_requests();
    time_services();
    const auto now = Clock::now();
    if (busy) last_request = now;
    spin_or_nap(now - last_request);
  }
}

bool StreamChannel::take_requests() {
  bool any = false;
  // One look at each rank a round: nobody is served twice while another waits.
  for (Rank requester = 0; requester < world_size_; ++requester) {
    if (requester == rank_) continue;
    const std::uint32_t own = stand_ins_[static_cast<std::size_t>(requester)].exchange(0) & ~Request::kWaiting;
    if (own != 0 && own == atomic(memory_.request(requester, rank_).host).load())  // else answered meanwhile
      stand_in(requester, Request::from(own));
    const std::uint32_t word = atomic(memory_.request(rank_, requester).host).load(std::memory_order_acquire);
    if ((word & Request::kWaiting) == 0) {
      deferred_since_[static_cast<std::size_t>(requester)].reset();
      continue;
    }
    any = true;
    const Request request = Request::from(word);
    if (may_serve(requester, request) && claim(rank_, requester, word)) serve(requester, request);
  }
  return any;
}

bool StreamChannel::may_serve(Rank requester, const Request& request) {
  std::optional<Clock::time_point>& since = deferred_since_[static_cast<std::size_t>(requester)];
  const std::optional<Request>& before = last_served_[static_cast<std::size_t>(requester)];
  const bool begun = before && before->layer == request.layer && before->op < request.op;
  if (!begun && host_.load(index(HostWord::kTurn)) != 0) {
    const auto now = Clock::now();
    if (!since) {
      since = now;
      deferred_.fetch_add(1, std::memory_order_relaxed);
    }
    if (now - *since < std::clamp<Clock::duration>(kPatience * service_time_.mean, kLeastPatience, kMostPatience))
      return false;
  }
  since.reset();
  return true;
}

void StreamChannel::time_services() {
  ServiceTime& time = service_time_;
  if (!time.launch || host_.load(index(HostWord::kServed)) < *time.launch) return;
  time.mean += (Clock::now() - time.start - time.mean) / 4;
  time.launch.reset();
}

void StreamChannel::launch(const GraphOp::Key& key, const Request& request) {
  const std::uint64_t number = launched_ + 1;
  if (!service_time_.launch && host_.load(index(HostWord::kServed)) == launched_) {
    service_time_.launch = number;
    service_time_.start = Clock::now();
  }
  host_.store(index(HostWord::kLaunched), number);  // first: an engine's turn that begins now waits for this answer
  try {
    graph(request).launch(key, service_stream_.get());
  } catch (...) {
    host_.store(index(HostWord::kLaunched), launched_);
    if (service_time_.launch == number) service_time_.launch.reset();
    throw;
  }
  launched_ = number;
}

void StreamChannel::serve(Rank requester, const Request& request) {
  if (options_.service.test_delay_us > 0)
    std::this_thread::sleep_for(std::chrono::microseconds(options_.service.test_delay_us));
  const TraceSpan span = service_span(TraceEvent::Kind::kService, requester, request);
  last_served_[static_cast<std::size_t>(requester)] = request;
  auto& served = served_by_peer_[static_cast<std::size_t>(requester)];
  const auto rows = static_cast<std::uint64_t>(request.rows);
  // Counted first: the requester may have its answer before the launch returns.
  served.fetch_add(1, std::memory_order_relaxed);
  served_rows_.fetch_add(rows, std::memory_order_relaxed);
  launch_for_[static_cast<std::size_t>(requester)].store(launched_ + 1, std::memory_order_relaxed);
  try {
    launch({rank_, requester, request.rows}, request);
  } catch (const std::exception& error) {
    served.fetch_sub(1, std::memory_order_relaxed);
    served_rows_.fetch_sub(rows, std::memory_order_relaxed);
    launch_for_[static_cast<std::size_t>(requester)].store(0, std::memory_order_relaxed);
    served_failed_.fetch_add(1, std::memory_order_relaxed);
    record({ErrorCode::kRemoteOp,
            "rank " + std::to_string(rank_) + " could not launch an op for rank " + std::to_string(requester) + ": " +
                error.what(),
            {.rank = rank_, .peer = requester, .layer = request.layer}});
    not_answered(requester, rank_);
  }
}

TraceSpan StreamChannel::service_span(TraceEvent::Kind kind, Rank peer, const Request& request) const {
  Tracer& tracer = pool_.backend().tracer();
  return {tracer,
          tracer.session(),
          {.kind = kind,
           .track = TraceEvent::Track::kService,
           .layer = request.layer,
           .op = request.op,
           .peer = peer,
           .rows = request.rows},
          TraceSpan::Time::kBoth,
          {service_stream_.get()}};
}

RequesterStats StreamChannel::requester_stats() const {
  RequesterStats stats;
  for (Rank owner = 0; owner < world_size_; ++owner) {
    stats.requests_by_peer.push_back(host_.load(answers_index(owner)));
    stats.rows_sent += host_.load(answers_index(owner) + 1);
    stats.bytes_sent += host_.load(answers_index(owner) + 2);
  }
  stats.wait_ns = run_ahead_.waited_ns();
  stats.fallbacks = stood_in_.load(std::memory_order_relaxed);
  return stats;
}

ServiceStats StreamChannel::service_stats() const {
  ServiceStats stats;
  for (const auto& served : served_by_peer_) stats.served_by_peer.push_back(served.load(std::memory_order_relaxed));
  stats.failed = served_failed_.load(std::memory_order_relaxed);
  stats.rows = served_rows_.load(std::memory_order_relaxed);
  stats.deferred = deferred_.load(std::memory_order_relaxed);
  return stats;
}

}  // namespace sidp::nvshmem
