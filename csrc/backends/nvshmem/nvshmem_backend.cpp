#include "nvshmem_backend.hpp"

#include <algorithm>
#include <future>
#include <mutex>
#include <set>

#include "copy_lane.hpp"
#include "core/collective.hpp"
#include "event_clock.hpp"
#include "event_timer.hpp"
#include "sidp/error.hpp"
#include "spin_or_nap.hpp"

namespace sidp::nvshmem {

namespace {

constexpr ByteCount kFlagStride = 128;  // a line of a GPU's cache each; also room for a word for each block of a put
static_assert(kFlagStride >= Kernels::kMaxBlocks * sizeof(std::uint32_t));
// Words of a rank's control segment after its flags; then one for each reader that waits for its link.
constexpr std::uint32_t kLeftWord = 0, kHolderWord = 1, kLastWord = 2, kWordsOfRank = 3;
constexpr Rank kLeastRanks = 3;                               // with two an owner has one reader: no queue
constexpr ByteCount kHeapGranularity = ByteCount{512} << 20;  // NVSHMEM grows its heap by multiples of this

class NvshmemBuffer final : public SymmetricBuffer {
 public:
  NvshmemBuffer(Rank rank, std::vector<std::byte*> pieces, std::vector<ByteCount> bytes)
      : rank_(rank), pieces_(std::move(pieces)), bytes_(std::move(bytes)) {}
  [[nodiscard]] std::byte* local() const override { return pieces_[static_cast<std::size_t>(rank_)]; }
  [[nodiscard]] std::byte* peer(Rank rank) const override { return pieces_[static_cast<std::size_t>(rank)]; }
  [[nodiscard]] ByteCount bytes(Rank rank) const override { return bytes_[static_cast<std::size_t>(rank)]; }

 private:
  Rank rank_;
  std::vector<std::byte*> pieces_;  // by rank as mapped here; null where it is not
  std::vector<ByteCount> bytes_;
};

// NVSHMEM keeps what is freed in its heap, for the whole process: an allocation that fits into such a piece takes
// nothing from the device. Neighbouring pieces are not counted together, which errs on the safe side.
class FreedPieces {
 public:
  void add(ByteCount bytes) {
    const std::lock_guard lock(mutex_);
    sizes_.insert(bytes);
  }
  // The smallest piece that holds so many bytes is used for them, if there is one.
  bool take(ByteCount bytes) {
    const std::lock_guard lock(mutex_);
    const auto piece = sizes_.lower_bound(bytes);
    if (piece == sizes_.end()) return false;
    const ByteCount rest = *piece - bytes;
    sizes_.erase(piece);
    if (rest > 0) sizes_.insert(rest);
    return true;
  }

