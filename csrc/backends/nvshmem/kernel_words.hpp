// Words that kernels.cu is told of by whoever launches it. Addresses are the device's; 0 where a word is not wanted.
#pragma once

#include <cstdint>

namespace sidp::nvshmem {

using WordAddress = std::uint64_t;  // a CUdeviceptr

// The engine's turn on this GPU, see csrc/DESIGN.md; words of 64 bits.
struct TurnWords {
  WordAddress turn;           // 1 while the engine computes a layer of its own, in host memory
  WordAddress launched_host;  // answers that the service has launched, in host memory
  WordAddress served;         // of these the ones that were put, on the device
};

// What has been answered by one owner, of 64 bits each.
struct Counts {
  std::uint64_t answers, rows, bytes;
};

// Rows flags are not set back: those of a request are set to the epoch that follows the one of the last request that
// was answered. Epochs go from 1 to the last before this and then on with 1; flags start at 0. After a request without
// an answer it is this for good: then nobody waits for rows.
constexpr std::uint32_t kNobodyWaits = 0xFFFFFFFF;

// Of a request, for the kernel that ends it at its requester.
struct RequestWords {
  WordAddress flag;     // of the answer or the host's release, in host memory; set back to 0
  WordAddress request;  // the requester's word at the owner, in host memory; set back to 0
  WordAddress epoch;    // of rows flags at this owner, on the device; 0: the request had none
  WordAddress
      unanswered;  // what sidp_await sets when it fails, on the device; 0: it was the stream that waited for `flag`
  std::uint64_t sent_rows;    // for the counts
  std::uint64_t sent_bytes;   // likewise
  WordAddress counts;         // on the device
  WordAddress counts_host;    // the same for the host
  WordAddress failed_host;    // set when there was no answer
  std::uint64_t number;       // of the answer, for the host:
  WordAddress answered_host;  // where it is stored
  TurnWords turn;             // begun here, because a layer of the engine's own comes next; or all 0
};

}  // namespace sidp::nvshmem
