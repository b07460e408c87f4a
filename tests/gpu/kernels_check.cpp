// Drives the kernels of the activation channel on ordinary memory of one GPU, through the backend's own launch
// code, and compares every byte: for compute-sanitizer, under which NVSHMEM does not start. Exit status 1 on a
// mismatch.
//
// kernels_check [serial]. serial: nothing is launched while a stream waits, for tools that make launches block.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "backends/nvshmem/one_sided.hpp"
#include "host_memory.hpp"

namespace sidp::nvshmem {
namespace {

using Bytes = std::vector<std::byte>;

constexpr Milliseconds kDeadline{20000};
constexpr std::byte kUntouched{0xA5};
constexpr std::uint32_t kAnswered = 1, kNotAnswered = 2;  // as in stream_channel.cpp
constexpr std::uint32_t kRequested = 0x80012345;

// Of a request: bytes, and how far the source and the destination are from an alignment of 16.
struct Shape {
  ByteCount bytes;
  ByteCount src_offset = 0, dst_offset = 0;
  [[nodiscard]] std::string text() const {
    return std::to_string(bytes) + " bytes from +" + std::to_string(src_offset) + " to +" + std::to_string(dst_offset);
  }
};

class Check {
 public:
  explicit Check(bool serial) : serial_(serial) {}

  void run() {
    std::vector<Shape> shapes;
    // One block copies 8192 bytes at a time, 32 blocks do at most, and a thread keeps four loads in flight.
    for (const ByteCount bytes :
         std::initializer_list<ByteCount>{0, 1, 15, 16, 17, 4095, 8192, 8193, 24581, 262144, 655360, 1310727})
      for (const auto& [src, dst] : {std::pair<ByteCount, ByteCount>{0, 0}, {16, 32}, {8, 0}, {0, 1}, {3, 3}})
        shapes.push_back({bytes, src, dst});
    for (const Shape& shape : shapes) {
      put(shape);
      take(shape, kAnswered);
      take(shape, kNotAnswered);
      take(shape, kAnswered, /*spun=*/true);
      take(shape, kNotAnswered, /*spun=*/true);
    }
    put_sets_its_word_last();
    one_sided();
    turns();
    for (int i = 0; i < 20; ++i) exchange(i % 4 == 3);
    std::printf("%zu shapes and 20 exchanges of rows are right\n", shapes.size());
  }

 private:
  // Words in host memory, a line each, and the counters that the kernels keep.
  enum : ByteCount {
    kRequest = 0,
    kReply = 64,
    kFailed = 128,
    kCountsHost = 192,
    kTurn = 256,
    kLaunched = 264,
    kServedHost = 272,
    kAnsweredHost = 280
  };

  [[nodiscard]] std::uint32_t word(ByteCount at) const { return words_.word<std::uint32_t>(at).load(); }
  void set(ByteCount at, std::uint32_t value) const { words_.word<std::uint32_t>(at).store(value); }

  void await(ByteCount at, std::uint32_t value, const std::string& what) const {
    const auto start = Clock::now();
    while (word(at) != value) require(Clock::now() - start < kDeadline, what + ": its word was not set");
  }

  void copy(CUdeviceptr dst, CUdeviceptr src, ByteCount bytes) const {
    if (bytes == 0) return;
    device_.check(device_.api().cuMemcpyAsync(dst, src, bytes, engine_.get()), "cuMemcpyAsync");
    engine_.synchronize();
  }

  // Bytes that differ from their neighbours, and from one call to the next.
  Bytes pattern(ByteCount bytes) {
    Bytes made(bytes);
    std::uint32_t x = ++seed_ * 2654435761U;
    for (std::byte& b : made) b = static_cast<std::byte>((x = x * 1664525U + 1013904223U) >> 24);
    return made;
  }

  // Device memory that ends with the last byte of `content`, so that a tool sees every access behind it.
  struct Filled {
    Filled(const Check& check, ByteCount offset, const Bytes& content)
        : memory(check.device_, std::max(offset + content.size(), ByteCount{1}), "rows"), at(memory.at(offset)) {
      const HostMemory staging(check.device_, content.size());
      std::copy(content.begin(), content.end(), staging.data());
      check.copy(at, staging.at(0), content.size());
    }
    DeviceBuffer memory;
    CUdeviceptr at;
  };

