// The kernels of kernels.cu, loaded from the machine code that the build embedded.
#pragma once

#include "device.hpp"
#include "kernel_words.hpp"

namespace sidp::nvshmem {

// Where a GPU can (compute capability 9.0: "programmatic dependent launch", CUDA programming guide), a launch begins
// while the kernel in front of it ends; each waits for that end before it touches anything.
class Kernels {
 public:
  explicit Kernels(const Device& device);

  // Blocks of a put or take, which have a flag of 32 bits each where no block shall wait for another.
  static constexpr unsigned kMaxBlocks = 32;  // a quarter of an H200: the rest computes on
  static unsigned blocks_for(ByteCount bytes);

  struct PutWords {
    CUdeviceptr word;             // set once all bytes are there
    std::uint32_t value;          // to this
    CUdeviceptr finished;         // a zeroed word for this kernel's blocks; only one launch at a time may use it
    CUdeviceptr block_flags = 0;  // each set once its block's bytes are there; `word` is then set before all bytes
    CUdeviceptr epoch = 0;        // on the device: flags are set to what follows it; 0: they are set to 1
    unsigned blocks = 0;          // to launch; 0: as the bytes want
    CUdeviceptr withheld = 0;     // on the device, 64 bits: while it is not 0, block flags are not set
    CUdeviceptr turn = 0;         // of the engine, which ends
    CUdeviceptr served = 0;       // count of answers, on the device, and
    CUdeviceptr served_host = 0;  // for the host
  };
  // Copies `bytes` and sets words; all but `finished` may be 0.
  void put(CUstream stream, CUdeviceptr dst, CUdeviceptr src, ByteCount bytes, const PutWords& words) const;

  struct AwaitWords {
    CUdeviceptr flags;      // on the device, of a put's blocks
    unsigned count;         // of blocks, at most kMaxBlocks
    CUdeviceptr released;   // by the host, in host memory
    CUdeviceptr failed;     // set to 1 then; 64 bits
    bool resets = false;    // flags are set back to 0, unless released
    CUdeviceptr epoch = 0;  // on the device: set flags are what follows it; 0: they are 1
    CUdeviceptr seen = 0;   // where that is stored once they are: the same word, or one on another GPU
  };
  // Waits, as one warp, for flags on the device, or for the host's release. request: ended then, and its answer stays
  // in its slot; all 0: take() follows, or it is none.
  void await(CUstream stream, const AwaitWords& words, const RequestWords& request = {}) const;

  // Begins the engine's turn: what follows on the stream waits for the services that were launched before.
  void turn(CUstream stream, const TurnWords& words) const;

  // Copies the rows of an answer out of its slot and frees the slot. Without an answer the copied bytes mean nothing.
  // finished: as for put.
  void take(CUstream stream, CUdeviceptr dst, CUdeviceptr src, ByteCount bytes, CUdeviceptr finished,
            const RequestWords& request) const;

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
