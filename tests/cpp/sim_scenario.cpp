#include "sim_scenario.hpp"

#include <sched.h>

#include <algorithm>
#include <sstream>

#include "sim_backend.hpp"

namespace sidp::test {

namespace {

// One thread runs at a time, so all stay on one CPU: handing over is several times as fast as between two.
class OneCpu {
 public:
  OneCpu() {
    ::sched_getaffinity(0, sizeof before_, &before_);
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(static_cast<std::size_t>(std::max(::sched_getcpu(), 0)), &one);
    ::sched_setaffinity(0, sizeof one, &one);
  }
  ~OneCpu() { ::sched_setaffinity(0, sizeof before_, &before_); }
  OneCpu(const OneCpu&) = delete;
  OneCpu& operator=(const OneCpu&) = delete;

 private:
  cpu_set_t before_{};
};

// Shared by the engines of a run; one of them runs at a time.
struct Meeting {
  Rank ready = 0;
  std::vector<bool> done;
};

class Engine {
 public:
  Engine(SimWorld& world, const Scenario& scenario, Meeting& meeting, Rank rank, RankReport& report)
      : world_(world),
        scenario_(scenario),
        meeting_(meeting),
        rank_(rank),
        report_(report),
        random_(scenario.seed * 31 + static_cast<std::uint64_t>(rank)) {}

  void run() {
    Scheduler& scheduler = world_.scheduler;
    WorkloadHooks hooks{
        .pause = [&scheduler] { scheduler.yield("pause"); },
        .before_request = [this, &scheduler](Rank owner) { report_.asked_dead += scheduler.dead(owner); }};
    Workload workload(make_sim_backend(world_, rank_), scenario_.spec, std::move(hooks));
    RuntimeOptions options;
    options.max_rows = scenario_.spec.max_rows;
    options.policy.fixed = scenario_.fixed;
    options.profile = cas_profile();
    Runtime runtime(workload.pool(), workload.ops(), options);
    if (++meeting_.ready == world_.world_size) scheduler.arm();
    scheduler.block("start", [&scheduler] { return scheduler.armed(); }, -1);
    for (const StepPlan& plan : scenario_.steps[static_cast<std::size_t>(rank_)]) {
      try {
        workload.step(runtime, plan, random_);
      } catch (const Error& error) {
        if (error.code() != ErrorCode::kDeadline || scenario_.faults.hangs_only != ThreadKind::kLane) throw;
        check_refuses(runtime);
        break;
      }
    }
    report_.finished = true;
    meeting_.done[static_cast<std::size_t>(rank_)] = true;
    if (scenario_.linger) scheduler.block("linger", [this] { return all_done(); }, -1);
    report_.stats = runtime.stats();
    runtime.close();
  }

 private:
  // A fetch outlived its deadline: the ring is out of order, so no later step may read it.
  void check_refuses(Runtime& runtime) {
    report_.lane_failed = true;
    try {
      runtime.end_step(/*broken_off=*/true);
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kUsage) throw;  // the step may have ended already
    }
    try {
      runtime.begin_step({}, 1);
    } catch (const Error& error) {
      if (error.code() == ErrorCode::kUsage) return;
      throw;
    }
    world_.scheduler.fail("a step began after a fetch had outlived its deadline");
  }

  [[nodiscard]] bool all_done() const {
    for (Rank r = 0; r < world_.world_size; ++r)
      if (!meeting_.done[static_cast<std::size_t>(r)] && !world_.scheduler.dead(r)) return false;
    return true;
  }

  SimWorld& world_;
  const Scenario& scenario_;
  Meeting& meeting_;
  Rank rank_;
  RankReport& report_;
  std::mt19937_64 random_;
};

}  // namespace

