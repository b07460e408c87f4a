// What a runtime has to refuse, checked inside a rank process on the host backend. Each throws Mismatch.
#pragma once

#include <optional>

#include "workload.hpp"

namespace sidp::test {

// Wrong calls in one mode; the runtime must work as before after each of them.
void check_usage(Workload& workload, Runtime& runtime, const WorkloadSpec& spec, std::optional<Mode> mode,
                 Stream stream);

// The lane is slower than the deadline: fetch (or the drain of a broken-off step) says so and no later step begins.
void check_slow_lane(Runtime& runtime, const Workload& workload, bool break_off);

}  // namespace sidp::test
