#include "sim_backend.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "sidp/error.hpp"

namespace sidp::test {

namespace {

constexpr ByteCount kGuardBytes = 4096;  // behind every piece of memory; found changed, somebody wrote past the end
constexpr auto kGuard = std::byte{0xA5};
constexpr Milliseconds kSetUpDeadline{30000};
constexpr Milliseconds kForever{std::chrono::hours(24)};  // a wait longer than this is one without a deadline

std::size_t at(Rank rank) { return static_cast<std::size_t>(rank); }

bool guard_intact(const std::vector<std::byte>& memory) {
  return std::all_of(memory.end() - kGuardBytes, memory.end(), [](std::byte value) { return value == kGuard; });
}

class SimBootstrap final : public Bootstrap {
 public:
  SimBootstrap(SimWorld& world, Rank rank) : world_(world), rank_(rank) {}

  std::vector<std::string> all_gather(const std::string& key, const std::string& payload) override {
    world_.scheduler.yield("all_gather");
    auto& all = world_.gathered[key];
    all.resize(at(world_.world_size));
    if (all[at(rank_)]) world_.scheduler.fail("key '" + key + "' was used twice");
    all[at(rank_)] = payload;
    const auto complete = [&all] {
      return std::all_of(all.begin(), all.end(), [](const auto& p) { return p.has_value(); });
    };
    if (!world_.scheduler.block("all_gather", complete, kSetUpDeadline.count())) {
      std::string missing;
      for (std::size_t r = 0; r < all.size(); ++r)
        if (!all[r]) missing += " " + std::to_string(r);
      throw Error(ErrorCode::kDeadline, "ranks did not come to '" + key + "':" + missing, {.rank = rank_});
    }
    std::vector<std::string> payloads;
    for (const auto& item : all) payloads.push_back(*item);
    return payloads;
  }

 private:
  SimWorld& world_;
  Rank rank_;
};

class SimSymmetricBuffer final : public SymmetricBuffer {
 public:
  using Pieces = std::vector<std::shared_ptr<std::vector<std::byte>>>;
  SimSymmetricBuffer(Scheduler& scheduler, Rank rank, Pieces pieces, bool writable)
      : scheduler_(scheduler), rank_(rank), pieces_(std::move(pieces)), writable_(writable) {}
  ~SimSymmetricBuffer() override {
    for (const auto& piece : pieces_)
      if (!guard_intact(*piece)) scheduler_.fail("a rank wrote past the end of a symmetric buffer");
  }
  [[nodiscard]] std::byte* local() const override { return peer(rank_); }
  [[nodiscard]] std::byte* peer(Rank rank) const override { return pieces_[at(rank)]->data(); }
  [[nodiscard]] ByteCount bytes(Rank rank) const override { return pieces_[at(rank)]->size() - kGuardBytes; }
  [[nodiscard]] bool writable() const { return writable_; }

 private:
  Scheduler& scheduler_;
  Rank rank_;
  Pieces pieces_;
  bool writable_;
};

class SimLocalBuffer final : public LocalBuffer {
 public:
  SimLocalBuffer(Scheduler& scheduler, ByteCount bytes) : scheduler_(scheduler), memory_(bytes + kGuardBytes, kGuard) {}
  ~SimLocalBuffer() override {
    if (!guard_intact(memory_)) scheduler_.fail("a rank wrote past the end of a local buffer");
  }
  [[nodiscard]] std::byte* data() const override { return memory_.data(); }
  [[nodiscard]] ByteCount bytes() const override { return memory_.size() - kGuardBytes; }

 private:
  Scheduler& scheduler_;
  mutable std::vector<std::byte> memory_;
};

class SimLane final : public Lane {
 public:
  SimLane(Scheduler& scheduler, Backend& backend, std::vector<LaneOp> program)
      : scheduler_(scheduler), backend_(backend), program_(std::move(program)) {
    stats_.bytes_by_peer.resize(at(backend.world_size()));
    thread_ = scheduler_.start(backend.rank(), ThreadKind::kLane, [this] { run(); });
  }
  ~SimLane() override { stop(); }
  bool stop() noexcept override {
    stop_.store(true);
    const Rank rank = backend_.rank();
    const auto ended = [this, rank] { return scheduler_.finished(rank, ThreadKind::kLane); };
    scheduler_.block("stop lane", ended, -1, /*quiet=*/true);
    if (thread_.joinable()) thread_.join();
    return true;
  }
  [[nodiscard]] LaneStats stats() const override { return stats_; }

 private:
  void run() {
    while (!stop_.load()) {
      for (const LaneOp& op : program_) {
        if (stop_.load()) return;
        switch (op.kind) {
          case LaneOp::Kind::kWait:
            if (backend_.wait({}, op.flag, op.value, {.deadline = kForever, .stop = &stop_}) != WaitResult::kReady)
              return;
            break;
          case LaneOp::Kind::kCopy:
            backend_.copy({}, op.dst, op.src, op.bytes);
            ++stats_.copies;
            stats_.bytes_by_peer[at(op.peer)] += op.bytes;
            break;
          case LaneOp::Kind::kGet:
            break;  // never asked for: every peer is mapped
          case LaneOp::Kind::kSignal:
            backend_.signal({}, {backend_.rank(), op.flag}, op.value);
            break;
        }
      }
    }
  }

  Scheduler& scheduler_;
  Backend& backend_;
  std::vector<LaneOp> program_;
  std::atomic<bool> stop_{false};
  LaneStats stats_;  // one thread runs at a time
  std::thread thread_;
};

class SimBackend final : public Backend {
 public:
  SimBackend(SimWorld& world, Rank rank)
      : world_(world), scheduler_(world.scheduler), rank_(rank), bootstrap_(world, rank) {}

