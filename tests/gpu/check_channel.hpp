// The words of the activation channel between a requester and an owner that are both this process, for
// kernels_check.cpp.
#pragma once

#include <vector>

#include "backends/nvshmem/kernels.hpp"
#include "check_memory.hpp"

namespace sidp::nvshmem {

constexpr Milliseconds kDeadline{20000};
constexpr std::uint32_t kAnswered = 1, kNotAnswered = 2;  // as in stream_channel.cpp
constexpr std::uint32_t kRequested = 0x80012345;
constexpr ByteCount kFlagBytes = Kernels::kMaxBlocks * sizeof(std::uint32_t);
constexpr ByteCount kUnanswered = 0, kWithheld = 8;
constexpr ByteCount kEpoch = 0, kSeen = 128;  // of rows flags, at the requester and at the owner

class CheckChannel : protected CheckMemory {
 protected:
  explicit CheckChannel(bool serial) : serial_(serial) {}

  // Words in host memory, a line each, and the counters that the kernels keep.
  enum : ByteCount {
    kRequest = 0,
    kReply = 64,
    kFailed = 128,
    kCountsHost = 192,
    kTurn = 256,
    kLaunched = 264,
    kServedHost = 272,
    kAnsweredHost = 280,
    kReleased = 320,  // from the wait for rows
  };

  [[nodiscard]] std::uint32_t word(ByteCount at) const { return words_.word<std::uint32_t>(at).load(); }
  void set(ByteCount at, std::uint32_t value) const { words_.word<std::uint32_t>(at).store(value); }

  void await(ByteCount at, std::uint32_t value, const std::string& what) const {
    const auto start = Clock::now();
    while (word(at) != value) require(Clock::now() - start < kDeadline, what + ": its word was not set");
  }

  void expect_finished(const std::string& what) const {
    const HostMemory staging(device_, 64);
    for (const DeviceBuffer* counter : {&finished_, &finished_take_}) {
      copy(staging.at(0), counter->at(0), 4);
      require(staging.word<std::uint32_t>(0).load() == 0, what + ": its block counter is not back at 0");
    }
  }

  // The first ones are set to a value, the others are as they were.
  void expect_flags(const DeviceBuffer& flags, unsigned set, const std::string& what, std::uint32_t value = 1,
                    std::uint32_t others = 0) const {
    std::vector<std::uint32_t> expected(Kernels::kMaxBlocks, others);
    std::fill_n(expected.begin(), set, value);
    require(read_flags(flags.at(0), Kernels::kMaxBlocks) == expected, what + ": not the flags of its blocks are set");
  }
  void set_flags(const DeviceBuffer& flags, unsigned set, std::uint32_t value = 1) const {
    std::vector<std::uint32_t> content(Kernels::kMaxBlocks);
    std::fill_n(content.begin(), set, value);
    write(flags.at(0), content.data(), kFlagBytes);
  }
  void set_epochs(std::uint32_t requester, std::uint32_t owner) const {
    write(epochs_.at(kEpoch), &requester, sizeof requester);
    write(epochs_.at(kSeen), &owner, sizeof owner);
  }
  void expect_epochs(std::uint32_t requester, std::uint32_t owner, const std::string& what) const {
    require(read_flags(epochs_.at(kEpoch), 1).front() == requester, what + ": wrong epoch at the requester");
    require(read_flags(epochs_.at(kSeen), 1).front() == owner, what + ": wrong epoch at the owner");
  }
  // The words of await() and put() on the device that say that something went wrong.
  void set_verdict(ByteCount at, std::uint64_t value) const { write(verdicts_.at(at), &value, sizeof value); }
  [[nodiscard]] bool verdict(ByteCount at) const { return read_flags(verdicts_.at(at), 1).front() != 0; }

  [[nodiscard]] TurnWords turn_words() const {
    return {.turn = words_.at(kTurn), .launched_host = words_.at(kLaunched), .served = served_.at(0)};
  }

  void launch_put(const DeviceStream& stream, CUdeviceptr dst, CUdeviceptr src, ByteCount bytes, CUdeviceptr word,
                  std::uint32_t value = kRequested, CUdeviceptr block_flags = 0, unsigned blocks = 0) const {
    const bool service = &stream == &service_;
    kernels_.put(stream.get(), dst, src, bytes,
                 {.word = word,
                  .value = value,
                  .finished = (service ? finished_service_ : finished_).at(0),
                  .block_flags = block_flags,
                  .epoch = service ? 0 : epochs_.at(kEpoch),
                  .blocks = blocks,
                  .withheld = service ? verdicts_.at(kWithheld) : 0,
                  .turn = service ? 0 : words_.at(kTurn),
                  .served = service && (word != 0 || block_flags != 0) ? served_.at(0) : 0,
                  .served_host = words_.at(kServedHost)});
  }

  // Of an answer.
  void launch_await(unsigned count, const RequestWords& request = {}) const {
    kernels_.await(engine_.get(),
                   {.flags = reply_flags_.at(0),
                    .count = count,
                    .released = words_.at(kReply),
                    .failed = verdicts_.at(kUnanswered),
                    .resets = true},
                   request);
  }
  // Of rows, by their owner or by who stands in for it.
  void launch_await_rows(unsigned count, bool stand_in = false) const {
    kernels_.await(service_.get(), {.flags = block_flags_.at(0),
                                    .count = count,
                                    .released = words_.at(kReleased),
                                    .failed = verdicts_.at(kWithheld),
                                    .epoch = epochs_.at(stand_in ? kEpoch : kSeen),
                                    .seen = epochs_.at(kSeen)});
  }

