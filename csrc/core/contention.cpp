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
    {1.0000, 1.0000, 1.0000, 1.0112, 1.1032, 1.2027, 1.3526, 1.5009, 1.7507, 2.0000, 2.5000, 3.0000},  // 3
    {1.0000, 1.0000, 1.0178, 1.1178, 1.2069, 1.3069, 1.4569, 1.6069, 1.7878, 2.0043, 2.5004, 3.0002},  // 4
    {1.0163, 1.0242, 1.0934, 1.1497, 1.2130, 1.3034, 1.4534, 1.5447, 1.7787, 2.0134, 2.5011, 3.0007},  // 5
    {1.0711, 1.0931, 1.1211, 1.1569, 1.1946, 1.2692, 1.4192, 1.5461, 1.7608, 2.0063, 2.5013, 3.0013},  // 6
    {1.0742, 1.0899, 1.1187, 1.1606, 1.2376, 1.3376, 1.4290, 1.5357, 1.7729, 2.0078, 2.5016, 3.0015},  // 7
    {1.1025, 1.1202, 1.1267, 1.1634, 1.2216, 1.3216, 1.4297, 1.5301, 1.7786, 2.0093, 2.5051, 3.0014},  // 8
    {1.0930, 1.0950, 1.1176, 1.1439, 1.2124, 1.3124, 1.4116, 1.5328, 1.7828, 2.0084, 2.5025, 3.0006},  // 9
    {1.0916, 1.1005, 1.1166, 1.1348, 1.1944, 1.2944, 1.4008, 1.5236, 1.7736, 2.0056, 2.5023, 3.0008},  // 10
    {1.0815, 1.0986, 1.1065, 1.1266, 1.1769, 1.2769, 1.3939, 1.5253, 1.7753, 2.0104, 2.5032, 3.0020},  // 11
    {1.0726, 1.0881, 1.1054, 1.1269, 1.1848, 1.2762, 1.3936, 1.5218, 1.7681, 2.0062, 2.5035, 3.0012},  // 12
    {1.0764, 1.0872, 1.1029, 1.1184, 1.1921, 1.2677, 1.3890, 1.5156, 1.7652, 2.0037, 2.5037, 3.0012},  // 13
    {1.0698, 1.0842, 1.1060, 1.1150, 1.1982, 1.2692, 1.3905, 1.5160, 1.7643, 2.0046, 2.5026, 3.0013},  // 14
    {1.0656, 1.0822, 1.0966, 1.1180, 1.1965, 1.2688, 1.3874, 1.5156, 1.7656, 2.0040, 2.5026, 3.0009},  // 15
    {1.0610, 1.0823, 1.0901, 1.1063, 1.1930, 1.2659, 1.3828, 1.5131, 1.7631, 2.0042, 2.5026, 3.0011},  // 16
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
