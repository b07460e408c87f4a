#include "sidp/runtime.hpp"

#include <algorithm>
#include <string>

#include "collective.hpp"
#include "sidp/error.hpp"

namespace sidp {

namespace {

ActivationChannel::Requests requests_of(StepKind kind, Mode mode) {
  using Requests = ActivationChannel::Requests;
  if (kind == StepKind::kCapture) return Requests::kCaptured;
  if (kind == StepKind::kReplay) return mode == Mode::kCas ? Requests::kReplayed : Requests::kReplayedNone;
  return mode == Mode::kCas ? Requests::kOneByOne : Requests::kNone;
}

}  // namespace

// One load where no trace runs.
inline Tracer::Session Runtime::trace_session() const {
  const Tracer::Session session = tracer_.session();
  return session != 0 && kind_ == StepKind::kCapture ? 0 : session;
}

Runtime::Runtime(std::shared_ptr<WeightPool> pool, std::vector<Op> ops, RuntimeOptions options)
    : pool_(std::move(pool)), options_(std::move(options)), tracer_(pool_->backend().tracer()) {
  if (options_.deadline.count() < 1)
    throw Error(ErrorCode::kConfig, "the deadline is " + std::to_string(options_.deadline.count()) + " ms");
  const Placement& placement = pool_->placement();
  use_spans_ = std::vector<std::optional<TraceSpan>>(static_cast<std::size_t>(placement.num_layers()));
  const Rank rank = pool_->backend().rank();
  for (LayerIndex layer = 0; layer < placement.num_layers(); ++layer) {
    shape_.total_bytes += placement.layer_bytes(layer);
    if (placement.is_local(rank, layer)) continue;
    shape_.streamed_bytes += placement.layer_bytes(layer);
    ++shape_.streamed_layers;
    const Rank owner = placement.owner(layer);
    if (std::find(owners_.begin(), owners_.end(), owner) == owners_.end()) owners_.push_back(owner);
  }
  shape_.resident_bytes = placement.resident_bytes();
  shape_.ops_per_layer = options_.ops_per_layer;
  shape_.row_bytes = options_.row_bytes;
  shape_.element_bytes = options_.element_bytes;
  shape_.world_size = placement.world_size();
  if (options_.policy.fixed == Mode::kCas && ops.empty() && placement.world_size() > 1)
    throw Error(ErrorCode::kConfig, "mode CaS needs ops: declare what the owner of a layer shall compute");
  check_policy(shape_, options_.profile, options_.policy);  // before anything is made
  for (const auto& [size, mode] : options_.policy.fixed_sizes)
    if (mode == Mode::kCas && size > options_.max_rows && placement.world_size() > 1)
      throw Error(ErrorCode::kConfig, "batch size " + std::to_string(size) + " is fixed to CaS, but a request holds " +
                                          std::to_string(options_.max_rows) + " rows; raise max_rows or fix WaS");
  pool_->check_unclaimed();
  // A rank without ops makes no mailbox and would leave the others waiting for it there.
  check_same_on_all_ranks(pool_->backend().bootstrap(), rank, "number of ops",
                          std::to_string(ops.size()) + " (spin_rows " + std::to_string(options_.spin_rows) +
                              ", exclusive_links " + std::to_string(options_.lane.exclusive_links ? 1 : 0) + ")");
  if (!ops.empty()) {
    mailbox_ = std::make_unique<Mailbox>(*pool_, std::move(ops), options_.max_rows, options_.row_buckets);
    const ChannelOptions channel{options_.deadline, options_.service, options_.spin_rows};
    channel_ = pool_->backend().make_channel(*pool_, *mailbox_, channel);
    if (!channel_) channel_ = std::make_unique<FlagChannel>(*pool_, *mailbox_, channel);
  }
  timer_ = pool_->backend().make_step_timer();
  prefetcher_ = std::make_unique<Prefetcher>(*pool_, options_.deadline, options_.lane);
  pool_->claim();
  if (channel_ && !options_.deferred_start) channel_->start();
}

void Runtime::start(const std::string& failure) {
  check_open();
  if (!options_.deferred_start) throw Error(ErrorCode::kUsage, "nothing was deferred to start()");
  Backend& backend = pool_->backend();
  all_or_none(backend.bootstrap(), backend.rank(), "start", [&] {
    if (!failure.empty()) throw Error(ErrorCode::kUnsupported, failure, {.rank = backend.rank()});
  });
  if (channel_) channel_->start();
}

Runtime::~Runtime() { close(); }

bool Runtime::close() noexcept {
  if (closed_) return idle_;
  closed_ = true;
  Backend& backend = pool_->backend();
  if (in_step_ && kind_ != StepKind::kCapture) backend.mark_step_end(stream_);
  end_step_span(/*broken_off=*/true);
  // Lane and service go on until no stream waits for them.
  idle_ = backend.wait_step_end(2 * options_.deadline);
  if (!idle_ && channel_) {
    channel_->give_up();
    idle_ = backend.wait_step_end(options_.deadline);
  }
  if (channel_ && !channel_->stop()) idle_ = false;
  backend.leave();
  if (!prefetcher_->stop()) idle_ = false;
  if (!idle_) backend.keep_memory();
  return idle_;
}

void Runtime::check_open() const {
  if (closed_) throw Error(ErrorCode::kClosed, "the runtime is closed", {.rank = pool_->backend().rank()});
}

inline void Runtime::check_in_step(const char* call) const {
  check_open();
  if (!in_step_)
    throw Error(ErrorCode::kUsage, std::string(call) + " outside a step; open one with step()",
                {.rank = pool_->backend().rank()});
}

inline void Runtime::check_stream(const char* call, Stream stream) const {
  if (stream.handle != stream_.handle)
    throw Error(ErrorCode::kUsage,
                std::string(call) +
                    " on another stream than its step's; a step runs on one stream, so pass the one "
                    "that it was begun with",
                {.rank = pool_->backend().rank()});
}

void Runtime::check() const {
  check_open();
  if (channel_) channel_->check();
}

std::optional<Rank> Runtime::unavailable_peer() const {
  for (const Rank owner : owners_)
    if (!(channel_ ? channel_->available(owner) : pool_->backend().alive(owner))) return owner;
  return std::nullopt;
}

StepTimes Runtime::predict(std::int64_t num_tokens) const {
  return predict_step(static_cast<double>(num_tokens), options_.profile, shape_);
}

Decision Runtime::preview(std::int64_t num_tokens) const {
  if (num_tokens < 1)
    throw Error(ErrorCode::kConfig, "num_tokens is " + std::to_string(num_tokens) + ", must be at least 1");
  PolicySnapshot snapshot{.num_tokens = num_tokens,
                          .max_rows = mailbox_ ? mailbox_->max_rows() : 0,
                          .unavailable_peer = unavailable_peer()};
  history_.fill(snapshot);
  return decide(snapshot, shape_, options_.profile, options_.policy);
}

// Times that have arrived since, of steps that may have ended long ago.
void Runtime::take_times() {
  while (!untaken_.empty()) {
    const std::optional<double> ms = timer_->take();
    if (!ms) return;
    const auto [mode, num_tokens] = untaken_.front();
    untaken_.pop_front();
    const StepTimes times = predict(num_tokens);
    history_.timed(mode, num_tokens, 1e3 * (mode == Mode::kWas ? times.was_s : times.cas_s), *ms);
  }
}

Decision Runtime::begin_step(Stream stream, std::int64_t num_tokens, StepKind kind, std::optional<Mode> mode) {
  check_open();
  if (in_step_)
    throw Error(ErrorCode::kUsage, "a step is open already; steps do not nest", {.rank = pool_->backend().rank()});
  if (lane_failed_)
    throw Error(ErrorCode::kUsage,
                "an earlier fetch outlived its deadline and the ring is no longer in order; close this runtime",
                {.rank = pool_->backend().rank()});
  if (kind != StepKind::kRun && !pool_->backend().capabilities().stream_ordered)
    throw Error(ErrorCode::kUnsupported,
                "backend '" + pool_->backend().capabilities().name + "' has no graphs to capture or replay");
  check();
  if (kind != StepKind::kCapture) take_times();  // a capture forbids to ask for events
  decision_ = preview(num_tokens);
  if (mode) decision_ = {.mode = *mode, .reason = Reason::kFixed, .num_tokens = num_tokens};
  if (kind != StepKind::kCapture) pool_->backend().follow_step_end(stream);
  if (channel_) channel_->begin_step(requests_of(kind, decision_.mode));
  kind_ = kind;
  stream_ = stream;
  launched_ = false;
  in_step_ = true;
  step_tokens_ = num_tokens;
  timing_ = kind != StepKind::kCapture && history_.wants(decision_.mode, num_tokens) && timer_->begin(stream);
  prefetcher_->begin_step(kind == StepKind::kCapture);
  step_span_.emplace(tracer_, trace_session(),
                     TraceEvent{.mode = decision_.mode, .reason = decision_.reason, .rows = num_tokens},
                     TraceSpan::Time::kBoth, stream);
  return decision_;
}

void Runtime::check_launch() const {
  check_in_step("a launch");
  if (kind_ != StepKind::kReplay || launched_)
    throw Error(ErrorCode::kUsage,
                launched_ ? "a replay step launches its graph once" : "only a replay step launches a graph",
                {.rank = pool_->backend().rank()});
}

void Runtime::launched() {
  check_launch();
  launched_ = true;
  if (decision_.mode == Mode::kWas) prefetcher_->replayed_step();
}

void Runtime::end_step(bool broken_off) {
  check_in_step("end_step");
  in_step_ = false;
  if (kind_ == StepKind::kCapture) {
    const bool whole = decision_.mode == Mode::kCas || prefetcher_->step_complete();
    prefetcher_->forget_step();
    end_step_span(broken_off);
    end_turn(broken_off);
    if (!broken_off && !whole)
      throw Error(
          ErrorCode::kUsage,
          "the capture ended before every streamed layer was fetched and released; a replay of this graph would "
          "put the ring out of order, so discard it",
          {.rank = pool_->backend().rank()});
    return;
  }
  struct MarkEnd {  // however the step ends
    Runtime& runtime;
    bool broken_off;
    ~MarkEnd() {
      runtime.end_step_span(broken_off);
      if (runtime.timing_) runtime.timer_->drop();
      runtime.timing_ = false;
      runtime.pool_->backend().mark_step_end(runtime.stream_);
    }
  } mark{*this, broken_off};
  end_turn(broken_off);
  ++stats_.decisions[static_cast<std::size_t>(decision_.reason)];
  stats_.last_decision = decision_;
  const bool not_launched = kind_ == StepKind::kReplay && !launched_;  // so nothing was consumed either
  const bool skipped = decision_.mode == Mode::kWas && !lane_failed_ && !not_launched && !prefetcher_->step_complete();
  if (skipped) {
    lane_failed_ = true;  // stays so if the drain outlives its deadline: the ring is then out of order
    prefetcher_->drain_step(stream_);
    lane_failed_ = false;
  }
  if (broken_off || skipped || not_launched || lane_failed_) {
    ++stats_.steps_broken_off;
    mark.broken_off = true;
    if (!broken_off && not_launched)
      throw Error(ErrorCode::kUsage, "the replay step ended without its graph having been launched; see replay()",
                  {.rank = pool_->backend().rank()});
    if (!broken_off && skipped)
      throw Error(ErrorCode::kUsage,
                  "the step ended before every streamed layer was fetched and released; the rest was skipped",
                  {.rank = pool_->backend().rank()});
    return;
  }
  ++stats_.steps[index(decision_.mode)];
  stats_.tokens[index(decision_.mode)] += static_cast<std::uint64_t>(step_tokens_);
  history_.ran(decision_);
  if (!timing_) return;
  timing_ = false;
  timer_->end(stream_);
  untaken_.push_back({decision_.mode, step_tokens_});
  if (!pool_->backend().capabilities().stream_ordered) take_times();
}

inline const std::byte* Runtime::fetch(Stream stream, LayerIndex layer) {
  if (pool_->is_local(layer)) {
    if (takes_turns()) channel_->begin_turn(stream, layer);
    return pool_->local_layer(layer);
  }
  if (decision_.mode != Mode::kWas)
    throw Error(ErrorCode::kUsage,
                "fetch_layer of streamed layer " + std::to_string(layer) +
                    " in a CaS step; use remote_compute, the mode is fixed when a step begins",
                {.rank = pool_->backend().rank(), .layer = layer});
  try {
    return prefetcher_->fetch(stream, layer);
  } catch (const Error& error) {
    lane_failed_ = lane_failed_ || error.code() == ErrorCode::kDeadline;
    throw;
  }
}

const std::byte* Runtime::fetch_layer(Stream stream, LayerIndex layer) {
  check_in_step("fetch_layer");
  check_stream("fetch_layer", stream);
  const Tracer::Session session = trace_session();
  if (session == 0) [[likely]]
    return fetch(stream, layer);
  TraceSpan span(tracer_, session, {.kind = TraceEvent::Kind::kFetch, .layer = layer});
  const std::byte* const bytes = fetch(stream, layer);
  span.close();
  use_spans_[static_cast<std::size_t>(layer)].emplace(
      tracer_, session, TraceEvent{.kind = TraceEvent::Kind::kUse, .layer = layer}, TraceSpan::Time::kStream, stream);
  return bytes;
}

void Runtime::release_layer(Stream stream, LayerIndex layer) {
  check_in_step("release_layer");
  check_stream("release_layer", stream);
  const Tracer::Session session = trace_session();
  const bool local = pool_->is_local(layer);  // throws for no layer
  if (session != 0) [[unlikely]]
    use_spans_[static_cast<std::size_t>(layer)].reset();
  const TraceSpan span(tracer_, session, {.kind = TraceEvent::Kind::kRelease, .layer = layer});
  if (!local)
    prefetcher_->release(stream, layer);
  else if (takes_turns())
    channel_->end_turn(stream);
}

void Runtime::remote_compute(Stream stream, LayerIndex layer, OpIndex op, const std::byte* x, std::int64_t rows,
                             std::byte* y) {
  check_in_step("remote_compute");
  check_stream("remote_compute", stream);
  if (!channel_) throw Error(ErrorCode::kUnknownName, "no ops were declared when this runtime was made");
  if (pool_->is_local(layer))
    throw Error(ErrorCode::kUsage, "layer " + std::to_string(layer) + " is local; fetch it and compute here",
                {.rank = pool_->backend().rank(), .layer = layer});
  if (decision_.mode != Mode::kCas)
    throw Error(ErrorCode::kUsage,
                "remote_compute of layer " + std::to_string(layer) +
                    " in a WaS step; use fetch_layer, the mode is fixed when a step begins",
                {.rank = pool_->backend().rank(), .layer = layer});
  if (y == nullptr && lent(layer, rows) == nullptr)
    throw Error(ErrorCode::kUsage,
                "an answer of " + std::to_string(rows) + " rows is always copied here; give room for it",
                {.rank = pool_->backend().rank(), .layer = layer});
  const Tracer::Session session = trace_session();
  const TraceSpan span(tracer_, session, session == 0 ? TraceEvent{} : request_event(layer, op, rows),
                       TraceSpan::Time::kBoth, stream);
  channel_->compute(stream, layer, op, x, rows, y, owned_comes_after(layer, op));
}

// Ops of a layer are asked for in the order in which they were declared.
bool Runtime::owned_comes_after(LayerIndex layer, OpIndex op) const {
  static_cast<void>(mailbox_->kernel(layer, op));  // throws for an unknown op
  if (layer + 1 == pool_->placement().num_layers() || !pool_->owns(layer + 1)) return false;
  const std::vector<Op>& ops = mailbox_->ops();
  return std::none_of(ops.begin() + op + 1, ops.end(),
                      [&](const Op& later) { return later.kernels[static_cast<std::size_t>(layer)] != nullptr; });
}

// What broke a step off, a capture that became invalid among it, is what its caller shall hear of.
void Runtime::end_turn(bool broken_off) {
  if (!takes_turns()) return;
  try {
    channel_->end_turn(stream_);
  } catch (const Error&) {
    if (!broken_off) throw;
  }
}

TraceEvent Runtime::request_event(LayerIndex layer, OpIndex op, std::int64_t rows) const {
  static_cast<void>(mailbox_->kernel(layer, op));  // throws for an unknown op
  return {.kind = TraceEvent::Kind::kRequest,
          .layer = layer,
          .op = op,
          .peer = pool_->placement().owner(layer),
          .rows = rows,
          .bytes = static_cast<ByteCount>(rows) * mailbox_->ops()[static_cast<std::size_t>(op)].in_row_bytes};
}

void Runtime::end_step_span(bool broken_off) noexcept {
  if (!step_span_ || !step_span_->recorded()) return;
  for (auto& span : use_spans_) span.reset();  // of layers that were not released
  step_span_->set_broken_off(broken_off);
  step_span_.reset();
}

void Runtime::start_trace(std::size_t num_events) {
  check_open();
  Backend& backend = pool_->backend();
  if (in_step_)
    throw Error(ErrorCode::kUsage, "a trace starts between steps; end the open one first", {.rank = backend.rank()});
  if (!backend.wait_step_end(options_.deadline))
    throw Error(ErrorCode::kDeadline,
                "the last step did not come to its end on its stream within " +
                    std::to_string(options_.deadline.count()) + " ms, so no trace was started",
                {.rank = backend.rank(), .waited_ms = options_.deadline.count()});
  tracer_.start(num_events, backend.make_stream_clock(2 * num_events));
}

Trace Runtime::stop_trace() {
  end_step_span(/*broken_off=*/true);  // of a step that is open: it goes on, and its rest is not in the trace
  return tracer_.stop(options_.deadline);
}

RuntimeStats Runtime::stats() const {
  RuntimeStats stats = stats_;
  stats.prefetcher = prefetcher_->stats();
  stats.step_times = history_.entries();
  stats.mode_changes = history_.changes();
  if (channel_) {
    stats.requester = channel_->requester_stats();
    stats.service = channel_->service_stats();
  }
  const auto world_size = static_cast<std::size_t>(pool_->placement().world_size());
  stats.requester.requests_by_peer.resize(world_size, 0);
  stats.service.served_by_peer.resize(world_size, 0);
  return stats;
}

}  // namespace sidp