  // spun: by a kernel that waits for the flags of so many blocks; 0: the stream has waited. dst 0: nothing is copied.
  void launch_take(CUdeviceptr dst, CUdeviceptr src, ByteCount bytes, std::uint64_t rows, bool turn = false,
                   unsigned spun = 0) {
    const RequestWords request{.flag = words_.at(kReply),
                               .request = words_.at(kRequest),
                               .epoch = spun != 0 ? epochs_.at(kEpoch) : 0,
                               .unanswered = spun != 0 ? verdicts_.at(kUnanswered) : 0,
                               .sent_rows = rows,
                               .sent_bytes = bytes,
                               .counts = counts_.at(0),
                               .counts_host = words_.at(kCountsHost),
                               .failed_host = words_.at(kFailed),
                               .number = ++number_,
                               .answered_host = words_.at(kAnsweredHost),
                               .turn = turn ? turn_words() : TurnWords{}};
    if (spun != 0) launch_await(spun, dst == 0 ? request : RequestWords{});
    if (dst != 0) kernels_.take(engine_.get(), dst, src, bytes, finished_take_.at(0), request);
    expected_[0] += 1, expected_[1] += rows, expected_[2] += bytes;
  }

  void expect_taken(bool answered, const std::string& what) {
    require(word(kReply) == 0, what + ": the reply flag is not free again");
    require(word(kRequest) == 0, what + ": the request word is not free again");
    require(words_.word<std::uint64_t>(kFailed).exchange(0) == (answered ? 0 : 1), what + ": wrong word of failure");
    const HostMemory staging(device_, 64);
    copy(staging.at(0), counts_.at(0), sizeof(expected_));
    for (std::size_t i = 0; i < 3; ++i)
      require(words_.word<std::uint64_t>(kCountsHost + i * 8).load() == expected_[i] &&
                  staging.word<std::uint64_t>(i * 8).load() == expected_[i],
              what + ": wrong counts");
    require(words_.word<std::uint64_t>(kAnsweredHost).load() == number_, what + ": wrong number of the answer");
    expect_finished(what);
  }

  static std::uint32_t next(std::uint32_t epoch) { return epoch == kNobodyWaits - 1 ? 1 : epoch + 1; }

  // Rows are there when all flags have the number after the last one: none of before it, of whatever block, counts. A
  // stand-in goes by the requester's number, whether the owner has seen the rows or not. After a request without an
  // answer nobody waits.
  void await_wants_its_epoch() {
    const Filled rows(*this, 0, pattern(5 * 8192));
    const Guarded slot(*this, 0, 5 * 8192);
    for (const std::uint32_t epoch : {0U, 1U, 77U, kNobodyWaits - 2, kNobodyWaits - 1})
      for (const auto& [stand_in, seen] : {std::pair{false, epoch}, {true, epoch}, {true, next(epoch)}}) {
        const std::string what = "a wait for what follows " + std::to_string(epoch) + (stand_in ? ", stood in" : "");
        set_verdict(kWithheld, 0);
        set_epochs(epoch, seen);
        set_flags(block_flags_, Kernels::kMaxBlocks, epoch);
        if (!serial_) {
          launch_await_rows(5, stand_in);
          std::this_thread::sleep_for(Milliseconds(2));
          require(!service_.idle(), what + ": it took the flags of the request before");
        }
        launch_put(engine_, slot.at(), rows.at, 5 * 8192, words_.at(kRequest), kRequested, block_flags_.at(0));
        engine_.synchronize();
        if (serial_) launch_await_rows(5, stand_in);
        service_.synchronize();
        expect_flags(block_flags_, 5, what, next(epoch), epoch);
        expect_epochs(epoch, next(epoch), what);
        require(!verdict(kWithheld), what + ": it failed");
      }
    set_epochs(kNobodyWaits, 7);
    for (int i = 0; i < 3; ++i) {  // the owner may have seen more or less of these
      launch_put(engine_, slot.at(), rows.at, 5 * 8192, words_.at(kRequest), kRequested, block_flags_.at(0));
      engine_.synchronize();
      for (int j = 0; j < i; ++j) launch_await_rows(5);
      service_.synchronize();
    }
    set(kRequest, 0);
  }

  bool serial_;
  Kernels kernels_{device_};
  DeviceStream service_{device_, DeviceStream::Priority::kService};
  HostMemory words_{device_, kPage};
  DeviceBuffer finished_{device_, 4, "words"};
  DeviceBuffer finished_take_{device_, 4, "words"};
  DeviceBuffer finished_service_{device_, 4, "words"};
  DeviceBuffer counts_{device_, 24, "words"};
  DeviceBuffer served_{device_, 8, "words"};
  DeviceBuffer block_flags_{device_, kFlagBytes, "words"};  // of the engine's puts
  DeviceBuffer reply_flags_{device_, kFlagBytes, "words"};  // of the service's
  DeviceBuffer verdicts_{device_, 16, "words"};             // kUnanswered, kWithheld
  DeviceBuffer epochs_{device_, 256, "words"};              // kEpoch, kSeen
  std::uint64_t expected_[3] = {};
  std::uint64_t number_ = 0;  // of the last answer
};

}  // namespace sidp::nvshmem
