#include "workload.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <set>

#include "sidp/error.hpp"

namespace sidp::test {

namespace {

constexpr auto kRefused = std::byte{0xEE};
// Several rows of "mix" take several blocks of a GPU's put (8192 bytes), its way there another number than back.
constexpr ByteCount kInBytes[] = {3600, 40};
constexpr ByteCount kOutBytes[] = {4120, 8};
constexpr const char* kNames[] = {"mix", "sum"};

std::uint64_t scramble(std::uint64_t x) {
  x = (x ^ (x >> 31)) * 0x7fb5d329728ea185u;
  x = (x ^ (x >> 27)) * 0x81dadef4bc2dd44du;
  return x ^ (x >> 33);
}

std::vector<std::byte> layer_pattern(LayerIndex layer, ByteCount bytes) {
  std::vector<std::byte> pattern(bytes);
  for (std::size_t i = 0; i < pattern.size(); i += 8) {
    const std::uint64_t word = scramble((static_cast<std::uint64_t>(layer) + 1) << 32 | i);
    std::memcpy(pattern.data() + i, &word, std::min<std::size_t>(8, pattern.size() - i));
  }
  return pattern;
}

// y of one op: every byte depends on the whole layer, on the row and on the op.
void compute(std::uint64_t digest, OpIndex op, const std::byte* x, std::int64_t rows, std::byte* y) {
  const auto o = static_cast<std::size_t>(op);
  for (std::int64_t r = 0; r < rows; ++r, x += kInBytes[o], y += kOutBytes[o])
    for (std::size_t i = 0; i < kOutBytes[o]; ++i)
      y[i] =
          x[i % kInBytes[o]] ^ static_cast<std::byte>(scramble(digest + o) >> (i % 8 * 8)) ^ static_cast<std::byte>(i);
}

std::uint64_t digest_of(std::uint64_t digest, const std::byte* data, ByteCount bytes) {
  for (ByteCount i = 0; i < bytes; ++i) digest = (digest ^ static_cast<std::uint64_t>(data[i])) * 0x100000001b3u;
  return digest;
}

class WorkloadKernel final : public OpKernel {
 public:
  WorkloadKernel(OpIndex op, ByteCount bytes, std::function<void()> pause)
      : op_(op), bytes_(bytes), pause_(std::move(pause)) {}
  void run(const std::byte* layer, const std::byte* x, std::int64_t rows, std::byte* y) const override {
    if (x[0] == kRefused) throw std::runtime_error("this row is refused");
    const ByteCount half = bytes_ / 2;
    const std::uint64_t digest = digest_of(1, layer, half);
    compute(digest, op_, x, rows, y);  // overwritten: a reply sent too early shows
    pause_();
    compute(digest_of(digest, layer + half, bytes_ - half), op_, x, rows, y);
  }

