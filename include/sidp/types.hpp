// Words and units shared by the whole runtime.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace sidp {

using Rank = std::int32_t;        // a replica of the group, 0 .. world_size-1
using LayerIndex = std::int32_t;  // position of a layer in the pool, 0 .. num_layers-1
using OpIndex = std::int32_t;     // position of an op in the table that all ranks registered alike
using ByteCount = std::uint64_t;
using Milliseconds = std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

// Alignment in bytes of layers in a pool and of slots in a ring.
inline constexpr ByteCount kAlignment = 256;

constexpr ByteCount align_up(ByteCount bytes, ByteCount alignment = kAlignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

// How the streamed layers of one step are used; fixed when the step begins.
enum class Mode : std::uint8_t {
  kWas,  // Weight-as-a-Service: layers are copied into the ring ahead of use
  kCas,  // Compute-as-a-Service: activations are sent to the owner of the layer
};
constexpr std::size_t index(Mode mode) { return static_cast<std::size_t>(mode); }  // of arrays by mode

constexpr std::string_view to_string(Mode mode) { return mode == Mode::kWas ? "was" : "cas"; }

// The caller's stream. On the host backend work runs in the calling thread and the handle is ignored; on a
// GPU backend it is a CUstream and calls only enqueue.
struct Stream {
  void* handle = nullptr;
};

}  // namespace sidp
