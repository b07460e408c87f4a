#include "sidp/weight_pool.hpp"

#include <algorithm>
#include <string>

#include "collective.hpp"
#include "sidp/error.hpp"

namespace sidp {

namespace {

std::string placement_text(const Placement& placement) {
  std::string text = "world_size " + std::to_string(placement.world_size()) + " ring_slots";
  for (Rank rank = 0; rank < placement.world_size(); ++rank) text += ' ' + std::to_string(placement.num_slots(rank));
  for (LayerIndex layer = 0; layer < placement.num_layers(); ++layer)
    text += "\nlayer " + std::to_string(layer) + " bytes " + std::to_string(placement.layer_bytes(layer)) + " owner " +
            std::to_string(placement.owner(layer)) + " offset " + std::to_string(placement.offset(layer));
  return text;
}

}  // namespace

WeightPool::WeightPool(std::shared_ptr<Backend> backend, Placement placement, const std::string& manifest)
    : backend_(std::move(backend)), placement_(std::move(placement)) {
  if (placement_.world_size() != backend_->world_size())
    throw Error(ErrorCode::kConfig,
                "the placement is for " + std::to_string(placement_.world_size()) + " ranks, the group has " +
                    std::to_string(backend_->world_size()),
                {.rank = backend_->rank(), .expected = backend_->world_size(), .seen = placement_.world_size()});
  const Rank rank = backend_->rank();
  Bootstrap& bootstrap = backend_->bootstrap();
  check_same_on_all_ranks(bootstrap, rank, "manifest", manifest);
  check_same_on_all_ranks(bootstrap, rank, "placement", placement_text(placement_));

  const Rank world_size = placement_.world_size();
  std::vector<ByteCount> pool_bytes;
  std::int32_t slots = 0;
  for (Rank r = 0; r < world_size; ++r) {
    pool_bytes.push_back(placement_.pool_bytes(r));
    slots = std::max(slots, placement_.num_slots(r));
  }
  first_request_flag_ = static_cast<std::uint32_t>(slots);
  try {
    backend_->create_flags(first_request_flag_ + 2 * static_cast<std::uint32_t>(world_size));
    owned_ = backend_->allocate_symmetric(pool_bytes, "pool", /*peer_writable=*/false);
    all_or_none(bootstrap, rank, "local memory", [&] {
      if (placement_.resident_bytes() > 0)
        resident_ = backend_->allocate_local(placement_.resident_bytes(), "resident");
      if (placement_.ring_bytes(rank) > 0) ring_ = backend_->allocate_local(placement_.ring_bytes(rank), "ring");
    });
  } catch (...) {
    backend_->close();  // all ranks failed, so all come; symmetric memory would stay otherwise
    throw;
  }
}

std::byte* WeightPool::local_layer(LayerIndex layer) const {
  if (placement_.is_resident(layer)) return resident_->data() + placement_.offset(layer);
  if (placement_.owner(layer) != backend_->rank())
    throw Error(ErrorCode::kUsage,
                "layer " + std::to_string(layer) + " belongs to rank " + std::to_string(placement_.owner(layer)) +
                    ", not to rank " + std::to_string(backend_->rank()) + "; fetch it in a step",
                {.rank = backend_->rank(), .peer = placement_.owner(layer), .layer = layer});
  return owned_->local() + placement_.offset(layer);
}

const std::byte* WeightPool::peer_layer(LayerIndex layer) const {
  const std::byte* base = owned_->peer(placement_.owner(layer));
  return base == nullptr ? nullptr : base + placement_.offset(layer);
}

std::byte* WeightPool::ring() const { return ring_ ? ring_->data() : nullptr; }

void WeightPool::check_unclaimed() const {
  if (claimed_)
    throw Error(ErrorCode::kUsage, "a pool serves one runtime and this one had it; make another pool",
                {.rank = backend_->rank()});
}

void WeightPool::claim() {
  check_unclaimed();
  claimed_ = true;
}

void WeightPool::publish() {
  if (published_) throw Error(ErrorCode::kUsage, "the pool is published already", {.rank = backend_->rank()});
  backend_->bootstrap().all_gather("published", "");
  published_ = true;
}

}  // namespace sidp
