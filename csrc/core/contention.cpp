// How long a WaS step takes where replicas meet at the owners' links. With two replicas each owner has one puller. From
// three on a link serves one puller at a time (next_reader in placement.hpp), and those that find it taken wait. What
// they lose hardly depends on sizes: only on how many they are and on the work beside the stream. The table is what
// sidp_runtime/simulator/contention.py simulates; a test compares them. It is for links that are taken in turn, the
// runtime's default: where hardware shares links, steps take up to 1.9 times as long (docs/simulator.md).
#include <algorithm>
#include <array>
#include <cstddef>

#include "sidp/mode_policy.hpp"

namespace sidp {

namespace {

// Compute over the stream on a link of its own.
constexpr std::array kWork = {0.0, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0};
constexpr Rank kFirst = 3;
// Step over the stream on a link of its own, by world size from 3 on and by kWork. Neither the step nor what the stream
// adds to it moves the wrong way along a row, so thresholds can be found by bisection.
constexpr double kSteps[][kWork.size()] = {
    {1.0000, 1.0000, 1.0000, 1.0075, 1.1031, 1.2025, 1.3524, 1.5006, 1.7506, 2.0000, 2.5000, 3.0000},  // 3
    {1.0000, 1.0000, 1.0879, 1.1138, 1.2057, 1.3057, 1.4557, 1.5845, 1.7751, 2.0035, 2.5005, 3.0002},  // 4
    {1.0071, 1.0287, 1.0883, 1.1507, 1.2062, 1.2922, 1.4422, 1.5393, 1.7891, 2.0130, 2.5010, 3.0007},  // 5
    {1.0397, 1.0555, 1.1073, 1.1503, 1.1894, 1.2894, 1.4394, 1.5433, 1.7611, 2.0059, 2.5013, 3.0012},  // 6
    {1.0782, 1.0831, 1.1193, 1.1717, 1.2717, 1.3717, 1.4331, 1.5336, 1.7725, 2.0061, 2.5015, 3.0015},  // 7
    {1.1044, 1.1130, 1.1195, 1.1612, 1.2264, 1.3264, 1.4171, 1.5310, 1.7810, 2.0088, 2.5054, 3.0017},  // 8
    {1.0961, 1.0963, 1.1045, 1.1337, 1.2074, 1.3074, 1.4071, 1.5291, 1.7791, 2.0069, 2.5031, 3.0007},  // 9
    {1.0830, 1.0855, 1.1031, 1.1233, 1.2167, 1.2948, 1.4022, 1.5207, 1.7707, 2.0054, 2.5029, 3.0009},  // 10
    {1.0616, 1.0909, 1.0994, 1.1222, 1.2222, 1.2778, 1.3896, 1.5231, 1.7731, 2.0061, 2.5041, 3.0018},  // 11
    {1.0747, 1.0825, 1.1064, 1.1198, 1.2130, 1.2703, 1.3922, 1.5189, 1.7652, 2.0063, 2.5035, 3.0012},  // 12
    {1.0683, 1.0777, 1.0965, 1.1087, 1.2059, 1.2669, 1.3861, 1.5148, 1.7627, 2.0040, 2.5040, 3.0013},  // 13
    {1.0616, 1.0762, 1.0936, 1.1180, 1.2035, 1.2729, 1.3900, 1.5165, 1.7641, 2.0051, 2.5028, 3.0013},  // 14
    {1.0572, 1.0747, 1.0872, 1.1099, 1.1964, 1.2695, 1.3821, 1.5136, 1.7623, 2.0038, 2.5018, 3.0010},  // 15
    {1.0530, 1.0762, 1.0867, 1.1075, 1.1924, 1.2696, 1.3799, 1.5129, 1.7611, 2.0043, 2.5027, 3.0008},  // 16
};
static_assert(std::size(kSteps) == kLargestSimulated - kFirst + 1);

}  // namespace

double step_over_stream(Rank world_size, double work) {
  if (world_size < kFirst) return std::max(1.0, work);
  const auto& table = kSteps[std::min(world_size, kLargestSimulated) - kFirst];
  if (work >= kWork.back()) return work + table[kWork.size() - 1] - kWork.back();  // what is lost stays the same
  const auto right = static_cast<std::size_t>(
      std::max<std::ptrdiff_t>(1, std::lower_bound(kWork.begin(), kWork.end(), work) - kWork.begin()));
  const double share = (work - kWork[right - 1]) / (kWork[right] - kWork[right - 1]);
  return table[right - 1] + share * (table[right] - table[right - 1]);
}

}  // namespace sidp
