#include "sidp/placement.hpp"

#include <algorithm>
#include <string>

#include "sidp/error.hpp"

namespace sidp {

std::int32_t ring_slot(std::int32_t k, std::int32_t num_streamed, std::int32_t num_slots) {
  const std::int32_t remainder = num_streamed % num_slots;
  if (num_streamed <= num_slots || k < num_streamed - remainder) return k % num_slots;
  return k % num_slots + (num_slots - remainder) / 2;
}

Placement Placement::by_layer(std::span<const ByteCount> layer_bytes, const PlacementOptions& options) {
  if (options.world_size < 1)
    throw Error(ErrorCode::kConfig, "world_size is " + std::to_string(options.world_size) + ", must be at least 1");
  if (options.ring_slots < 1)
    throw Error(ErrorCode::kConfig, "ring_slots is " + std::to_string(options.ring_slots) + ", must be at least 1");
  if (layer_bytes.empty()) throw Error(ErrorCode::kConfig, "a placement needs at least one layer");
  std::vector<bool> resident(layer_bytes.size(), false);
  for (const LayerIndex layer : options.resident_layers) {
    if (layer < 0 || static_cast<std::size_t>(layer) >= layer_bytes.size())
      throw Error(ErrorCode::kConfig,
                  "resident layer " + std::to_string(layer) + " is not one of the " +
                      std::to_string(layer_bytes.size()) + " layers",
                  {.layer = layer});
    resident[static_cast<std::size_t>(layer)] = true;
  }
  // Sums stay far below where they would wrap around, rings of many slots included.
  constexpr ByteCount kMostBytes = ByteCount{1} << 60;
  ByteCount total = 0;
  for (std::size_t i = 0; i < layer_bytes.size(); ++i) {
    if (layer_bytes[i] > kMostBytes || (total += align_up(layer_bytes[i])) > kMostBytes)
      throw Error(ErrorCode::kConfig,
                  "layers 0 to " + std::to_string(i) + " exceed " + std::to_string(kMostBytes) + " bytes",
                  {.layer = static_cast<std::int64_t>(i)});
  }
  Placement placement;
  placement.world_size_ = options.world_size;
  placement.ring_slots_ = options.ring_slots;
  placement.pool_bytes_.assign(static_cast<std::size_t>(options.world_size), 0);
  for (std::size_t i = 0; i < layer_bytes.size(); ++i) {
    if (layer_bytes[i] == 0)
      throw Error(ErrorCode::kConfig, "layer " + std::to_string(i) + " has 0 bytes",
                  {.layer = static_cast<std::int64_t>(i)});
    const ByteCount bytes = align_up(layer_bytes[i]);
    if (resident[i]) {
      placement.layers_.push_back({layer_bytes[i], -1, placement.resident_bytes_});
      placement.resident_bytes_ += bytes;
      continue;
    }
    const auto least = std::min_element(placement.pool_bytes_.begin(), placement.pool_bytes_.end());
    placement.layers_.push_back({layer_bytes[i], static_cast<Rank>(least - placement.pool_bytes_.begin()), *least});
    *least += bytes;
  }
  return placement;
}

const Placement::Entry& Placement::at(LayerIndex layer) const {
  if (layer < 0 || static_cast<std::size_t>(layer) >= layers_.size())
    throw Error(
        ErrorCode::kUnknownName,
        "layer " + std::to_string(layer) + " is not one of the pool's layers 0 to " + std::to_string(num_layers() - 1),
        {.layer = layer});
  return layers_[static_cast<std::size_t>(layer)];
}

void Placement::check_rank(Rank rank) const {
  if (rank < 0 || rank >= world_size_)
    throw Error(ErrorCode::kConfig,
                "rank " + std::to_string(rank) + " is not one of 0 to " + std::to_string(world_size_ - 1),
                {.rank = rank});
}

Rank next_reader(Rank last, Rank world_size, const std::function<bool(Rank)>& waits) {
  for (Rank distance = 1; distance <= world_size; ++distance)
    if (const Rank reader = (last - distance + world_size) % world_size; waits(reader)) return reader;
  return -1;
}

ByteCount Placement::pool_bytes(Rank rank) const {
  check_rank(rank);
  return pool_bytes_[static_cast<std::size_t>(rank)];
}

std::vector<LayerIndex> Placement::streamed_layers(Rank rank) const {
  check_rank(rank);
  std::vector<LayerIndex> streamed;
  for (LayerIndex layer = 0; layer < num_layers(); ++layer)
    if (!is_local(rank, layer)) streamed.push_back(layer);
  return streamed;
}

std::int32_t Placement::num_slots(Rank rank) const {
  return std::min(ring_slots_, static_cast<std::int32_t>(streamed_layers(rank).size()));
}

ByteCount Placement::slot_bytes(Rank rank) const {
  ByteCount largest = 0;
  for (const LayerIndex layer : streamed_layers(rank)) largest = std::max(largest, align_up(layer_bytes(layer)));
  return largest;
}

ByteCount Placement::ring_bytes(Rank rank) const { return slot_bytes(rank) * static_cast<ByteCount>(num_slots(rank)); }

std::vector<RingEntry> Placement::ring_plan(Rank rank) const {
  const auto streamed = streamed_layers(rank);
  const auto count = static_cast<std::int32_t>(streamed.size());
  const std::int32_t slots = num_slots(rank);
  const ByteCount stride = slot_bytes(rank);
  std::vector<RingEntry> plan;
  plan.reserve(streamed.size());
  std::vector<LayerIndex> holder(static_cast<std::size_t>(slots), -1);
  for (std::int32_t k = 0; k < count; ++k) {
    const std::int32_t slot = ring_slot(k, count, slots);
    const LayerIndex layer = streamed[static_cast<std::size_t>(k)];
    auto& held = holder[static_cast<std::size_t>(slot)];
    plan.push_back({layer, slot, stride * static_cast<ByteCount>(slot), layer_bytes(layer), held});
    held = layer;
  }
  // The first user of a slot follows the slot's last holder of the step before.
  for (auto& entry : plan)
    if (entry.after_layer < 0) entry.after_layer = holder[static_cast<std::size_t>(entry.slot)];
  return plan;
}

}  // namespace sidp
