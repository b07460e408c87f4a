#include "sidp/mode_policy.hpp"

#include <algorithm>

#include "sidp/error.hpp"

namespace sidp {

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

double predict_step_ms(Mode mode, std::int64_t num_tokens, const MachineProfile& profile, const StepShape& shape) {
  const double tokens = static_cast<double>(num_tokens);
  const double weights = static_cast<double>(shape.total_bytes) / shape.element_bytes;
  const double compute_s = std::max(static_cast<double>(shape.total_bytes) / profile.memory_bytes_per_s,
                                    2.0 * tokens * weights / profile.flops_per_s);
  if (mode == Mode::kWas)
    return 1e3 * std::max(compute_s, static_cast<double>(shape.streamed_bytes) / profile.copy_bytes_per_s);
  const double trips = static_cast<double>(shape.streamed_layers) * shape.ops_per_layer;
  const double rows_s = static_cast<double>(shape.streamed_layers) * tokens * static_cast<double>(shape.row_bytes) /
                        profile.copy_bytes_per_s;
  return 1e3 * (compute_s + trips * profile.round_trip_us * 1e-6 + rows_s);
}

Decision decide(const PolicySnapshot& snapshot, const StepShape& shape, const MachineProfile& profile,
                const PolicyConfig& config) {
  if (!(profile.copy_bytes_per_s > 0 && profile.round_trip_us > 0 && profile.memory_bytes_per_s > 0 &&
        profile.flops_per_s > 0))
    throw Error(ErrorCode::kConfig, "every rate of a machine profile must be above 0; calibrate again");
  if (shape.element_bytes < 1) throw Error(ErrorCode::kConfig, "element_bytes must be at least 1");
  if (!(config.hysteresis >= 0 && config.hysteresis < 1))
    throw Error(ErrorCode::kConfig, "hysteresis must be in [0, 1)");
  if (shape.streamed_layers == 0) return {Mode::kWas, Reason::kAllLocal, 0, 0};
  // A fixed CaS stays CaS when an owner dies: remote_compute then runs on the owner's bytes. Rows beyond the slot are
  // an error there: what was asked for is never silently replaced.
  if (config.fixed) return {*config.fixed, Reason::kFixed, 0, 0};
  if (snapshot.num_tokens > snapshot.max_rows) return {Mode::kWas, Reason::kRowsBeyondSlot, 0, 0};
  if (!snapshot.peers_available) return {Mode::kWas, Reason::kPeerUnavailable, 0, 0};

  const auto estimate = [&](Mode mode, const std::optional<double>& measured) {
    return measured ? *measured : predict_step_ms(mode, snapshot.num_tokens, profile, shape);
  };
  const double was_ms = estimate(Mode::kWas, snapshot.was_ms);
  const double cas_ms = estimate(Mode::kCas, snapshot.cas_ms);
  const Mode faster = cas_ms < was_ms ? Mode::kCas : Mode::kWas;
  if (snapshot.previous && *snapshot.previous != faster) {
    const double stay_ms = faster == Mode::kWas ? cas_ms : was_ms;
    const double change_ms = std::min(was_ms, cas_ms);
    if (change_ms > (1.0 - config.hysteresis) * stay_ms)
      return {*snapshot.previous, Reason::kHysteresis, was_ms, cas_ms};
  }
  return {faster, Reason::kFaster, was_ms, cas_ms};
}

}  // namespace sidp
