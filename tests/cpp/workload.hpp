// An engine for tests: layers of known bytes and steps that check every byte they were given. Runs on any backend.
#pragma once

#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "sidp/runtime.hpp"

namespace sidp::test {

// Bytes or rows were not what they have to be.
struct Mismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct WorkloadSpec {
  Rank world_size = 2;
  std::vector<ByteCount> layer_bytes;
  std::int32_t ring_slots = 2;
  std::vector<LayerIndex> resident{};
  std::int64_t max_rows = 2;

  // Of requests on a GPU: one, the most that are announced before their rows, all.
  [[nodiscard]] std::vector<std::int64_t> row_buckets(std::int64_t spin_rows) const;
  [[nodiscard]] Placement placement() const;
  [[nodiscard]] std::string manifest() const;
};

struct WorkloadHooks {
  std::function<void()> pause = [] {};  // where others may run: inside an op, between fetch and release
  std::function<void(Rank)> before_request = [](Rank) {};
  Stream stream{};  // of the steps
  // Does something once what is queued on the stream is done: checks, on a backend where calls only enqueue.
  std::function<void(std::function<void()>)> on_stream = [](const std::function<void()>& work) { work(); };
  bool refuse = true;  // some rows are refused by their op
};

struct StepPlan {
  std::int64_t num_tokens = 1;
  LayerIndex break_at = -1;  // break the step off before this layer; -1: go through
};

class Workload {
 public:
  // Collective: makes the pool, writes this rank's layers, publishes.
  Workload(std::shared_ptr<Backend> backend, const WorkloadSpec& spec, WorkloadHooks hooks);

  [[nodiscard]] const std::shared_ptr<WeightPool>& pool() const { return pool_; }
  // Two ops: "mix" of every layer and "sum" of those with an even index. A row that starts with kRefused is refused.
  [[nodiscard]] std::vector<Op> ops() const;
  // One step, in the mode that the runtime decides. Throws Mismatch, or what the runtime throws.
  Mode step(Runtime& runtime, const StepPlan& plan, std::mt19937_64& random);
  // The layers of an open step up to break_at, in its mode.
  void forward(Runtime& runtime, Mode mode, LayerIndex break_at, std::mt19937_64& random);
  void use_stream(Stream stream) { hooks_.stream = stream; }

 private:
  void use_was(Runtime& runtime, LayerIndex layer, std::mt19937_64& random);
  void use_cas(Runtime& runtime, LayerIndex layer, std::mt19937_64& random);
  void request(Runtime& runtime, LayerIndex layer, OpIndex op, std::mt19937_64& random);
  void check_layer(LayerIndex layer, const std::byte* bytes, const char* when) const;
  void check_on_stream(LayerIndex layer, const std::byte* bytes, const char* when) const;
  void release(Runtime& runtime, LayerIndex layer);

  struct Held {
    LayerIndex layer;
    std::int32_t slot;
    const std::byte* bytes;
  };
  WorkloadSpec spec_;
  WorkloadHooks hooks_;
  std::shared_ptr<WeightPool> pool_;
  std::vector<RingEntry> plan_;
  std::vector<std::vector<std::byte>> expected_;  // by layer
  std::vector<Held> held_;
};

// A profile with which the policy chooses CaS whenever it can (peers answer, rows fit), whatever the clock says.
MachineProfile cas_profile();

}  // namespace sidp::test
