// Mode policy: a pure function of a snapshot to a mode and a reason. No clock, no memory: what it needs to know of the
// past is in the snapshot.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "sidp/types.hpp"

namespace sidp {

// What a machine does, measured once (ModePolicy.calibrated()); all above 0.
struct MachineProfile {
  double copy_bytes_per_s = 0;    // one lane, peer to local
  double round_trip_us = 0;       // an empty request and its reply
  double memory_bytes_per_s = 0;  // weights through a matrix product of few rows
  double flops_per_s = 0;         // a matrix product of many rows
};

// What a step of this pool asks of the machine.
struct StepShape {
  ByteCount total_bytes = 0;     // all pooled layers
  ByteCount streamed_bytes = 0;  // of those, owned elsewhere
  std::int32_t streamed_layers = 0;
  std::int32_t ops_per_layer = 0;  // remote_compute calls a layer
  ByteCount row_bytes = 0;         // moved there and back for one row of one layer, all ops together
  std::int32_t element_bytes = 4;  // of a weight
};

struct PolicyConfig {
  std::optional<Mode> fixed{};  // always this mode where it is possible
  double hysteresis = 0.10;     // the other mode must be faster by this share to be chosen
};

struct PolicySnapshot {
  std::int64_t num_tokens = 0;  // rows of this step
  std::int64_t max_rows = 0;    // a request slot's; 0: no ops declared
  bool peers_available = true;  // every owner of a streamed layer is alive and answers
  std::optional<Mode> previous{};
  // Measured time of recent steps of about this size, by mode; empty where none ran yet.
  std::optional<double> was_ms{};
  std::optional<double> cas_ms{};
};

enum class Reason : std::uint8_t {
  kAllLocal,  // nothing is streamed
  kFixed,
  kPeerUnavailable,  // WaS needs nothing of a dead owner
  kRowsBeyondSlot,
  kFaster,
  kHysteresis,  // the other mode looks faster, but not by enough
};

std::string_view to_string(Reason reason);

struct Decision {
  Mode mode;
  Reason reason;
  double was_ms;  // the estimates compared; 0 where none was needed
  double cas_ms;
};

// Predicted milliseconds of a step, weights of the pool only. Roofline: a step takes the longer of reading its weights
// and multiplying them; WaS adds nothing while the link is faster than that; CaS adds round trips and the rows' bytes.
double predict_step_ms(Mode mode, std::int64_t num_tokens, const MachineProfile& profile, const StepShape& shape);

// Throws Error(kConfig) for a profile with a rate at or below 0 or hysteresis outside [0, 1).
Decision decide(const PolicySnapshot& snapshot, const StepShape& shape, const MachineProfile& profile,
                const PolicyConfig& config);

}  // namespace sidp