  [[nodiscard]] Rank rank() const override { return rank_; }
  [[nodiscard]] Rank world_size() const override { return world_.world_size; }
  [[nodiscard]] const Capabilities& capabilities() const override { return capabilities_; }
  [[nodiscard]] Bootstrap& bootstrap() override { return bootstrap_; }

  void create_flags(std::uint32_t num_flags) override {
    world_.flags[at(rank_)].assign(num_flags, kEmpty);
    bootstrap_.all_gather("flags", "");
  }
  std::unique_ptr<SymmetricBuffer> allocate_symmetric(std::span<const ByteCount> bytes_by_rank,
                                                      const std::string& label, bool peer_writable) override {
    world_.pieces[label].resize(bytes_by_rank.size());
    world_.pieces[label][at(rank_)] =
        std::make_shared<std::vector<std::byte>>(bytes_by_rank[at(rank_)] + kGuardBytes, kGuard);
    bootstrap_.all_gather(label, "");
    return std::make_unique<SimSymmetricBuffer>(scheduler_, rank_, world_.pieces[label], peer_writable);
  }
  std::unique_ptr<LocalBuffer> allocate_local(ByteCount bytes, const std::string&) override {
    return std::make_unique<SimLocalBuffer>(scheduler_, bytes);
  }
  std::unique_ptr<Lane> make_lane(std::vector<LaneOp> program, const LaneOptions&) override {
    return std::make_unique<SimLane>(scheduler_, *this, std::move(program));
  }
  std::thread start_thread(const std::string&, std::function<void()> body) override {
    return scheduler_.start(rank_, ThreadKind::kService, std::move(body));
  }
  [[nodiscard]] bool alive(Rank rank) const override {
    scheduler_.yield("alive");
    return answers(rank);
  }
  void leave() noexcept override {
    scheduler_.yield("leave", /*quiet=*/true);
    world_.left[at(rank_)] = true;
  }

  WaitResult wait(Stream, std::uint32_t flag, FlagValue expected, const WaitOptions& options) override {
    const FlagValue& value = world_.flags[at(rank_)].at(flag);
    const auto ended = [&] {
      return value == expected || (options.stop != nullptr && options.stop->load()) ||
             (options.peer >= 0 && !answers(options.peer));
    };
    if (options.deadline.count() <= 0)
      scheduler_.yield("look at flag");
    else
      scheduler_.block("wait", ended, options.deadline < kForever ? options.deadline.count() : -1);
    if (value == expected) return WaitResult::kReady;  // the value wins
    if (options.stop != nullptr && options.stop->load()) return WaitResult::kStopped;
    return options.peer >= 0 && !answers(options.peer) ? WaitResult::kPeerDead : WaitResult::kDeadline;
  }
  void signal(Stream, FlagRef flag, FlagValue value) override {
    scheduler_.yield("signal");
    world_.flags[at(flag.rank)].at(flag.index) = value;
  }
  void put(Stream stream, const SymmetricBuffer& buffer, Rank peer, ByteCount offset, const void* src,
           ByteCount bytes) override {
    if (!dynamic_cast<const SimSymmetricBuffer&>(buffer).writable() || offset + bytes > buffer.bytes(peer))
      scheduler_.fail("put of " + std::to_string(bytes) + " bytes at " + std::to_string(offset) + " is not allowed");
    copy(stream, buffer.peer(peer) + offset, src, bytes);
  }
  // In two halves, so that whoever looks too early sees a torn copy.
  void copy(Stream, void* dst, const void* src, ByteCount bytes) override {
    const ByteCount half = bytes / 2;
    scheduler_.yield("copy");
    std::memcpy(dst, src, half);
    scheduler_.yield("copy, second half");
    std::memcpy(static_cast<std::byte*>(dst) + half, static_cast<const std::byte*>(src) + half, bytes - half);
  }
  [[nodiscard]] std::optional<FlagValue> peek(std::uint32_t flag) const override {
    return world_.flags[at(rank_)].at(flag);
  }
  // The timeout only makes its caller come back, so it never passes here: a deadlock stays one.
  bool wait_any_full(std::uint32_t first, std::uint32_t count, Milliseconds, const std::atomic<bool>& stop) override {
    const auto& flags = world_.flags[at(rank_)];
    const auto any_full = [&] {
      return std::any_of(flags.begin() + first, flags.begin() + first + count, [](auto v) { return v == kFull; });
    };
    scheduler_.block("wait for requests", [&] { return any_full() || stop.load(); }, -1);
    return any_full();
  }
  // The core calls it between setting a stop flag and joining the service: wait here, where others can run.
  void interrupt() noexcept override {
    const auto ended = [this] { return scheduler_.finished(rank_, ThreadKind::kService); };
    scheduler_.block("stop service", ended, -1, /*quiet=*/true);
  }

 private:
  [[nodiscard]] bool answers(Rank rank) const { return !world_.left[at(rank)] && !scheduler_.seen_dead(rank); }

  SimWorld& world_;
  Scheduler& scheduler_;
  Rank rank_;
  SimBootstrap bootstrap_;
  Capabilities capabilities_{.name = "sim", .direct_peer_access = true, .memory_outlives_owner = true};
};

}  // namespace

std::shared_ptr<Backend> make_sim_backend(SimWorld& world, Rank rank) {
  return std::make_shared<SimBackend>(world, rank);
}

}  // namespace sidp::test
