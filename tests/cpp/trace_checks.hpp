// What must hold of a rank's trace, whatever it did. All ranks must have come to rest when it starts and stops.
#pragma once

#include "sidp/runtime.hpp"
#include "workload.hpp"

namespace sidp::test {

// Once the lane has refilled the ring behind the last step.
RuntimeStats settled_stats(const Runtime& runtime);

// Throws Mismatch. num_ringed: streamed layers that the ring held at the start, the first of a step.
void check_trace(const Trace& trace, const RuntimeStats& before, const RuntimeStats& after,
                 const std::vector<LayerIndex>& ringed);

// The copies of a trace on their streams: "peer begin end " of each.
std::string copies_in(const Trace& trace);

}  // namespace sidp::test
