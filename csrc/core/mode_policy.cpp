#include "sidp/mode_policy.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "sidp/error.hpp"

namespace sidp {

namespace {

constexpr double kMostMargin = 0.5;

std::string ms(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g ms", value);
  return text;
}

std::string percent(double share) {
  char text[32];
  std::snprintf(text, sizeof text, "%.0f %%", 100 * share);
  return text;
}

std::string estimate_text(const char* mode, double estimate_ms, const Correction& correction) {
  std::string text = std::string(mode) + " " + ms(estimate_ms) + " (predicted " + ms(estimate_ms / correction.factor);
  char factor[32];
  std::snprintf(factor, sizeof factor, " x %.3g", correction.factor);
  if (correction.timed == 0)
    return text + (correction.factor == 1 ? ", not timed yet)" : std::string(factor) + " as the other, not timed yet)");
  return text + factor + " of " + std::to_string(correction.timed) + " timed steps)";
}

const Mode* fixed_mode(const PolicyConfig& config, std::int64_t num_tokens) {
  if (config.fixed) return &*config.fixed;
  for (const auto& [size, mode] : config.fixed_sizes)
    if (num_tokens <= size) return &mode;
  return nullptr;
}

}  // namespace

std::string_view to_string(Reason reason) {
  switch (reason) {
    case Reason::kAllLocal:
      return "all-local";
    case Reason::kFixed:
      return "fixed";
    case Reason::kPeerUnavailable:
      return "peer-unavailable";
    case Reason::kRowsBeyondSlot:
      return "rows-beyond-slot";
    case Reason::kFaster:
      return "faster";
    case Reason::kHysteresis:
      return "hysteresis";
  }
  return "unknown";
}

double products_s(double num_bytes, double rows, const MachineProfile& profile, std::int32_t element_bytes) {
  if (rows <= 0) return 0;
  const auto& points = profile.products;
  if (points.empty())
    return std::max(num_bytes / profile.memory_bytes_per_s,
                    2.0 * rows * num_bytes / element_bytes / profile.flops_per_s);
  if (rows <= points.front().first) return num_bytes * points.front().second;
  if (rows >= points.back().first) return num_bytes * points.back().second * rows / points.back().first;
  const auto right = std::lower_bound(points.begin(), points.end(), std::pair{rows, 0.0});
  const auto left = right - 1;
  const double share = (rows - left->first) / (right->first - left->first);
  return num_bytes * (left->second + share * (right->second - left->second));
}

StepTimes predict_step(double rows, const MachineProfile& profile, const StepShape& shape, double other_s) {
  const auto streamed_bytes = static_cast<double>(shape.streamed_bytes);
  const double layers = shape.streamed_layers;
  StepTimes times;
  const double layers_s = products_s(static_cast<double>(shape.total_bytes), rows, profile, shape.element_bytes);
  times.local_s = layers_s + other_s;
  times.copy_s = streamed_bytes / profile.copy_bytes_per_s + layers * profile.copy_latency_us * 1e-6;
  times.work_s = times.local_s + streamed_bytes / profile.memory_bytes_per_s;
  times.was_floor_s = std::max(times.work_s, times.copy_s);
  times.was_s =
      times.copy_s > 0 ? times.copy_s * step_over_stream(shape.world_size, times.work_s / times.copy_s) : times.local_s;
  const double request_rate = profile.request_bytes_per_s > 0 ? profile.request_bytes_per_s : profile.copy_bytes_per_s;
  times.cas_s = times.local_s + layers * (shape.ops_per_layer * profile.round_trip_us * 1e-6 +
                                          rows * static_cast<double>(shape.row_bytes) / request_rate);
  if (shape.total_bytes > 0) {
    const double remote = streamed_bytes / static_cast<double>(shape.total_bytes);
    const double resident = static_cast<double>(shape.resident_bytes) / static_cast<double>(shape.total_bytes);
    times.cas_s += kResidentWait * resident * resident * remote * layers_s;
  }
  return times;
}

double change_margin(double hysteresis, std::uint32_t recent_changes) {
  // The first change of a size is the policy finding its mode, not swinging.
  const double grown = hysteresis * (recent_changes > 1 ? recent_changes : 1.0);
  return std::max(hysteresis, std::min(grown, kMostMargin));
}

void check_policy(const StepShape& shape, const MachineProfile& profile, const PolicyConfig& config) {
  const auto refuse = [](const std::string& what) { throw Error(ErrorCode::kConfig, what); };
  if (!(profile.copy_bytes_per_s > 0 && profile.round_trip_us > 0 && profile.memory_bytes_per_s > 0 &&
        profile.flops_per_s > 0 && profile.copy_latency_us >= 0 && profile.request_bytes_per_s >= 0))
    refuse("every rate of a machine profile must be above 0; calibrate again");
  for (std::size_t i = 0; i < profile.products.size(); ++i) {
    const auto& [rows, seconds] = profile.products[i];
    const bool rises = i == 0 || (rows > profile.products[i - 1].first && seconds >= profile.products[i - 1].second);
    if (!(rows > 0 && seconds > 0 && rises))
      refuse("products of a machine profile need rows that ascend and times above 0 that never fall; calibrate again");
  }
  if (shape.element_bytes < 1) refuse("element_bytes must be at least 1");
  if (!(config.hysteresis >= 0 && config.hysteresis < 1)) refuse("hysteresis must be in [0, 1)");
  for (std::size_t i = 0; i < config.fixed_sizes.size(); ++i)
    if (config.fixed_sizes[i].first < 1 || (i > 0 && config.fixed_sizes[i].first <= config.fixed_sizes[i - 1].first))
      refuse("batch sizes of fixed modes must be at least 1 and ascend");
}

Decision decide(const PolicySnapshot& snapshot, const StepShape& shape, const MachineProfile& profile,
                const PolicyConfig& config) {
  Decision decision;
  decision.num_tokens = snapshot.num_tokens;
  decision.max_rows = snapshot.max_rows;
  decision.unavailable_peer = snapshot.unavailable_peer.value_or(-1);
  const auto settle = [&](Mode mode, Reason reason) {
    decision.mode = mode;
    decision.reason = reason;
    return decision;
  };
  if (shape.streamed_layers == 0) return settle(Mode::kWas, Reason::kAllLocal);
  // A fixed CaS stays CaS when an owner dies: remote_compute then runs on the owner's bytes. Rows beyond the slot are
  // an error there: what was asked for is never silently replaced.
  if (const Mode* const fixed = fixed_mode(config, snapshot.num_tokens)) return settle(*fixed, Reason::kFixed);
  if (snapshot.num_tokens > snapshot.max_rows) return settle(Mode::kWas, Reason::kRowsBeyondSlot);
  if (snapshot.unavailable_peer) return settle(Mode::kWas, Reason::kPeerUnavailable);

  const StepTimes times = predict_step(static_cast<double>(snapshot.num_tokens), profile, shape);
  decision.was = snapshot.was;
  decision.cas = snapshot.cas;
  decision.was_ms = 1e3 * times.was_s * snapshot.was.factor;
  decision.cas_ms = 1e3 * times.cas_s * snapshot.cas.factor;
  decision.margin = change_margin(config.hysteresis, snapshot.recent_changes);
  const Mode faster = decision.cas_ms < decision.was_ms ? Mode::kCas : Mode::kWas;
  if (snapshot.previous && *snapshot.previous != faster &&
      std::min(decision.was_ms, decision.cas_ms) > (1.0 - decision.margin) * std::max(decision.was_ms, decision.cas_ms))
    return settle(*snapshot.previous, Reason::kHysteresis);
  return settle(faster, Reason::kFaster);
}

std::string explain(const Decision& d) {
  const bool was = d.mode == Mode::kWas;
  const std::string head = std::string(was ? "WaS" : "CaS") + " for " + std::to_string(d.num_tokens) + " tokens: ";
  switch (d.reason) {
    case Reason::kAllLocal:
      return head + "no layer is streamed";
    case Reason::kFixed:
      return head + "fixed by whoever made the policy";
    case Reason::kPeerUnavailable:
      return head + "rank " + std::to_string(d.unavailable_peer) + " is dead or silent, and WaS needs nothing of it";
    case Reason::kRowsBeyondSlot:
      return head +
             (d.max_rows == 0 ? "no ops were declared" : "a request holds " + std::to_string(d.max_rows) + " rows");
    case Reason::kFaster:
    case Reason::kHysteresis:
      break;
  }
  const std::string figures =
      estimate_text("WaS", d.was_ms, d.was) + " against " + estimate_text("CaS", d.cas_ms, d.cas);
  if (d.reason == Reason::kFaster) return head + "faster, " + figures;
  const double gain = 1 - std::min(d.was_ms, d.cas_ms) / std::max(d.was_ms, d.cas_ms);
  return head + "the other mode looks " + percent(gain) + " faster, a change needs " + percent(d.margin) + "; " +
         figures;
}

}  // namespace sidp
