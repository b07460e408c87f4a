// Placement: ownership, addresses and ring plans over random pools.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <random>

#include "sidp/error.hpp"
#include "sidp/placement.hpp"

namespace sidp {
namespace {

struct Pool {
  std::vector<ByteCount> bytes;
  PlacementOptions options;
  Placement placement;
};

Pool random_pool(std::uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto below = [&random](std::uint64_t bound) { return random() % bound; };
  std::vector<ByteCount> bytes(1 + below(40));
  const bool equal = below(3) == 0;
  const ByteCount size = 1 + below(100000);
  for (ByteCount& b : bytes) b = equal ? size : 1 + below(below(2) == 0 ? 1000 : 1000000);
  PlacementOptions options{.world_size = static_cast<Rank>(1 + below(9)),
                           .ring_slots = static_cast<std::int32_t>(1 + below(6))};
  for (std::size_t i = 0; i < bytes.size(); ++i)
    if (below(6) == 0) options.resident_layers.push_back(static_cast<LayerIndex>(i));
  if (below(20) == 0) {
    options.resident_layers.resize(bytes.size());
    std::iota(options.resident_layers.begin(), options.resident_layers.end(), 0);
  }
  return {bytes, options, Placement::by_layer(bytes, options)};
}

template <typename Check>
void for_random_pools(Check check) {
  for (std::uint64_t seed = 1; seed <= 2000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    check(random_pool(seed));
    if (::testing::Test::HasFailure()) return;
  }
}

TEST(Placement, EveryLayerHasOneOwnerOrIsResident) {
  for_random_pools([](const Pool& pool) {
    ASSERT_EQ(pool.placement.num_layers(), static_cast<LayerIndex>(pool.bytes.size()));
    for (LayerIndex i = 0; i < pool.placement.num_layers(); ++i) {
      const auto& resident = pool.options.resident_layers;
      const bool is_resident = std::find(resident.begin(), resident.end(), i) != resident.end();
      EXPECT_EQ(pool.placement.is_resident(i), is_resident);
      EXPECT_EQ(pool.placement.layer_bytes(i), pool.bytes[static_cast<std::size_t>(i)]);
      int local = 0;
      for (Rank r = 0; r < pool.options.world_size; ++r) local += pool.placement.is_local(r, i);
      EXPECT_EQ(local, is_resident ? pool.options.world_size : 1);
      if (is_resident) continue;
      ASSERT_GE(pool.placement.owner(i), 0);
      ASSERT_LT(pool.placement.owner(i), pool.options.world_size);
    }
  });
}

TEST(Placement, BytesAreAlignedAndDoNotOverlap) {
  for_random_pools([](const Pool& pool) {
    std::map<Rank, std::vector<std::pair<ByteCount, ByteCount>>> areas;  // by owner, -1: resident
    for (LayerIndex i = 0; i < pool.placement.num_layers(); ++i)
      areas[pool.placement.owner(i)].push_back({pool.placement.offset(i), pool.placement.layer_bytes(i)});
    for (auto& [owner, extents] : areas) {
      const ByteCount area = owner < 0 ? pool.placement.resident_bytes() : pool.placement.pool_bytes(owner);
      std::sort(extents.begin(), extents.end());
      ByteCount end = 0;
      for (const auto& [offset, bytes] : extents) {
        EXPECT_EQ(offset % kAlignment, 0u);
        EXPECT_GE(offset, end);
        end = offset + bytes;
      }
      EXPECT_LE(end, area);
    }
    for (Rank r = 0; r < pool.options.world_size; ++r)
      if (!areas.contains(r)) {
        EXPECT_EQ(pool.placement.pool_bytes(r), 0u);
      }
  });
}

TEST(Placement, RanksAreBalanced) {
  for_random_pools([](const Pool& pool) {
    ByteCount total = 0, largest = 0;
    for (LayerIndex i = 0; i < pool.placement.num_layers(); ++i)
      if (!pool.placement.is_resident(i)) {
        total += align_up(pool.placement.layer_bytes(i));
        largest = std::max(largest, align_up(pool.placement.layer_bytes(i)));
      }
    ByteCount sum = 0;
    for (Rank r = 0; r < pool.options.world_size; ++r) {
      EXPECT_LE(pool.placement.pool_bytes(r), total / static_cast<ByteCount>(pool.options.world_size) + largest);
      sum += pool.placement.pool_bytes(r);
    }
    EXPECT_EQ(sum, total);
  });
}

TEST(Placement, EqualLayersGoRound) {
  const std::vector<ByteCount> bytes(10, 1000);
  const auto placement = Placement::by_layer(bytes, {.world_size = 4, .resident_layers = {}});
  for (LayerIndex i = 0; i < 10; ++i) EXPECT_EQ(placement.owner(i), i % 4);
}

TEST(Placement, RingPlanIsRightForTwoSteps) {
  for_random_pools([](const Pool& pool) {
    for (Rank rank = 0; rank < pool.options.world_size; ++rank) {
      const auto plan = pool.placement.ring_plan(rank);
      const auto streamed = pool.placement.streamed_layers(rank);
      ASSERT_EQ(plan.size(), streamed.size());
      EXPECT_EQ(pool.placement.num_slots(rank),
                std::min<std::int32_t>(pool.options.ring_slots, static_cast<std::int32_t>(streamed.size())));
      EXPECT_EQ(pool.placement.ring_bytes(rank),
                pool.placement.slot_bytes(rank) * static_cast<ByteCount>(pool.placement.num_slots(rank)));
      std::map<std::int32_t, LayerIndex> holder;  // by slot
      for (int step = 0; step < 2; ++step)
        for (std::size_t k = 0; k < plan.size(); ++k) {
          const RingEntry& entry = plan[k];
          EXPECT_EQ(entry.layer, streamed[k]);
          EXPECT_FALSE(pool.placement.is_local(rank, entry.layer));
          EXPECT_EQ(entry.bytes, pool.placement.layer_bytes(entry.layer));
          ASSERT_GE(entry.slot, 0);
          ASSERT_LT(entry.slot, pool.placement.num_slots(rank));
          EXPECT_EQ(entry.offset, static_cast<ByteCount>(entry.slot) * pool.placement.slot_bytes(rank));
          EXPECT_EQ(entry.offset % kAlignment, 0u);
          EXPECT_LE(entry.offset + entry.bytes, pool.placement.ring_bytes(rank));
          const auto held = holder.find(entry.slot);
          if (held != holder.end()) {
            EXPECT_EQ(entry.after_layer, held->second);
          }
          holder[entry.slot] = entry.layer;
        }
    }
  });
}

TEST(Placement, RingSlotsAreSpacedAsFarAsPromised) {
  for (std::int32_t slots = 1; slots <= 9; ++slots)
    for (std::int32_t count = 1; count <= 60; ++count) {
      SCOPED_TRACE(std::to_string(count) + " layers, " + std::to_string(slots) + " slots");
      const std::int32_t remainder = count % slots;
      std::map<std::int32_t, std::int32_t> last;
      for (std::int32_t position = 0; position < 3 * count; ++position) {
        const std::int32_t k = position % count;
        const std::int32_t slot = ring_slot(k, count, slots);
        ASSERT_GE(slot, 0);
        ASSERT_LT(slot, std::min(slots, count));
        if (k < count - remainder) {
          ASSERT_EQ(slot, k % slots);
        }
        if (last.contains(slot)) {
          const std::int32_t promised = count <= slots ? count : (slots + remainder) / 2;
          ASSERT_GE(position - last[slot], remainder == 0 && count >= slots ? slots : promised) << "layer " << k;
        }
        last[slot] = position;
      }
      ASSERT_EQ(static_cast<std::int32_t>(last.size()), std::min(slots, count)) << "a slot is never used";
    }
}

template <typename Call>
void expect_code(ErrorCode code, Call call) {
  try {
    call();
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
  }
}

TEST(Placement, RefusesArgumentsOutOfRange) {
  const std::vector<ByteCount> bytes{100, 200};
  const std::vector<ByteCount> with_empty{100, 0}, none;
  expect_code(ErrorCode::kConfig, [&] { Placement::by_layer(none, {}); });
  expect_code(ErrorCode::kConfig, [&] { Placement::by_layer(with_empty, {}); });
  expect_code(ErrorCode::kConfig, [&] { Placement::by_layer(bytes, {.world_size = 0}); });
  expect_code(ErrorCode::kConfig, [&] { Placement::by_layer(bytes, {.world_size = -1}); });
  expect_code(ErrorCode::kConfig, [&] { Placement::by_layer(bytes, {.ring_slots = 0}); });
  expect_code(ErrorCode::kConfig, [&] { Placement::by_layer(bytes, {.resident_layers = {2}}); });
  expect_code(ErrorCode::kConfig, [&] { Placement::by_layer(bytes, {.resident_layers = {-1}}); });
  const auto placement = Placement::by_layer(bytes, {.world_size = 2});
  expect_code(ErrorCode::kUnknownName, [&] { (void)placement.owner(2); });
  expect_code(ErrorCode::kUnknownName, [&] { (void)placement.is_local(0, -1); });
  expect_code(ErrorCode::kConfig, [&] { (void)placement.ring_plan(2); });
  expect_code(ErrorCode::kConfig, [&] { (void)placement.pool_bytes(-1); });
}

TEST(Placement, OneRankStreamsNothing) {
  const std::vector<ByteCount> bytes{100, 200, 300};
  const auto placement = Placement::by_layer(bytes, {.world_size = 1});
  EXPECT_EQ(placement.num_slots(0), 0);
  EXPECT_EQ(placement.ring_bytes(0), 0u);
  EXPECT_TRUE(placement.ring_plan(0).empty());
}

}  // namespace
}  // namespace sidp