  // As Filled, with 64 bytes on either side that must stay as they were.
  struct Guarded {
    Guarded(const Check& check, ByteCount offset, ByteCount bytes)
        : owner(check), front(64 + offset), size(bytes), filled(check, 0, Bytes(front + bytes + 64, kUntouched)) {}
    [[nodiscard]] CUdeviceptr at() const { return filled.at + front; }
    void expect(const Bytes& content, const std::string& what) const {
      Bytes expected(front + size + 64, kUntouched);
      std::copy(content.begin(), content.end(), expected.begin() + static_cast<std::ptrdiff_t>(front));
      const HostMemory staging(owner.device_, expected.size());
      owner.copy(staging.at(0), filled.at, expected.size());
      const auto wrong = std::mismatch(expected.begin(), expected.end(), staging.data()).first - expected.begin();
      require(wrong == std::ssize(expected),
              what + ": wrong byte at " + std::to_string(wrong - static_cast<std::ptrdiff_t>(front)));
    }
    const Check& owner;
    ByteCount front, size;
    Filled filled;
  };

  void expect_finished(const std::string& what) const {
    const HostMemory staging(device_, 64);
    for (const DeviceBuffer* counter : {&finished_, &finished_take_}) {
      copy(staging.at(0), counter->at(0), 4);
      require(staging.word<std::uint32_t>(0).load() == 0, what + ": its block counter is not back at 0");
    }
  }

  void put(const Shape& shape) {
    const std::string what = "put of " + shape.text();
    for (const bool with_word : {true, false}) {
      const Bytes rows = pattern(shape.bytes);
      const Filled src(*this, shape.src_offset, rows);
      const Guarded dst(*this, shape.dst_offset, shape.bytes);
      const Filled tight(*this, shape.dst_offset, Bytes(shape.bytes));
      set(kRequest, 0);
      launch_put(engine_, tight.at, src.at, shape.bytes, 0);
      launch_put(engine_, dst.at(), src.at, shape.bytes, with_word ? words_.at(kRequest) : 0);
      engine_.synchronize();
      dst.expect(rows, what);
      require(word(kRequest) == (with_word ? kRequested : 0), what + ": wrong word");
    }
    expect_finished(what);
  }

  void launch_put(const DeviceStream& stream, CUdeviceptr dst, CUdeviceptr src, ByteCount bytes, CUdeviceptr word,
                  std::uint32_t value = kRequested) const {
    const bool service = &stream == &service_;
    kernels_.put(stream.get(), dst, src, bytes,
                 {.word = word,
                  .value = value,
                  .finished = (service ? finished_service_ : finished_).at(0),
                  .turn = service ? 0 : words_.at(kTurn),
                  .served = service && word != 0 ? served_.at(0) : 0,
                  .served_host = words_.at(kServedHost)});
  }

