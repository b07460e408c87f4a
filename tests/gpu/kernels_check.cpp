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
#include "check_channel.hpp"

namespace sidp::nvshmem {
namespace {

// Of a request: bytes, and how far the source and the destination are from an alignment of 16.
struct Shape {
  ByteCount bytes;
  ByteCount src_offset = 0, dst_offset = 0;
  [[nodiscard]] std::string text() const {
    return std::to_string(bytes) + " bytes from +" + std::to_string(src_offset) + " to +" + std::to_string(dst_offset);
  }
};

class Check : CheckChannel {
 public:
  explicit Check(bool serial) : CheckChannel(serial) {}

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
      for (const bool borrowed : {false, true}) {
        take(shape, kAnswered, /*spun=*/true, borrowed);
        take(shape, kNotAnswered, /*spun=*/true, borrowed);
      }
    }
    put_sets_its_word_last();
    await_needs_every_flag();
    await_wants_its_epoch();
    one_sided();
    turns();
    for (int i = 0; i < 20; ++i) exchange(i % 4 == 3);
    // numbers go over from the largest to 1
    for (std::uint32_t i = 0, epoch = kNobodyWaits - 9; i < 20; ++i, epoch = next(epoch))
      spun_exchange(epoch, i % 4 == 3, i % 3 == 0);
    std::printf("%zu shapes and 40 exchanges of rows are right\n", shapes.size());
  }

