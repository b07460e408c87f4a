// The kernels of kernels.cu, loaded from the machine code that the build embedded.
#pragma once

#include "device.hpp"

namespace sidp::nvshmem {

// Where a GPU can (compute capability 9.0: "programmatic dependent launch", CUDA programming guide), a launch begins
// while the kernel in front of it ends; each waits for that end before it touches anything.
class Kernels {
 public:
  explicit Kernels(const Device& device);

  // The engine's turn on this GPU, see csrc/DESIGN.md; words of 64 bits, each 0 where it is not wanted.
  struct TurnWords {
    CUdeviceptr turn;           // 1 while the engine computes a layer of its own, in host memory
    CUdeviceptr launched_host;  // answers that the service has launched, in host memory
    CUdeviceptr served;         // of these the ones that were put, on the device
  };
  // Blocks of a put or take, which have a flag of 32 bits each where no block shall wait for another.
  static constexpr unsigned kMaxBlocks = 32;  // a quarter of an H200: the rest computes on
  static unsigned blocks_for(ByteCount bytes);

  struct PutWords {
    CUdeviceptr word;             // set once all bytes are there
    std::uint32_t value;          // to this
    CUdeviceptr finished;         // a zeroed word for this kernel's blocks; only one launch at a time may use it
    CUdeviceptr block_flags = 0;  // each set to 1 once its block's bytes are there; `word` is then set before all bytes
    unsigned blocks = 0;          // to launch; 0: as the bytes want
    CUdeviceptr withheld = 0;     // on the device, 64 bits: while it is not 0, block flags are not set
    CUdeviceptr turn = 0;         // of the engine, which ends
    CUdeviceptr served = 0;       // count of answers, on the device, and
    CUdeviceptr served_host = 0;  // for the host
  };
  // Copies `bytes` and sets words; all but `finished` may be 0.
  void put(CUstream stream, CUdeviceptr dst, CUdeviceptr src, ByteCount bytes, const PutWords& words) const;

  struct AwaitWords {
    CUdeviceptr flags;     // on the device, of a put's blocks
    unsigned count;        // of blocks, at most kMaxBlocks
    CUdeviceptr released;  // by the host, in host memory
    CUdeviceptr failed;    // set to 1 then; 64 bits
    bool resets = false;   // flags are set back to 0, unless released
  };
  // Waits, as one warp, for flags on the device, or for the host's release.
  void await(CUstream stream, const AwaitWords& words) const;

  // Begins the engine's turn: what follows on the stream waits for the services that were launched before.
  void turn(CUstream stream, const TurnWords& words) const;

  struct TakeWords {
    CUdeviceptr flag;           // of the answer or the host's release, in host memory
    CUdeviceptr rows_flags;     // of the request's put at the owner, and
    CUdeviceptr unanswered;     // what await() set if it failed; both 0 if it was the stream that waited for `flag`
    CUdeviceptr request;        // the requester's word at the owner, in host memory
    std::uint64_t sent_rows;    // of the request, for the counts
    std::uint64_t sent_bytes;   // likewise
    CUdeviceptr counts;         // on the device: answers, rows sent, bytes sent, 64 bits each
    CUdeviceptr counts_host;    // the same for the host
    CUdeviceptr failed_host;    // set when there was no answer
    CUdeviceptr finished;       // as for put
    std::uint64_t number;       // of the answer, for the host:
    CUdeviceptr answered_host;  // where it is stored, or 0
    TurnWords turn = {};        // begun here, or all 0
  };
  // Copies the rows of an answer out of its slot and frees the slot. Without an answer the copied bytes mean nothing.
  void take(CUstream stream, CUdeviceptr dst, CUdeviceptr src, ByteCount bytes, const TakeWords& words) const;

 private:
  struct Functions {
    CUfunction put, take, turn, await;
  };
  static const Functions& functions(const Device& device);
  void launch(CUfunction kernel, unsigned blocks, unsigned threads, CUstream stream, void** arguments,
              const char* name) const;

  const Device& device_;
  const Functions& functions_;
  bool early_ = false;  // launches may begin before the kernel in front of them has ended
};

}  // namespace sidp::nvshmem
