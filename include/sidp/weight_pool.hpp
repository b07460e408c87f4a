// WeightPool: one copy of the weights in a group. Owned layers lie in symmetric memory, resident layers and the ring
// in local memory.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "sidp/backend.hpp"
#include "sidp/placement.hpp"

namespace sidp {

class WeightPool {
 public:
  // Collective. `manifest` is canonical text, one line a tensor, compared on all ranks together with the placement
  // before anything is allocated; on a difference every rank throws Error(kManifestMismatch) naming the first line that
  // differs. Throws Error(kCapacity) on all ranks if one cannot allocate.
  WeightPool(std::shared_ptr<Backend> backend, Placement placement, const std::string& manifest);

  [[nodiscard]] Backend& backend() const { return *backend_; }
  [[nodiscard]] const Placement& placement() const { return placement_; }
  [[nodiscard]] bool owns(LayerIndex layer) const { return placement_.owner(layer) == backend_->rank(); }
  [[nodiscard]] bool is_local(LayerIndex layer) const { return placement_.is_local(backend_->rank(), layer); }

  // First byte of a local layer, aligned to kAlignment; write before publish(), read afterwards.
  // Throws Error(kUsage) for a layer that another rank owns.
  [[nodiscard]] std::byte* local_layer(LayerIndex layer) const;
  // First byte of a streamed layer at its owner as mapped here, or nullptr without a direct mapping.
  [[nodiscard]] const std::byte* peer_layer(LayerIndex layer) const;
  // Where the layer would lie in this rank's own piece: how a transport without mappings names the owner's bytes.
  [[nodiscard]] const std::byte* symmetric_layer(LayerIndex layer) const {
    return owned_->local() + placement_.offset(layer);
  }
  [[nodiscard]] std::byte* ring() const;  // ring_bytes(rank) bytes; nullptr if nothing is streamed

  // Collective: this rank's layers are final; returns when all ranks' are. Owned and resident layers must not be
  // written afterwards.
  void publish();
  [[nodiscard]] bool published() const { return published_; }
  // A pool serves one runtime: its lane and service leave ring and flags in mid-order. Error(kUsage) the second time.
  void check_unclaimed() const;
  void claim();

  // Flags: ring slots first, then request flags by requester, then reply flags by owner.
  [[nodiscard]] std::uint32_t slot_flag(std::int32_t slot) const { return static_cast<std::uint32_t>(slot); }
  [[nodiscard]] std::uint32_t request_flag(Rank requester) const {
    return first_request_flag_ + static_cast<std::uint32_t>(requester);
  }
  [[nodiscard]] std::uint32_t reply_flag(Rank owner) const {
    return first_request_flag_ + static_cast<std::uint32_t>(placement_.world_size() + owner);
  }

 private:
  std::shared_ptr<Backend> backend_;
  Placement placement_;
  std::uint32_t first_request_flag_ = 0;
  bool published_ = false;
  bool claimed_ = false;
  std::unique_ptr<SymmetricBuffer> owned_;
  std::unique_ptr<LocalBuffer> resident_;
  std::unique_ptr<LocalBuffer> ring_;
};

}  // namespace sidp
