#include "host_backend.hpp"

#include <pthread.h>

#include <cstring>
#include <stdexcept>

#include "core/collective.hpp"
#include "lane.hpp"
#include "sidp/error.hpp"

namespace sidp::host {

namespace {

constexpr Milliseconds kPeerCheck{5};   // how soon a waiter notices that its peer died
constexpr Milliseconds kStopCheck{50};  // how soon a lane notices that it shall stop
constexpr const char* kLabels[] = {"control", "pool", "mailbox"};

class HostSymmetricBuffer final : public SymmetricBuffer {
 public:
  HostSymmetricBuffer(Rank rank, std::vector<std::unique_ptr<SharedSegment>> segments)
      : rank_(rank), segments_(std::move(segments)) {}
  [[nodiscard]] std::byte* local() const override { return peer(rank_); }
  [[nodiscard]] std::byte* peer(Rank rank) const override {
    const auto& segment = segments_[static_cast<std::size_t>(rank)];
    return segment ? segment->data() : nullptr;
  }
  [[nodiscard]] ByteCount bytes(Rank rank) const override {
    const auto& segment = segments_[static_cast<std::size_t>(rank)];
    return segment ? segment->bytes() : 0;
  }

 private:
  Rank rank_;
  std::vector<std::unique_ptr<SharedSegment>> segments_;  // by rank; null where the rank holds nothing
};

// Collective: every rank makes its own segment, maps those of the others, and removes the names.
std::vector<std::unique_ptr<SharedSegment>> exchange(Backend& backend, const std::string& token,
                                                     std::span<const ByteCount> bytes_by_rank, const std::string& label,
                                                     bool writable) {
  const Rank me = backend.rank();
  const std::string my_name = SharedSegment::name(token, me, label);
  std::vector<std::unique_ptr<SharedSegment>> segments(bytes_by_rank.size());
  const auto mine = static_cast<std::size_t>(me);
  try {
    all_or_none(backend.bootstrap(), me, label + " created", [&] {
      if (bytes_by_rank[mine] > 0) segments[mine] = SharedSegment::create(my_name, bytes_by_rank[mine]);
      if (segments[mine] && label == "control") segments[mine]->hold_life();
    });
    all_or_none(backend.bootstrap(), me, label + " mapped", [&] {
      for (std::size_t r = 0; r < bytes_by_rank.size(); ++r)
        if (r != mine && bytes_by_rank[r] > 0)
          segments[r] = SharedSegment::attach(SharedSegment::name(token, static_cast<Rank>(r), label), bytes_by_rank[r],
                                              writable);
    });
  } catch (...) {
    // A peer that died cannot remove its own; whoever fails removes all.
    unlink_segments(token, backend.world_size());
    throw;
  }
  // Everybody's, not only its own: a rank that dies right here cannot. All are mapped, and a name is only made again
  // after another collective.
  for (Rank rank = 0; rank < backend.world_size(); ++rank)
    SharedSegment::unlink(SharedSegment::name(token, rank, label));
  return segments;
}

}  // namespace

void unlink_segments(const std::string& token, Rank world_size) noexcept {
  for (Rank rank = 0; rank < world_size; ++rank)
    for (const char* label : kLabels) SharedSegment::unlink(SharedSegment::name(token, rank, label));
}

HostBackend::HostBackend(HostOptions options, std::shared_ptr<Bootstrap> bootstrap)
    : options_(std::move(options)), bootstrap_(std::move(bootstrap)) {
  if (options_.world_size < 1 || options_.rank < 0 || options_.rank >= options_.world_size)
    throw Error(ErrorCode::kConfig,
                "rank " + std::to_string(options_.rank) + " of world_size " + std::to_string(options_.world_size),
                {.rank = options_.rank});
  if (options_.token.size() < 32 || options_.token.find_first_not_of("0123456789abcdef") != std::string::npos)
    throw Error(ErrorCode::kConfig, "the group token must be at least 32 hex digits (128 random bits)");
}

HostBackend::~HostBackend() { leave(); }

void HostBackend::create_flags(std::uint32_t num_flags) {
  if (!control_.empty()) throw Error(ErrorCode::kUsage, "flags exist already", {.rank = options_.rank});
  const std::vector<ByteCount> bytes(static_cast<std::size_t>(options_.world_size), (num_flags + 1) * sizeof(Flag));
  control_ = exchange(*this, options_.token, bytes, "control", /*writable=*/true);
  num_flags_ = num_flags;
}

std::unique_ptr<SymmetricBuffer> HostBackend::allocate_symmetric(std::span<const ByteCount> bytes_by_rank,
                                                                 const std::string& label, bool peer_writable) {
  return std::make_unique<HostSymmetricBuffer>(options_.rank,
                                               exchange(*this, options_.token, bytes_by_rank, label, peer_writable));
}

std::unique_ptr<LocalBuffer> HostBackend::allocate_local(ByteCount bytes, const std::string& label) {
  return allocate_unnamed(bytes, options_.token + "-" + label);
}

std::unique_ptr<Lane> HostBackend::make_lane(std::vector<LaneOp> program, const LaneOptions& options) {
  return std::make_unique<HostLane>(*this, std::move(program), options);
}

std::thread HostBackend::start_thread(const std::string& name, std::function<void()> body) {
  return std::thread([name, body = std::move(body)] {
    ::pthread_setname_np(::pthread_self(), name.substr(0, 15).c_str());
    body();
  });
}

bool HostBackend::alive(Rank rank) const {
  if (rank == options_.rank || control_.empty()) return true;
  return control_[static_cast<std::size_t>(rank)]->life_held();
}

void HostBackend::leave() noexcept {
  if (!control_.empty()) control_[static_cast<std::size_t>(options_.rank)]->release_life();
}

void HostBackend::keep_control() noexcept {
  leave();
  for (auto& segment : control_) static_cast<void>(segment.release());
  control_.clear();
}

Flag& HostBackend::bell(Rank rank) const {
  return *reinterpret_cast<Flag*>(control_[static_cast<std::size_t>(rank)]->data());
}

Flag& HostBackend::flag(FlagRef ref) const { return (&bell(ref.rank))[1 + ref.index]; }

WaitResult HostBackend::wait(Stream, std::uint32_t index, FlagValue expected, const WaitOptions& options) {
  const auto ended = [&] {
    if (options.stop != nullptr && options.stop->load()) return WaitResult::kStopped;
    if (options.peer >= 0 && !alive(options.peer)) return WaitResult::kPeerDead;
    return WaitResult::kReady;
  };
  const Milliseconds slice = options.peer >= 0 ? kPeerCheck : kStopCheck;
  return wait_until(
      flag({options_.rank, index}), [&](std::uint32_t value) { return value == expected; }, options.deadline, slice,
      ended);
}

void HostBackend::signal(Stream, FlagRef ref, FlagValue value) {
  store_and_wake(flag(ref), value);
  if (ref.rank != options_.rank) add_and_wake(bell(ref.rank));
}

void HostBackend::put(Stream, const SymmetricBuffer& buffer, Rank peer, ByteCount offset, const void* src,
                      ByteCount bytes) {
  std::memcpy(buffer.peer(peer) + offset, src, bytes);
}

void HostBackend::copy(Stream, void* dst, const void* src, ByteCount bytes) { std::memcpy(dst, src, bytes); }

std::optional<FlagValue> HostBackend::peek(std::uint32_t index) const {
  return flag({options_.rank, index}).value.load(std::memory_order_relaxed);
}

bool HostBackend::wait_any_full(std::uint32_t first, std::uint32_t count, Milliseconds timeout,
                                const std::atomic<bool>& stop) {
  const auto any_full = [&] {
    for (std::uint32_t i = first; i < first + count; ++i)
      if (flag({options_.rank, i}).value.load(std::memory_order_acquire) == kFull) return true;
    return false;
  };
  // The bell is read before the flags: a signal in between changes it, and the sleep ends at once.
  const auto start = Clock::now();
  for (;;) {
    const std::uint32_t rung = bell(options_.rank).value.load(std::memory_order_acquire);
    if (any_full()) return true;
    const auto left = std::chrono::duration_cast<Milliseconds>(timeout - (Clock::now() - start));
    if (stop.load() || left.count() <= 0) return false;
    wait_until(
        bell(options_.rank), [&](std::uint32_t value) { return value != rung; }, left, left,
        [] { return WaitResult::kReady; });
  }
}

void HostBackend::interrupt() noexcept {
  if (control_.empty()) return;
  add_and_wake(bell(options_.rank));
  for (std::uint32_t i = 0; i < num_flags_; ++i) wake(flag({options_.rank, i}));
}

}  // namespace sidp::host
