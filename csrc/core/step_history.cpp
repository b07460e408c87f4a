#include <algorithm>
#include <bit>
#include <cmath>

#include "sidp/mode_policy.hpp"

namespace sidp {

namespace {

constexpr double kMostFactor = 1e3;           // and one over it: what lies beyond is no step time
constexpr std::uint64_t kCalmAfter = 512;     // steps of a size that halve its recent changes
constexpr std::uint32_t kSampleOneIn = 4;     // once the window is full
constexpr std::uint32_t kMostForgotten = 30;  // times that forgetting is put off by two

template <std::size_t N>
double median(std::array<double, N> values, std::uint32_t count) {
  const auto middle = values.begin() + count / 2;
  std::nth_element(values.begin(), middle, values.begin() + count);
  if (count % 2 == 1) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

}  // namespace

std::size_t StepHistory::size_of(std::int64_t num_tokens) {
  return static_cast<std::size_t>(std::bit_width(static_cast<std::uint64_t>(num_tokens))) % 64;
}

void StepHistory::fill(PolicySnapshot& snapshot) const {
  const std::size_t size = size_of(snapshot.num_tokens);
  snapshot.previous = sizes_[size].previous;
  snapshot.recent_changes = sizes_[size].recent_changes;
  for (const Mode mode : {Mode::kWas, Mode::kCas}) {
    Correction& correction = mode == Mode::kWas ? snapshot.was : snapshot.cas;
    correction = {};
    // The size itself, then the next smaller and larger one; not they, once the mode was left alone here for long: it
    // is tried then, or what is right for a neighbour could keep it away for ever.
    const bool due = sizes_[size].by_mode[index(mode)].forgotten > 0;
    for (const std::size_t s : {size, size - 1, size + 1}) {
      if (s >= sizes_.size() || (due && s != size)) continue;
      const Samples& samples = sizes_[s].by_mode[index(mode)];
      if (samples.count < kEnough) continue;
      correction = {samples.factor, samples.count};
      break;
    }
  }
  if (snapshot.was.timed == 0) snapshot.was.factor = std::min(1.0, snapshot.cas.factor);
  if (snapshot.cas.timed == 0) snapshot.cas.factor = std::min(1.0, snapshot.was.factor);
}

void StepHistory::ran(const Decision& decision) {
  Size& size = sizes_[size_of(decision.num_tokens)];
  ++size.steps;
  size.by_mode[index(decision.mode)].idle = 0;
  if (decision.reason != Reason::kFaster && decision.reason != Reason::kHysteresis) return;
  const Mode mode = decision.mode;
  if (size.previous && *size.previous != mode) {
    ++changes_;
    // A mode is tried to find out, and left again once it is known: neither is a swing.
    const bool known = (mode == Mode::kWas ? decision.was : decision.cas).timed > 0;
    if (known && !size.trying) ++size.recent_changes;
    size.trying = !known;
  }
  size.previous = mode;
  if (++size.chosen % kCalmAfter == 0) size.recent_changes /= 2;
  Samples& other = size.by_mode[1 - index(mode)];
  if (++other.idle >= kForgetAfter << other.forgotten) {
    other.idle = 0;
    other.count = other.next = 0;
    other.factor = 1;
    other.forgotten = std::min(other.forgotten + 1, kMostForgotten);
  }
}

void StepHistory::timed(Mode mode, std::int64_t num_tokens, double predicted_ms, double measured_ms) {
  if (!(predicted_ms > 0 && measured_ms > 0)) return;
  Samples& samples = sizes_[size_of(num_tokens)].by_mode[index(mode)];
  samples.predicted_ms[samples.next] = predicted_ms;
  samples.measured_ms[samples.next] = measured_ms;
  samples.next = (samples.next + 1) % kWindow;
  samples.count = std::min(samples.count + 1, kWindow);
  ++samples.total;
  std::array<double, kWindow> ratios;
  std::transform(samples.measured_ms.begin(), samples.measured_ms.begin() + samples.count, samples.predicted_ms.begin(),
                 ratios.begin(), [](double measured, double predicted) {
                   return std::clamp(measured / predicted, 1 / kMostFactor, kMostFactor);
                 });
  samples.factor = median(ratios, samples.count);
}

bool StepHistory::wants(Mode mode, std::int64_t num_tokens) const {
  const Size& size = sizes_[size_of(num_tokens)];
  return size.by_mode[index(mode)].count < kWindow || size.steps % kSampleOneIn == 0;
}

std::vector<StepHistory::Entry> StepHistory::entries() const {
  std::vector<Entry> entries;
  for (std::size_t s = 1; s < sizes_.size(); ++s)
    for (const Mode mode : {Mode::kWas, Mode::kCas}) {
      const Samples& samples = sizes_[s].by_mode[index(mode)];
      if (samples.count == 0) continue;
      entries.push_back({.mode = mode,
                         .from_tokens = std::int64_t{1} << (s - 1),
                         .to_tokens = (std::int64_t{1} << (s - 1)) * 2 - 1,
                         .steps = samples.total,
                         .predicted_ms = median(samples.predicted_ms, samples.count),
                         .measured_ms = median(samples.measured_ms, samples.count),
                         .correction = samples.factor});
    }
  return entries;
}

}  // namespace sidp