 private:
  std::mutex mutex_;
  std::multiset<ByteCount> sizes_;
};

FreedPieces& freed_pieces() {
  static FreedPieces pieces;
  return pieces;
}

}  // namespace

NvshmemBackend::NvshmemBackend(NvshmemOptions options, std::shared_ptr<Bootstrap> bootstrap)
    : options_(std::move(options)),
      bootstrap_(std::move(bootstrap)),
      device_(std::make_shared<Device>(options_.device)),
      nvshmem_(nvshmem_api()),
      host_({options_.rank, options_.world_size, options_.token}, bootstrap_),
      capabilities_{.name = "nvshmem",
                    .stream_ordered = true,
                    .direct_peer_access = false,
                    .memory_outlives_owner = true,
                    .device = options_.device} {
  options_.gpus.resize(static_cast<std::size_t>(options_.world_size), -1);
  if (!nvshmem_.missing.empty()) throw Error(ErrorCode::kUnsupported, nvshmem_.missing, {.rank = options_.rank});
  if (nvshmem_.my_pe() != options_.rank || nvshmem_.n_pes() != options_.world_size)
    throw Error(ErrorCode::kConfig,
                "NVSHMEM was initialised as rank " + std::to_string(nvshmem_.my_pe()) + " of " +
                    std::to_string(nvshmem_.n_pes()) + ", this group is rank " + std::to_string(options_.rank) +
                    " of " + std::to_string(options_.world_size) + "; a process takes part in one NVSHMEM job",
                {.rank = options_.rank});
}

NvshmemBackend::~NvshmemBackend() {
  const ContextScope scope(*device_);
  for (CUevent event : {step_end_, earlier_end_})
    if (event != nullptr) device_->api().cuEventDestroy(event);
  if (*in_use_) {  // what is under way waits for and writes words there
    host_.keep_control();
    return;
  }
  for (Rank rank = 0; rank < static_cast<Rank>(control_.size()); ++rank)
    device_->api().cuMemHostUnregister(host_.control(rank).data());
}

void NvshmemBackend::within_deadline(const std::string& what, std::function<void()> collective) {
  // The thread outlives a deadline: it is inside NVSHMEM, which cannot be told to give up.
  auto done = std::make_shared<std::promise<void>>();
  auto finished = done->get_future();
  std::thread([device = device_, collective = std::move(collective), done] {
    const ContextScope scope(*device);
    collective();
    done->set_value();
  }).detach();
  if (finished.wait_for(options_.deadline) == std::future_status::ready) return;
  lost_ = true;
  throw Error(ErrorCode::kDeadline,
              "rank " + std::to_string(options_.rank) + " waited " + std::to_string(options_.deadline.count()) +
                  " ms in NVSHMEM's collective " + what +
                  ": a rank died or stopped in set-up. NVSHMEM cannot be used again in this process; start it anew",
              {.rank = options_.rank, .waited_ms = options_.deadline.count()});
}

void* NvshmemBackend::symmetric_malloc(ByteCount bytes, const std::string& label) {
  // NVSHMEM gives no reason for a failure and may end the process, so what does not fit never gets there.
  const bool reuses = freed_pieces().take(bytes);
  all_or_none(*bootstrap_, options_.rank, label + " fits", [&] {
    if (reuses) return;
    const ContextScope scope(*device_);
    std::size_t free = 0, total = 0;
    device_->check(device_->api().cuMemGetInfo(&free, &total), "cuMemGetInfo");
    if (align_up(bytes, kHeapGranularity) > free)
      throw Error(ErrorCode::kCapacity,
                  label + ": " + std::to_string(bytes) + " bytes, in units of 512 MiB, do not fit on device " +
                      std::to_string(options_.device) + ", which has " + std::to_string(free) + " of " +
                      std::to_string(total) + " free; every rank allocates as much as the one that owns most",
                  {.rank = options_.rank, .num_bytes = static_cast<std::int64_t>(bytes)});
  });
  auto memory = std::make_shared<void*>(nullptr);
  within_deadline("malloc", [memory, bytes, malloc = nvshmem_.malloc] { *memory = malloc(bytes); });
  all_or_none(*bootstrap_, options_.rank, label + " allocated", [&] {
    if (*memory == nullptr)
      throw Error(ErrorCode::kCapacity,
                  label + ": NVSHMEM did not give " + std::to_string(bytes) + " bytes of symmetric memory",
                  {.rank = options_.rank, .num_bytes = static_cast<std::int64_t>(bytes)});
  });
  allocations_.push_back({*memory, bytes});
  return *memory;
}

std::unique_ptr<SymmetricBuffer> NvshmemBackend::allocate_symmetric(std::span<const ByteCount> bytes_by_rank,
                                                                    const std::string& label, bool) {
  const ByteCount most = *std::max_element(bytes_by_rank.begin(), bytes_by_rank.end());
  auto* const mine = static_cast<std::byte*>(symmetric_malloc(std::max(most, kAlignment), label));
  std::vector<std::byte*> pieces;
  for (Rank rank = 0; rank < options_.world_size; ++rank) {
    const bool hidden = options_.test_without_mappings && rank != options_.rank;
    pieces.push_back(hidden ? nullptr : static_cast<std::byte*>(nvshmem_.ptr(mine, rank)));
  }
  return std::make_unique<NvshmemBuffer>(options_.rank, std::move(pieces),
                                         std::vector<ByteCount>(bytes_by_rank.begin(), bytes_by_rank.end()));
}

void NvshmemBackend::create_flags(std::uint32_t num_flags) {
  host_.create_flags(num_flags + kWordsOfRank + static_cast<std::uint32_t>(options_.world_size));
  num_flags_ = num_flags;
  all_or_none(*bootstrap_, options_.rank, "control segments mapped on the device", [&] {
    const ContextScope scope(*device_);
    for (Rank rank = 0; rank < options_.world_size; ++rank) {
      const host::SharedSegment& control = host_.control(rank);
      device_->check(device_->api().cuMemHostRegister(control.data(), control.bytes(),
                                                      CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP),
                     "cuMemHostRegister of a control segment");
      CUdeviceptr mapped = 0;
      device_->check(device_->api().cuMemHostGetDevicePointer(&mapped, control.data(), 0), "cuMemHostGetDevicePointer");
      control_.push_back(mapped);
    }
  });
  const ByteCount bytes = seen_flag(options_.world_size) * kFlagStride;
  const std::vector<ByteCount> bytes_by_rank(static_cast<std::size_t>(options_.world_size), bytes);
  const auto buffer = allocate_symmetric(bytes_by_rank, "flags", true);
  for (Rank rank = 0; rank < options_.world_size; ++rank) flags_.push_back(device_pointer(buffer->peer(rank)));
  const ContextScope scope(*device_);
  const DeviceStream stream(*device_, DeviceStream::Priority::kDefault);
  device_->check(device_->api().cuMemsetD8Async(device_pointer(buffer->local()), 0, bytes, stream.get()),
                 "cuMemsetD8Async");
  stream.synchronize();
  bootstrap_->all_gather("flags empty", "");
}

std::unique_ptr<LocalBuffer> NvshmemBackend::allocate_local(ByteCount bytes, const std::string& label) {
  return std::make_unique<DeviceBuffer>(*device_, bytes, label, in_use_);
}

std::unique_ptr<Lane> NvshmemBackend::make_lane(std::vector<LaneOp> program, const LaneOptions& options) {
  std::optional<LinkQueue> queue;
  const bool has_links =
      std::any_of(options_.gpus.begin(), options_.gpus.end(), [this](int gpu) { return gpu != options_.device; });
  if (options.exclusive_links && has_links && options_.world_size >= kLeastRanks) {
    const LinkQueue::Words words{
        .holder = [this](Rank owner) { return host_.flag_word({owner, num_flags_ + kHolderWord}); },
        .last = [this](Rank owner) { return host_.flag_word({owner, num_flags_ + kLastWord}); },
        .waits =
            [this](Rank owner, Rank reader) {
              return host_.flag_word({owner, num_flags_ + kWordsOfRank + static_cast<std::uint32_t>(reader)});
            },
    };
    // A rank that leaves in order still copies what it has queued.
    queue.emplace(options_.rank, options_.world_size, words,
                  [this](Rank rank) { return alive(rank) || left(rank).load() != 0; });
  }
  return std::make_unique<CopyLane>(device_, nvshmem_, flag({options_.rank, 0}), kFlagStride, options_.gpus,
                                    std::move(program), options, std::move(queue), tracer(), in_use_);
}

std::unique_ptr<StreamClock> NvshmemBackend::make_stream_clock(std::size_t num_marks) {
  return std::make_unique<EventClock>(device_, num_marks);
}

std::unique_ptr<ActivationChannel> NvshmemBackend::make_channel(WeightPool& pool, const Mailbox& mailbox,
                                                                const ChannelOptions& options) {
  const ChannelMemory memory{
      .request = [this, &pool](Rank owner, Rank requester) { return host_word({owner, pool.request_flag(requester)}); },
      .reply = [this, &pool](Rank requester, Rank owner) { return host_word({requester, pool.reply_flag(owner)}); },
      .rows_flags = [this, &pool](Rank owner, Rank requester) { return flag({owner, pool.request_flag(requester)}); },
      .reply_flags = [this, &pool](Rank requester, Rank owner) { return flag({requester, pool.reply_flag(owner)}); },
      .rows_seen = [this](Rank owner, Rank requester) { return flag({owner, seen_flag(requester)}); },
  };
  return std::make_unique<StreamChannel>(device_, pool, mailbox, memory, options, in_use_);
}

std::thread NvshmemBackend::start_thread(const std::string& name, std::function<void()> body) {
  return host_.start_thread(name, [device = device_, body = std::move(body)] {
    const ContextScope scope(*device);
    body();
  });
}

void NvshmemBackend::mark_step_end(Stream stream) noexcept {
  const ContextScope scope(*device_);
  // A failure here is the device's, and the next call on the stream reports it.
  std::swap(step_end_, earlier_end_);
  if (step_end_ == nullptr) device_->api().cuEventCreate(&step_end_, CU_EVENT_DISABLE_TIMING);
  if (step_end_ != nullptr) device_->api().cuEventRecord(step_end_, static_cast<CUstream>(stream.handle));
}

bool NvshmemBackend::wait_step_end(Milliseconds deadline, bool but_one) noexcept {
  CUevent const end = but_one ? earlier_end_ : step_end_;
  if (end == nullptr) return true;
  const ContextScope scope(*device_);
  const auto start = Clock::now();
  while (is_pending(device_->api().cuEventQuery(end))) {
    if (Clock::now() - start > deadline) return false;
    std::this_thread::sleep_for(kNap);
  }
  return true;
}

void NvshmemBackend::follow_step_end(Stream stream) {
  if (step_end_ == nullptr) return;
  const ContextScope scope(*device_);
  device_->check(device_->api().cuStreamWaitEvent(static_cast<CUstream>(stream.handle), step_end_, 0),
                 "cuStreamWaitEvent");
}

std::unique_ptr<StepTimer> NvshmemBackend::make_step_timer() { return std::make_unique<EventTimer>(device_); }

std::atomic_ref<std::uint32_t> NvshmemBackend::left(Rank rank) const {
  return std::atomic_ref<std::uint32_t>(*host_.flag_word({rank, num_flags_ + kLeftWord}));
}

void NvshmemBackend::leave() noexcept {
  if (num_flags_ > 0) left(options_.rank).store(1);
  host_.leave();
}

bool NvshmemBackend::close() {
  leave();
  if (lost_) allocations_.clear();  // a thread is still inside NVSHMEM
  if (lost_) return false;
  if (allocations_.empty()) return true;
  for (Rank rank = 0; rank < options_.world_size; ++rank) {
    if (alive(rank) || left(rank).load() != 0) continue;
    allocations_.clear();  // it died and will never come
    return false;
  }
  try {
    const auto busy = bootstrap_->all_gather("close", *in_use_ ? "in use" : "");
    if (std::any_of(busy.begin(), busy.end(), [](const std::string& word) { return !word.empty(); })) {
      allocations_.clear();
      return false;
    }
    for (const Allocation& allocation : allocations_) {
      within_deadline("free", [memory = allocation.memory, free = nvshmem_.free] { free(memory); });
      freed_pieces().add(allocation.bytes);
    }
  } catch (const std::exception&) {
    allocations_.clear();
    return false;
  }
  allocations_.clear();
  return true;
}

ChannelMemory::Word NvshmemBackend::host_word(FlagRef ref) const {
  auto* const word = host_.flag_word(ref);
  const auto offset = reinterpret_cast<std::byte*>(word) - host_.control(ref.rank).data();
  return {word, control_[static_cast<std::size_t>(ref.rank)] + static_cast<CUdeviceptr>(offset)};
}

CUdeviceptr NvshmemBackend::flag(FlagRef ref) const {
  return flags_[static_cast<std::size_t>(ref.rank)] + ref.index * kFlagStride;
}

WaitResult NvshmemBackend::wait(Stream stream, std::uint32_t index, FlagValue expected, const WaitOptions&) {
  const ContextScope scope(*device_);
  device_->check(device_->api().cuStreamWaitValue32(static_cast<CUstream>(stream.handle), flag({options_.rank, index}),
                                                    expected, CU_STREAM_WAIT_VALUE_EQ),
                 "cuStreamWaitValue32");
  return WaitResult::kReady;
}

void NvshmemBackend::signal(Stream stream, FlagRef ref, FlagValue value) {
  const ContextScope scope(*device_);
  device_->check(device_->api().cuStreamWriteValue32(static_cast<CUstream>(stream.handle), flag(ref), value, 0),
                 "cuStreamWriteValue32");
}

void NvshmemBackend::put(Stream stream, const SymmetricBuffer& buffer, Rank peer, ByteCount offset, const void* src,
                         ByteCount bytes) {
  copy(stream, buffer.peer(peer) + offset, src, bytes);
}

void NvshmemBackend::copy(Stream stream, void* dst, const void* src, ByteCount bytes) {
  const ContextScope scope(*device_);
  device_->check(device_->api().cuMemcpyAsync(device_pointer(dst), device_pointer(src), bytes,
                                              static_cast<CUstream>(stream.handle)),
                 "cuMemcpyAsync");
}

bool NvshmemBackend::wait_any_full(std::uint32_t, std::uint32_t, Milliseconds, const std::atomic<bool>&) {
  throw Error(ErrorCode::kUnsupported, "flags of the nvshmem backend lie on the GPU; its channel polls request words");
}

}  // namespace sidp::nvshmem