Scenario Scenario::random(std::uint64_t seed, Fault fault) {
  std::mt19937_64 random(seed);
  const auto below = [&random](std::uint64_t bound) { return random() % bound; };
  Scenario s;
  s.seed = seed;
  s.spec.world_size = static_cast<Rank>(fault == Fault::kNone ? 1 + below(4) : 2 + below(3));
  for (std::uint64_t layers = 1 + below(9); layers > 0; --layers) s.spec.layer_bytes.push_back(1 + below(700));
  s.spec.ring_slots = static_cast<std::int32_t>(1 + below(4));
  for (std::size_t i = 0; i < s.spec.layer_bytes.size(); ++i)
    if (below(8) == 0) s.spec.resident.push_back(static_cast<LayerIndex>(i));
  s.spec.max_rows = static_cast<std::int64_t>(1 + below(3));
  if (const auto kind = below(6); kind < 2) s.fixed = kind == 0 ? Mode::kWas : Mode::kCas;
  for (Rank rank = 0; rank < s.spec.world_size; ++rank) {
    std::vector<StepPlan> plans;
    for (std::uint64_t count = 1 + below(3); count > 0; --count) {
      StepPlan plan;
      // Half the steps have more rows than a slot holds, so the policy takes WaS for them.
      plan.num_tokens = 1 + static_cast<std::int64_t>(below(2 * static_cast<std::uint64_t>(s.spec.max_rows)));
      if (below(4) == 0) plan.break_at = static_cast<LayerIndex>(below(s.spec.layer_bytes.size()));
      plans.push_back(plan);
    }
    s.steps.push_back(std::move(plans));
  }
  const auto victim = static_cast<Rank>(below(static_cast<std::uint64_t>(s.spec.world_size)));
  const std::uint64_t when = below(60u * static_cast<std::uint64_t>(s.spec.world_size));
  s.faults.seed = seed;
  if (below(2) == 0) s.faults.delays_per_mille = static_cast<std::uint32_t>(below(120));
  s.linger = fault != Fault::kLeave;
  if (fault == Fault::kDeath) {
    s.faults.dies = victim;
    s.faults.die_at = when;
    s.faults.detect_after = below(2) == 0 ? 0 : below(100);
  } else if (fault == Fault::kHang || fault == Fault::kLaneHang) {
    s.faults.hangs = victim;
    s.faults.hang_at = when;
    s.faults.resume_after = below(80);
    if (fault == Fault::kLaneHang)
      s.faults.hangs_only = ThreadKind::kLane;
    else if (below(2) == 0)
      s.faults.hangs_only = ThreadKind::kService;
  }
  return s;
}

RunReport run_scenario(const Scenario& scenario, Chooser& chooser) {
  const OneCpu one_cpu;
  Scheduler scheduler(chooser, scenario.faults);
  SimWorld world(scheduler, scenario.spec.world_size);
  const auto count = static_cast<std::size_t>(scenario.spec.world_size);
  RunReport report;
  report.ranks.resize(count);
  Meeting meeting{.done = std::vector<bool>(count)};
  std::vector<std::thread> threads;
  for (Rank rank = 0; rank < scenario.spec.world_size; ++rank)
    threads.push_back(scheduler.start(rank, ThreadKind::kEngine, [&, rank] {
      Engine(world, scenario, meeting, rank, report.ranks[static_cast<std::size_t>(rank)]).run();
    }));
  scheduler.run();
  for (std::thread& thread : threads) thread.join();
  report.failure = scheduler.failure();
  report.choices = scheduler.choices();
  report.expiries = scheduler.expiries();
  return report;
}

std::string describe(const Scenario& s) {
  std::ostringstream text;
  text << "world_size " << s.spec.world_size << ", layers";
  for (const ByteCount bytes : s.spec.layer_bytes) text << ' ' << bytes;
  text << ", ring_slots " << s.spec.ring_slots << ", resident";
  for (const LayerIndex layer : s.spec.resident) text << ' ' << layer;
  text << ", max_rows " << s.spec.max_rows << ", mode " << (s.fixed ? to_string(*s.fixed) : "auto");
  for (std::size_t r = 0; r < s.steps.size(); ++r) {
    text << "\n  rank " << r << ":";
    for (const StepPlan& plan : s.steps[r]) {
      text << " step(" << plan.num_tokens;
      if (plan.break_at >= 0) text << ", breaks off at layer " << plan.break_at;
      text << ")";
    }
  }
  if (s.faults.dies) text << "\n  rank " << *s.faults.dies << " dies at choice " << s.faults.die_at;
  if (s.faults.hangs) text << "\n  rank " << *s.faults.hangs << " hangs at choice " << s.faults.hang_at;
  return text.str();
}

}  // namespace sidp::test