 private:
  void put(const Shape& shape) {
    const std::string what = "put of " + shape.text();
    for (const unsigned blocks : {0U, 1U, Kernels::kMaxBlocks})
      for (const bool withheld : {false, true}) {
        const Bytes rows = pattern(shape.bytes);
        const Filled src(*this, shape.src_offset, rows);
        const Guarded dst(*this, shape.dst_offset, shape.bytes);
        set(kRequest, 0);
        const std::uint32_t epoch = seed() % 3 == 0 ? 0 : seed();  // its own, or none
        set_flags(block_flags_, Kernels::kMaxBlocks, epoch);
        set_epochs(epoch, 0);
        set_verdict(kWithheld, withheld ? 1 : 0);
        kernels_.put(engine_.get(), dst.at(), src.at, shape.bytes,
                     {.word = words_.at(kRequest),
                      .value = kRequested,
                      .finished = finished_.at(0),
                      .block_flags = block_flags_.at(0),
                      .epoch = epoch != 0 ? epochs_.at(kEpoch) : 0,
                      .blocks = blocks,
                      .withheld = verdicts_.at(kWithheld)});
        engine_.synchronize();
        dst.expect(rows, what + " in blocks");
        require(word(kRequest) == kRequested, what + " in blocks: wrong word");
        const unsigned launched = blocks != 0 ? blocks : Kernels::blocks_for(shape.bytes);
        expect_flags(block_flags_, withheld ? 0 : launched, what + " in blocks", epoch + 1, epoch);
      }
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

  // borrowed: they stay where they are.
  void take(const Shape& shape, std::uint32_t reply, bool spun = false, bool borrowed = false) {
    const std::string what = "take of " + shape.text() + (reply == kAnswered ? "" : " that were not answered") +
                             (borrowed ? ", borrowed"
                              : spun   ? ", spun for"
                                       : "");
    const Bytes rows = pattern(shape.bytes);
    const Filled src(*this, shape.src_offset, rows);
    const Guarded dst(*this, shape.dst_offset, shape.bytes);
    set(kRequest, kRequested & 0x7FFFFFFF);
    if (!spun) set(kReply, reply);
    const unsigned blocks = spun ? 1 + seed() % Kernels::kMaxBlocks : 0;
    const std::uint32_t epoch = seed();
    set_epochs(epoch, epoch);
    set_verdict(kUnanswered, 0);
    set_verdict(kWithheld, 0);
    const auto begin = [&] { launch_take(borrowed ? 0 : dst.at(), src.at, shape.bytes, 3, false, blocks); };
    if (spun && !serial_) begin();  // and then it waits
    if (spun && reply == kAnswered)
      launch_put(service_, dst.at(), src.at, 0, 0, 0, reply_flags_.at(0), blocks);
    else
      set(kReply, reply);
    service_.synchronize();
    if (!spun || serial_) begin();
    engine_.synchronize();
    expect_flags(reply_flags_, 0, what + ", reply flags");
    expect_epochs(!spun ? epoch : reply == kAnswered ? epoch + 1 : kNobodyWaits, epoch, what);
    if (reply == kAnswered) dst.expect(borrowed ? Bytes(shape.bytes, kUntouched) : rows, what);
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
    expect_block_flags_last();
    set(kRequest, 0);
  }

  // With flags in host memory: each block's, and then at once every byte.
  void expect_block_flags_last() {
    constexpr ByteCount kBytes = 655363;
    const HostMemory dst(device_, kBytes), flags(device_, kFlagBytes);
    for (int i = 0; i < 20; ++i) {
      const Bytes rows = pattern(kBytes);
      const Filled src(*this, 0, rows);
      std::memset(flags.data(), 0, kFlagBytes);
      launch_put(engine_, dst.at(0), src.at, kBytes, words_.at(kRequest), kRequested, flags.at(0));
      const auto start = Clock::now();
      for (unsigned block = 0; block < Kernels::kMaxBlocks; ++block)
        while (flags.word<std::uint32_t>(block * 4).load() == 0)
          require(Clock::now() - start < kDeadline, "put into host memory: a block's flag was not set");
      require(std::equal(rows.begin(), rows.end(), dst.data()), "put into host memory: a flag came before its bytes");
      engine_.synchronize();
    }
  }

  // A wait for three blocks goes on with the third, whichever comes last.
  void await_needs_every_flag() {
    for (unsigned missing = 0; missing < 3; ++missing) {
      const HostMemory one(device_, 4);
      one.word<std::uint32_t>(0) = 1;
      const std::uint32_t some[] = {missing != 0, missing != 1, missing != 2};
      write(reply_flags_.at(0), some, sizeof some);
      set_verdict(kUnanswered, 0);
      if (!serial_) {
        launch_await(3);
        std::this_thread::sleep_for(Milliseconds(2));
        require(!engine_.idle(), "a wait ended although a block's flag was not set");
      }
      device_.check(device_.api().cuMemcpyAsync(reply_flags_.at(4 * missing), one.at(0), 4, service_.get()), "copy");
      service_.synchronize();
      if (serial_) launch_await(3);
      engine_.synchronize();
      expect_flags(reply_flags_, 0, "a wait for three blocks");
      require(!verdict(kUnanswered), "a wait that was not released says so");
    }
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
    for (const char* const how :
         {"turn", "turn that begins with an answer", "turn that begins with a borrowed answer"}) {
      const std::string what = how;
      const bool borrowed = what.ends_with("borrowed answer");
      set_verdict(kUnanswered, 0);
      const auto begin = [&] {
        set(kReply, borrowed ? 0 : kAnswered);
        if (borrowed) set_flags(reply_flags_, 1);
        if (what != "turn")
          launch_take(borrowed ? 0 : dst.at(), rows.at, 64, 1, true, borrowed ? 1 : 0);
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

  // The same with the bell before the rows, in blocks; or the host ends the wait for the rows: no answer, and then for
  // it.
  void spun_exchange(std::uint32_t epoch, bool released, bool borrowed) {
    const std::string what = std::string(released ? "spun request that the host released" : "spun exchange") +
                             (borrowed ? " of a borrowed answer" : "");
    constexpr ByteCount kRows = 64, kFirst = 32 * 5120, kBytes = kRows * 5120 * 2;
    const unsigned blocks = Kernels::blocks_for(kBytes);
    const Bytes x = pattern(kBytes);
    const Filled rows(*this, 0, x);
    const Guarded slot(*this, 0, kBytes), reply(*this, 0, kBytes), y(*this, 0, kBytes);
    set_verdict(kUnanswered, 0);
    set_verdict(kWithheld, 0);
    set_epochs(epoch, epoch);
    set_flags(block_flags_, Kernels::kMaxBlocks, epoch);
    const auto ask = [&] {
      if (!released)
        launch_put(engine_, slot.at(), rows.at, kBytes, words_.at(kRequest), kRequested, block_flags_.at(0));
      else
        set(kRequest, kRequested);  // and its rows never come
    };
    const auto answer = [&] {
      launch_await_rows(blocks);
      launch_put(service_, reply.at(), slot.at(), kFirst, 0);
      launch_put(service_, reply.at() + kFirst, slot.at() + kFirst, kBytes - kFirst, 0, 0, reply_flags_.at(0), blocks);
    };
    const auto take_it = [&] { launch_take(borrowed ? 0 : y.at(), reply.at(), kBytes, kRows, false, blocks); };
    ask();
    if (!serial_) take_it();
    await(kRequest, kRequested, what);
    set(kRequest, kRequested & 0x7FFFFFFF);  // taken
    if (!serial_) answer();
    if (released) {
      std::this_thread::sleep_for(Milliseconds(5));
      require(serial_ || !service_.idle(), what + ": its op did not wait for the rows");
      set(kReleased, 1);
      set(kReply, kNotAnswered);
    }
    if (serial_) answer();
    if (serial_) take_it();
    engine_.synchronize();
    service_.synchronize();
    require(verdict(kWithheld) == released && verdict(kUnanswered) == released, what + ": wrong verdicts");
    if (!released) slot.expect(x, what + ", request slot");
    if (!released) (borrowed ? reply : y).expect(x, what);
    expect_flags(block_flags_, released ? 0 : blocks, what + ", flags of the request", next(epoch), epoch);
    if (released)
      expect_epochs(kNobodyWaits, epoch, what);
    else
      expect_epochs(next(epoch), next(epoch), what);
    expect_flags(reply_flags_, 0, what + ", reply flags");
    set(kReleased, 0);
    expect_taken(!released, what);
  }
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
