// How long a WaS step takes where replicas meet at the owners' links. With two replicas each owner has one puller and
// nothing is shared. From three on, replicas that drift find the same owner busy, and what they lose hardly depends on
// sizes: only on how many they are and on the work beside the stream. The table is what
// sidp_runtime/simulator/contention.py simulates; a test compares them.
#include <algorithm>
#include <array>
#include <cstddef>

#include "sidp/mode_policy.hpp"

namespace sidp {

namespace {

constexpr std::array kWork = {0.0, 1.0, 1.5, 1.75, 2.0, 2.5, 3.0};  // compute over the stream on a link of its own
constexpr Rank kFirst = 3;
// Step over the stream on a link of its own, by world size from 3 on and by kWork. Neither the step nor what the stream
// adds to it moves the wrong way along a row, so thresholds can be found by bisection.
constexpr double kSteps[][kWork.size()] = {
    {1.4016, 1.4016, 1.5000, 1.7500, 2.0000, 2.5000, 3.0000},  // 3
    {1.5273, 1.6057, 1.8543, 1.8582, 2.0131, 2.5000, 3.0000},  // 4
    {1.7053, 1.7053, 1.8987, 1.9916, 2.2416, 2.5046, 3.0025},  // 5
    {1.7522, 1.7655, 1.9164, 1.9194, 2.1633, 2.5143, 3.0008},  // 6
    {1.7835, 1.7835, 1.8975, 1.9817, 2.2317, 2.5016, 3.0012},  // 7
    {1.8085, 1.8182, 1.8729, 1.9004, 2.1504, 2.5009, 3.0005},  // 8
    {1.8861, 1.8861, 1.9815, 2.0017, 2.1085, 2.5020, 3.0003},  // 9
    {1.8217, 1.8637, 1.8982, 1.9915, 2.1269, 2.5060, 3.0043},  // 10
    {1.7865, 1.8151, 1.9715, 1.9715, 2.1593, 2.5024, 3.0000},  // 11
    {1.8263, 1.9040, 1.9639, 1.9986, 2.1379, 2.5032, 3.0000},  // 12
    {1.8297, 1.8748, 1.9140, 2.0628, 2.0778, 2.5020, 3.0001},  // 13
    {1.8208, 1.9000, 1.9319, 2.0356, 2.1175, 2.5047, 3.0012},  // 14
    {1.8416, 1.8416, 1.9346, 2.0158, 2.1379, 2.5031, 3.0006},  // 15
    {1.9571, 1.9571, 1.9571, 2.0052, 2.1563, 2.5113, 3.0017},  // 16
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