 private:
  OpIndex op_;
  ByteCount bytes_;
  std::function<void()> pause_;
};

}  // namespace

MachineProfile cas_profile() {
  return {.copy_bytes_per_s = 1e-9, .round_trip_us = 1e-6, .memory_bytes_per_s = 1e18, .flops_per_s = 1e24};
}

std::vector<std::int64_t> WorkloadSpec::row_buckets(std::int64_t spin_rows) const {
  const std::set<std::int64_t> buckets{1, std::clamp<std::int64_t>(spin_rows, 1, max_rows), max_rows};
  return {buckets.begin(), buckets.end()};
}

Placement WorkloadSpec::placement() const {
  return Placement::by_layer(layer_bytes,
                             {.world_size = world_size, .ring_slots = ring_slots, .resident_layers = resident});
}

std::string WorkloadSpec::manifest() const {
  std::string text;
  for (const ByteCount bytes : layer_bytes) text += "layer of " + std::to_string(bytes) + " bytes\n";
  return text;
}

Workload::Workload(std::shared_ptr<Backend> backend, const WorkloadSpec& spec, WorkloadHooks hooks)
    : spec_(spec), hooks_(std::move(hooks)) {
  const Rank rank = backend->rank();
  pool_ = std::make_shared<WeightPool>(std::move(backend), spec.placement(), spec.manifest());
  plan_ = pool_->placement().ring_plan(rank);
  for (std::size_t i = 0; i < spec.layer_bytes.size(); ++i) {
    const auto layer = static_cast<LayerIndex>(i);
    expected_.push_back(layer_pattern(layer, spec.layer_bytes[i]));
    if (pool_->is_local(layer)) std::memcpy(pool_->local_layer(layer), expected_[i].data(), expected_[i].size());
  }
  pool_->publish();
}

std::vector<Op> Workload::ops() const {
  std::vector<Op> ops;
  for (std::size_t o = 0; o < std::size(kNames); ++o) {
    Op op{kNames[o], kNames[o], kInBytes[o], kOutBytes[o], {}};
    for (std::size_t i = 0; i < spec_.layer_bytes.size(); ++i)
      op.kernels.push_back(o == 1 && i % 2 == 1 ? nullptr
                                                : std::make_shared<WorkloadKernel>(static_cast<OpIndex>(o),
                                                                                   spec_.layer_bytes[i], hooks_.pause));
    ops.push_back(std::move(op));
  }
  return ops;
}

Mode Workload::step(Runtime& runtime, const StepPlan& plan, std::mt19937_64& random) {
  const Mode mode = runtime.begin_step(hooks_.stream, plan.num_tokens).mode;
  forward(runtime, mode, plan.break_at, random);
  runtime.end_step(/*broken_off=*/plan.break_at >= 0);
  return mode;
}

void Workload::forward(Runtime& runtime, Mode mode, LayerIndex break_at, std::mt19937_64& random) {
  held_.clear();
  for (LayerIndex layer = 0; layer < pool_->placement().num_layers(); ++layer) {
    if (layer == break_at) return;
    if (pool_->is_local(layer)) {
      check_on_stream(layer, runtime.fetch_layer(hooks_.stream, layer), "local");
      runtime.release_layer(hooks_.stream, layer);
    } else if (mode == Mode::kWas) {
      use_was(runtime, layer, random);
    } else {
      use_cas(runtime, layer, random);
    }
  }
  while (!held_.empty()) release(runtime, held_.back().layer);
}

void Workload::use_was(Runtime& runtime, LayerIndex layer, std::mt19937_64& random) {
  const auto entry = std::find_if(plan_.begin(), plan_.end(), [&](const auto& e) { return e.layer == layer; });
  const auto holder = std::find_if(held_.begin(), held_.end(), [&](const Held& h) { return h.slot == entry->slot; });
  if (holder != held_.end()) release(runtime, holder->layer);
  const std::byte* bytes = runtime.fetch_layer(hooks_.stream, layer);
  check_on_stream(layer, bytes, "fetched");
  held_.push_back({layer, entry->slot, bytes});
  hooks_.pause();
  // Some layers are held while the next ones are fetched, and released in another order.
  while (!held_.empty() && random() % 3 != 0) release(runtime, held_[random() % held_.size()].layer);
}

void Workload::release(Runtime& runtime, LayerIndex layer) {
  const auto held = std::find_if(held_.begin(), held_.end(), [&](const Held& h) { return h.layer == layer; });
  hooks_.pause();
  check_on_stream(layer, held->bytes, "before its release");
  held_.erase(held);
  runtime.release_layer(hooks_.stream, layer);
}

void Workload::use_cas(Runtime& runtime, LayerIndex layer, std::mt19937_64& random) {
  request(runtime, layer, 0, random);
  if (layer % 2 == 0) request(runtime, layer, 1, random);
}

void Workload::request(Runtime& runtime, LayerIndex layer, OpIndex op, std::mt19937_64& random) {
  const auto o = static_cast<std::size_t>(op);
  const auto rows = 1 + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(spec_.max_rows));
  const auto room = static_cast<std::size_t>(runtime.mailbox()->bucket(layer, rows));
  const auto x = std::make_shared<std::vector<std::byte>>(static_cast<std::size_t>(rows) * kInBytes[o]);
  for (std::byte& value : *x) value = static_cast<std::byte>(random() % 0xEE);
  const bool refused = random() % 16 == 0 && hooks_.refuse;
  if (refused) (*x)[0] = kRefused;
  const auto y = std::make_shared<std::vector<std::byte>>(room * kOutBytes[o], std::byte{0xCD});
  const std::byte* const lent = random() % 2 == 0 ? runtime.lent(layer, rows) : nullptr;
  hooks_.before_request(pool_->placement().owner(layer));
  const std::string what = "op " + std::to_string(op) + " of layer " + std::to_string(layer);
  try {
    runtime.remote_compute(hooks_.stream, layer, op, x->data(), rows, lent != nullptr ? nullptr : y->data());
  } catch (const std::runtime_error& error) {
    if (refused && std::strstr(error.what(), "this row is refused") != nullptr) return;
    throw;
  }
  if (refused) throw Mismatch(what + " answered rows that it must refuse");
  hooks_.on_stream([this, layer, op, rows, x, y, lent, what, o] {
    const auto& weights = expected_[static_cast<std::size_t>(layer)];
    std::vector<std::byte> expected(static_cast<std::size_t>(rows) * kOutBytes[o]);
    compute(digest_of(1, weights.data(), weights.size()), op, x->data(), rows, expected.data());
    if (!std::equal(expected.begin(), expected.end(), lent != nullptr ? lent : y->data()))
      throw Mismatch(what + " gave wrong rows");
  });
}

void Workload::check_on_stream(LayerIndex layer, const std::byte* bytes, const char* when) const {
  hooks_.on_stream([this, layer, bytes, when] { check_layer(layer, bytes, when); });
}

void Workload::check_layer(LayerIndex layer, const std::byte* bytes, const char* when) const {
  const auto& expected = expected_[static_cast<std::size_t>(layer)];
  if (std::memcmp(expected.data(), bytes, expected.size()) == 0) return;
  const auto differ = std::mismatch(expected.begin(), expected.end(), bytes);
  throw Mismatch("layer " + std::to_string(layer) + " is wrong at byte " +
                 std::to_string(differ.first - expected.begin()) + " of " + std::to_string(expected.size()) + ", " +
                 when);
}

}  // namespace sidp::test