  // spun: by a kernel that waits for the flag on the device.
  void launch_take(CUdeviceptr dst, CUdeviceptr src, ByteCount bytes, std::uint64_t rows, bool turn = false,
                   bool spun = false) {
    if (spun) kernels_.await(engine_.get(), flag_.at(0), words_.at(kReply), words_.at(kFailed));
    kernels_.take(engine_.get(), dst, src, bytes,
                  {.flag = words_.at(kReply),
                   .device_flag = spun ? flag_.at(0) : 0,
                   .request = words_.at(kRequest),
                   .sent_rows = rows,
                   .sent_bytes = bytes,
                   .counts = counts_.at(0),
                   .counts_host = words_.at(kCountsHost),
                   .failed_host = words_.at(kFailed),
                   .finished = finished_take_.at(0),
                   .number = ++number_,
                   .answered_host = words_.at(kAnsweredHost),
                   .turn = turn ? turn_words() : Kernels::TurnWords{}});
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

  void take(const Shape& shape, std::uint32_t reply, bool spun = false) {
    const std::string what =
        "take of " + shape.text() + (reply == kAnswered ? "" : " that were not answered") + (spun ? ", spun for" : "");
    const Bytes rows = pattern(shape.bytes);
    const Filled src(*this, shape.src_offset, rows);
    const Guarded dst(*this, shape.dst_offset, shape.bytes);
    set(kRequest, kRequested & 0x7FFFFFFF);
    if (!spun) set(kReply, reply);
    const auto begin = [&] { launch_take(dst.at(), src.at, shape.bytes, 3, false, spun); };
    if (spun && !serial_) begin();  // and then it waits
    if (spun && reply == kAnswered)
      launch_put(service_, dst.at(), src.at, 0, flag_.at(0), kAnswered);
    else
      set(kReply, reply);
    service_.synchronize();
    if (!spun || serial_) begin();
    engine_.synchronize();
    if (spun) {
      const HostMemory staging(device_, 64);
      copy(staging.at(0), flag_.at(0), 4);
      require(staging.word<std::uint32_t>(0).load() == 0, what + ": the flag on the device is not free again");
    }
    if (reply == kAnswered) dst.expect(rows, what);
    expect_taken(reply == kAnswered, what);
  }

  // The host sees the word and then, at once, every byte that was put before it.
  void put_sets_its_word_last() {
    constexpr ByteCount kBytes = 655363;
    const HostMemory dst(device_, kBytes);
    for (int i = 0; i < 20; ++i) {
      const Bytes rows = pattern(kBytes);
      const Filled src(*this, 0, rows);
      set(kRequest, 0);
      launch_put(engine_, dst.at(0), src.at, kBytes, words_.at(kRequest));
      await(kRequest, kRequested, "put into host memory");
      require(std::equal(rows.begin(), rows.end(), dst.data()), "put into host memory: its word came before its bytes");
      engine_.synchronize();
    }
    set(kRequest, 0);
  }

  [[nodiscard]] Kernels::TurnWords turn_words() const {
    return {.turn = words_.at(kTurn), .launched_host = words_.at(kLaunched), .served = served_.at(0)};
  }

  // Rows to and fro, each way a put and a wait that resets its flag; then a wait that the host ends.
  void one_sided() {
    constexpr ByteCount kBytes = 40960;
    const OneSided puts(0), replies(0);
    const DeviceBuffer flags(device_, 128, "words");
    const Bytes rows = pattern(kBytes);
    const Filled src(*this, 0, rows);
    const Guarded there(*this, 0, kBytes), back(*this, 0, kBytes);
    for (int i = 0; i < 10; ++i) {
      puts.put(engine_.get(), there.at(), src.at, kBytes, flags.at(0));
      if (!serial_) puts.wait(engine_.get(), flags.at(64));
      replies.wait(service_.get(), flags.at(0));
      replies.put(service_.get(), back.at(), there.at(), kBytes, flags.at(64));
      if (serial_) service_.synchronize();
      if (serial_) puts.wait(engine_.get(), flags.at(64));
      engine_.synchronize();
      service_.synchronize();
    }
    there.expect(rows, "put");
    back.expect(rows, "put back");
    require(!puts.failed() && !replies.failed(), "a wait failed");
    const HostMemory staging(device_, 128);
    copy(staging.at(0), flags.at(0), 128);
    require(staging.word<std::uint32_t>(0) == 0 && staging.word<std::uint32_t>(64) == 0, "a wait left its flag set");
    if (serial_) puts.release();
    puts.wait(engine_.get(), flags.at(64));
    if (!serial_) puts.release();
    engine_.synchronize();
    require(puts.failed(), "a wait that was released did not say so");
  }

  // The engine's turn begins after the answers that were launched before it, if these come, and ends with its next put.
  void turns() {
    const auto word64 = [&](ByteCount at) { return words_.word<std::uint64_t>(at); };
    const Filled rows(*this, 0, pattern(64));
    const Guarded dst(*this, 0, 64);
    for (const bool with_take : {false, true}) {
      const std::string what = with_take ? "turn that begins with an answer" : "turn";
      const auto begin = [&] {
        set(kReply, kAnswered);
        if (with_take)
          launch_take(dst.at(), rows.at, 64, 1, true);
        else
          kernels_.turn(engine_.get(), turn_words());
      };
      begin();
      engine_.synchronize();
      require(word64(kTurn) == 1, what + ": not begun");
      launch_put(engine_, dst.at(), rows.at, 64, 0);
      engine_.synchronize();
      require(word64(kTurn) == 0, what + ": a put did not end it");

      const std::uint64_t served = word64(kServedHost);
      word64(kLaunched) = served + 1;
      const auto start = Clock::now();
      begin();
      engine_.synchronize();
      require(Clock::now() - start > Milliseconds(9), what + ": it did not wait for an answer that was launched");
      require(Clock::now() - start < kDeadline, what + ": it waited for ever");
      if (!serial_) begin();  // which this answer ends:
      const auto answered = Clock::now();
      launch_put(service_, dst.at(), rows.at, 64, words_.at(kReply), 0);
      engine_.synchronize();
      require(serial_ || Clock::now() - answered < Milliseconds(9), what + ": the answer did not let it go on");
      service_.synchronize();
      require(word64(kServedHost) == served + 1, what + ": an answer was not counted");
      const auto again = Clock::now();
      begin();
      engine_.synchronize();
      require(Clock::now() - again < Milliseconds(9), what + ": it waited for an answer that had been put");
      launch_put(engine_, dst.at(), rows.at, 64, 0);
      engine_.synchronize();
    }
    word64(kFailed) = 0;
    set(kReply, 0);
  }

  // A request as the channel makes it, and an answer of two outputs, or none: then the host releases the requester.
  void exchange(bool released) {
    const std::string what = released ? "request that the host released" : "exchange";
    constexpr ByteCount kRows = 64, kFirst = 32 * 5120, kBytes = kRows * 5120 * 2;
    const Bytes x = pattern(kBytes);
    const Filled rows(*this, 0, x);
    const Guarded slot(*this, 0, kBytes), reply(*this, 0, kBytes), y(*this, 0, kBytes);
    launch_put(engine_, slot.at(), rows.at, kBytes, words_.at(kRequest));
    const auto queue_take = [&] {
      device_.check(
          device_.api().cuStreamWaitValue32(engine_.get(), words_.at(kReply), kAnswered, CU_STREAM_WAIT_VALUE_GEQ),
          "cuStreamWaitValue32");
      launch_take(y.at(), reply.at(), kBytes, kRows);
    };
    if (!serial_) queue_take();
    await(kRequest, kRequested, what);
    set(kRequest, kRequested & 0x7FFFFFFF);  // taken
    if (released) {
      std::this_thread::sleep_for(Milliseconds(5));
      set(kReply, kNotAnswered);
    } else {
      launch_put(service_, reply.at(), slot.at(), kFirst, 0, kAnswered);
      launch_put(service_, reply.at() + kFirst, slot.at() + kFirst, kBytes - kFirst, words_.at(kReply), kAnswered);
      if (serial_) service_.synchronize();
    }
    if (serial_) queue_take();
    engine_.synchronize();
    service_.synchronize();
    slot.expect(x, what + ", request slot");
    if (!released) y.expect(x, what);
    expect_taken(!released, what);
  }

  bool serial_;
  Device device_{0};
  ContextScope scope_{device_};
  Kernels kernels_{device_};
  DeviceStream engine_{device_, DeviceStream::Priority::kDefault};
  DeviceStream service_{device_, DeviceStream::Priority::kService};
  HostMemory words_{device_, kPage};
  DeviceBuffer finished_{device_, 4, "words"};
  DeviceBuffer finished_take_{device_, 4, "words"};
  DeviceBuffer finished_service_{device_, 4, "words"};
  DeviceBuffer counts_{device_, 24, "words"};
  DeviceBuffer served_{device_, 8, "words"};
  DeviceBuffer flag_{device_, 4, "words"};
  std::uint64_t expected_[3] = {};
  std::uint64_t number_ = 0;  // of the last answer
  std::uint32_t seed_ = 0;
};

}  // namespace
}  // namespace sidp::nvshmem

int main(int argc, char** argv) {
  try {
    sidp::nvshmem::Check(argc > 1 && std::strcmp(argv[1], "serial") == 0).run();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kernels_check: %s\n", error.what());
    return 1;
  }
}
