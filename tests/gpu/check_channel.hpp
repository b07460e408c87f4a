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

  void expect_flags(const DeviceBuffer& flags, unsigned set, const std::string& what) const {
    std::vector<std::uint32_t> expected(Kernels::kMaxBlocks);
    std::fill_n(expected.begin(), set, 1U);
    require(read_flags(flags.at(0), Kernels::kMaxBlocks) == expected, what + ": not the flags of its blocks are set");
  }
  void set_flags(const DeviceBuffer& flags, unsigned set) const {
    std::vector<std::uint32_t> content(Kernels::kMaxBlocks);
    std::fill_n(content.begin(), set, 1U);
    write(flags.at(0), content.data(), kFlagBytes);
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
                  .blocks = blocks,
                  .withheld = service ? verdicts_.at(kWithheld) : 0,
                  .turn = service ? 0 : words_.at(kTurn),
                  .served = service && (word != 0 || block_flags != 0) ? served_.at(0) : 0,
                  .served_host = words_.at(kServedHost)});
  }

  void launch_await(const DeviceStream& stream, const DeviceBuffer& flags, unsigned count, ByteCount failed,
                    bool resets = false, const RequestWords& request = {}) const {
    kernels_.await(stream.get(),
                   {.flags = flags.at(0),
                    .count = count,
                    .released = words_.at(&stream == &service_ ? kReleased : kReply),
                    .failed = verdicts_.at(failed),
                    .resets = resets},
                   request);
  }

  // spun: by a kernel that waits for the flags of so many blocks; 0: the stream has waited. dst 0: nothing is copied.
  void launch_take(CUdeviceptr dst, CUdeviceptr src, ByteCount bytes, std::uint64_t rows, bool turn = false,
                   unsigned spun = 0) {
    const RequestWords request{.flag = words_.at(kReply),
                               .request = words_.at(kRequest),
                               .rows_flags = spun != 0 ? block_flags_.at(0) : 0,
                               .unanswered = spun != 0 ? verdicts_.at(kUnanswered) : 0,
                               .sent_rows = rows,
                               .sent_bytes = bytes,
                               .counts = counts_.at(0),
                               .counts_host = words_.at(kCountsHost),
                               .failed_host = words_.at(kFailed),
                               .number = ++number_,
                               .answered_host = words_.at(kAnsweredHost),
                               .turn = turn ? turn_words() : TurnWords{}};
    if (spun != 0)
      launch_await(engine_, reply_flags_, spun, kUnanswered, /*resets=*/true, dst == 0 ? request : RequestWords{});
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
  std::uint64_t expected_[3] = {};
  std::uint64_t number_ = 0;  // of the last answer
};

}  // namespace sidp::nvshmem
