// Placement: layers x world_size x budget -> owners, addresses and ring plans. Pure; every rank computes the same.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "sidp/types.hpp"

namespace sidp {

struct PlacementOptions {
  Rank world_size = 1;
  std::int32_t ring_slots = 2;                // upper bound; a rank never has more slots than streamed layers
  std::vector<LayerIndex> resident_layers{};  // kept on every rank
};

// One copy of a rank's step: layer `layer` lands at ring byte `offset` once slot `slot` is empty.
struct RingEntry {
  LayerIndex layer;
  std::int32_t slot;
  ByteCount offset;  // bytes from the start of the ring; fixed for the life of the pool
  ByteCount bytes;   // of the layer
  LayerIndex
      after_layer;  // the layer that must be released first (the slot's previous holder, in this step or the last)
};

// Slot of the k-th of `num_streamed` layers in a ring of `num_slots`: k mod num_slots, except that the last
// num_streamed mod num_slots layers are shifted so that neither they nor the head of the next step reuse a slot sooner
// than need be. Distances to the previous and next use are then at least (num_slots + remainder) / 2.
std::int32_t ring_slot(std::int32_t k, std::int32_t num_streamed, std::int32_t num_slots);

// Whom an owner's link serves next, of the ranks that wait for it: the first of last-1, last-2 ... (modulo
// world_size), or -1. last: whom it served last, at first the owner itself. With layers that go around the ranks,
// reader r+1 is then drawn one layer ahead of reader r, where each finds its next owner free.
Rank next_reader(Rank last, Rank world_size, const std::function<bool(Rank)>& waits);
// A free link is left for so much of a copy's time before one of those that wait is chosen: they come at one moment
// where each has waited for another.
inline constexpr int kLinkGraceShare = 128;

class Placement {
 public:
  // Whole layers, in order, each to the rank that holds fewest bytes so far (the lowest such rank). Equal layers give
  // owner = index mod world_size. No rank holds more than total/world_size + the largest layer.
  // layer_bytes: bytes of each layer, each above 0. Throws Error(kConfig) on an argument out of range.
  static Placement by_layer(std::span<const ByteCount> layer_bytes, const PlacementOptions& options);

  [[nodiscard]] Rank world_size() const { return world_size_; }
  [[nodiscard]] LayerIndex num_layers() const { return static_cast<LayerIndex>(layers_.size()); }
  [[nodiscard]] ByteCount layer_bytes(LayerIndex layer) const { return at(layer).bytes; }
  // -1 for a resident layer: every rank holds it.
  [[nodiscard]] Rank owner(LayerIndex layer) const { return at(layer).owner; }
  [[nodiscard]] bool is_resident(LayerIndex layer) const { return at(layer).owner < 0; }
  [[nodiscard]] bool is_local(Rank rank, LayerIndex layer) const { return is_resident(layer) || owner(layer) == rank; }
  // Bytes from the start of the owner's pool, or of every rank's resident area.
  [[nodiscard]] ByteCount offset(LayerIndex layer) const { return at(layer).offset; }
  [[nodiscard]] ByteCount pool_bytes(Rank rank) const;  // owned layers only
  [[nodiscard]] ByteCount resident_bytes() const { return resident_bytes_; }
  [[nodiscard]] std::vector<LayerIndex> streamed_layers(Rank rank) const;  // in order of use
  [[nodiscard]] std::vector<RingEntry> ring_plan(Rank rank) const;         // one entry a streamed layer
  [[nodiscard]] std::int32_t num_slots(Rank rank) const;
  [[nodiscard]] ByteCount slot_bytes(Rank rank) const;  // the largest streamed layer, aligned
  [[nodiscard]] ByteCount ring_bytes(Rank rank) const;

 private:
  struct Entry {
    ByteCount bytes;
    Rank owner;
    ByteCount offset;
  };
  [[nodiscard]] const Entry& at(LayerIndex layer) const;
  void check_rank(Rank rank) const;

  Rank world_size_ = 1;
  std::int32_t ring_slots_ = 2;
  ByteCount resident_bytes_ = 0;
  std::vector<Entry> layers_;
  std::vector<ByteCount> pool_bytes_;
};

}  // namespace sidp
