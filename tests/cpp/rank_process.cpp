// One rank of a group, as a process: rank_process FOLDER RANK WORLD_SIZE TOKEN [key=value ...]. Started by RankGroup.
// Writes FOLDER/result-RANK with one "key value" a line. Exit status: 0 done, 3 sidp::Error, 4 anything else.
#include <sys/stat.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <numeric>
#include <sstream>

#include "backends/registry.hpp"
#include "emulated_gpu.hpp"
#include "file_bootstrap.hpp"
#include "trace_checks.hpp"
#include "usage_checks.hpp"
#include "workload.hpp"

namespace sidp::test {
namespace {

constexpr Milliseconds kMarkDeadline{30000};

class RankProcess {
 public:
  RankProcess(std::filesystem::path folder, Rank rank, Rank world_size, std::string token,
              std::map<std::string, std::string> settings)
      : folder_(std::move(folder)), rank_(rank), token_(std::move(token)), settings_(std::move(settings)) {
    spec_.world_size = world_size;
    spec_.layer_bytes.assign(static_cast<std::size_t>(number("layers", 7)),
                             static_cast<ByteCount>(number("bytes", 3000)));
    if (number("uneven", 1) != 0)
      for (std::size_t i = 0; i < spec_.layer_bytes.size(); ++i) spec_.layer_bytes[i] += 100 * i;
    spec_.ring_slots = static_cast<std::int32_t>(number("slots", 2));
    spec_.max_rows = number("max_rows", 3);
    if (const std::int64_t resident = number("resident", -1); resident >= 0)
      spec_.resident = {static_cast<LayerIndex>(resident)};
  }

  int run() {
    int status = 0;
    const auto start = Clock::now();
    try {
      work();
      note("finished", 1);
    } catch (const Error& error) {
      note("error", to_string(error.code()));
      std::string message = error.what();
      std::replace(message.begin(), message.end(), '\n', ' ');
      note("message", message);
      note("peer", error.context().peer.value_or(-1));
      status = 3;
    } catch (const std::exception& error) {
      note("error", error.what());
      std::fprintf(stderr, "rank %d: %s\n", rank_, error.what());
      status = 4;
    }
    note("control_mapped", num_mapped("-control"));
    note("total_ms", std::chrono::duration_cast<Milliseconds>(Clock::now() - start).count());
    write_file(folder_ / ("result-" + std::to_string(rank_)), result_.str());
    return status;
  }

 private:
  void work() {
    const auto hold = [this](const std::string& key) {
      if (key != text("hold", "")) return;
      mark("held");
      await("go");
    };
    auto bootstrap = std::make_shared<FileBootstrap>(folder_, rank_, spec_.world_size,
                                                     Milliseconds(number("setup_deadline_ms", 30000)), hold);
    const std::string name = text("backend", "host");
    if (name == "nvshmem") gpu_ = make_emulated_gpu(folder_, rank_, spec_.world_size);
    if (gpu_) gpu_->misbehave(text("misbehave", ""));
    if (text("do", "steps") == "reopen") return reopen(bootstrap);
    if (text("do", "steps") == "reopen_runtimes") return gpu_->check_reopened(bootstrap, rank_, spec_, token_);
    if (text("do", "steps") == "events") return gpu_->check_events();
    auto backend = make_backend({.name = name,
                                 .rank = rank_,
                                 .world_size = spec_.world_size,
                                 .token = token_,
                                 .device = 0,
                                 .gpus = gpu_ ? gpu_->ordinals() : std::vector<int>{},
                                 .deadline = Milliseconds(number("setup_deadline_ms", 30000)),
                                 .test_without_mappings = number("unmapped", 0) != 0},
                                bootstrap);
    if (number("odd_layer", -1) >= 0) ++spec_.layer_bytes.at(static_cast<std::size_t>(number("odd_layer", 0)));
    WorkloadHooks hooks = gpu_ ? gpu_->hooks() : WorkloadHooks{};
    if (const std::int64_t ms = number("op_delay_ms", 0); ms > 0)
      hooks.pause = [ms] { std::this_thread::sleep_for(Milliseconds(ms)); };
    Workload workload(backend, spec_, hooks);
    const std::vector<Op> plain_ops = workload.ops();
    std::vector<Op> ops = gpu_ ? gpu_->ops(*backend, plain_ops) : plain_ops;
    if (number("odd_op", 0) != 0) ops[1].name = "other";
    if (number("no_ops", 0) != 0) ops.clear();
    RuntimeOptions options;
    options.deadline = Milliseconds(number("deadline_ms", 30000));
    options.max_rows = spec_.max_rows;
    options.profile = cas_profile();
    if (text("mode", "auto") == "was") options.policy.fixed = Mode::kWas;
    if (text("mode", "auto") == "cas") options.policy.fixed = Mode::kCas;
    options.lane.owners_engines = number("owners_engines", 1) != 0;
    options.lane.exclusive_links = number("exclusive_links", 1) != 0;
    options.lane.stop_deadline = Milliseconds(number("stop_deadline_ms", 10000));
    options.lane.test_delay_us = static_cast<std::uint32_t>(number("lane_delay_us", 0));
    options.service.test_delay_us = static_cast<std::uint32_t>(number("service_delay_us", 0));
    options.spin_rows = number("spin_rows", kSpinRows);
    if (gpu_ && !ops.empty()) {
      options.row_buckets = spec_.row_buckets(options.spin_rows);
      options.deferred_start = true;
    }
    if (number("fail_registration", 0) != 0) gpu_->fail_registration();
    Runtime runtime(workload.pool(), ops, options);
    if (gpu_) note("registered", gpu_->num_registered());
    if (options.deferred_start) {
      gpu_->capture(runtime, plain_ops);
      runtime.start();
    }
    if (number("fail_launches", 0) != 0) gpu_->fail_launches();
    RuntimeStats before;
    if (number("trace", 0) != 0) {
      before = settled_stats(runtime);
      runtime.start_trace(static_cast<std::size_t>(number("trace", 0)));
      bootstrap->all_gather("tracing", "");
    }
    mark("ready");
    const std::string what = text("do", "steps");
    if (what == "usage") {
      check_usage(workload, runtime, spec_, options.policy.fixed, gpu_ ? gpu_->hooks().stream : Stream{});
      mark("usage checked");
    } else if (what == "slow_lane" || what == "slow_drain") {
      check_slow_lane(runtime, workload, /*break_off=*/what == "slow_drain");
    } else if (what == "streams") {
      gpu_->check_streams(workload, runtime);
    } else if (what == "replay") {
      gpu_->check_replay(workload, runtime);
    } else if (what == "hold_context") {  // with requests of all ranks under way
      std::mt19937_64 random(6);
      workload.step(runtime, {}, random);
      gpu_->hold_context();
      runtime.check();
    } else if (what == "turn") {
      turn(runtime);
    } else if (what == "ask") {
      await("go");
      std::mt19937_64 random(8);
      workload.step(runtime, {}, random);
      gpu_->wait();
      mark("answered");
      if (number("steps", 0) > 0) await("go on"), steps(workload, runtime);
    } else if (what == "held_rows") {
      gpu_->hold_rows(workload, runtime, [this] { mark("rung"), await("rows"); });
    } else if (what == "ahead") {
      run_ahead(runtime);
    } else if (what == "trace_room") {
      check_trace_room(runtime, workload);
    } else if (what == "stuck_get") {  // the copy into a slot that is released while gets no longer arrive
      settled_stats(runtime);
      gpu_->hold_gets();
      const LayerIndex first = runtime.pool().placement().ring_plan(rank_)[0].layer;
      const Stream stream = gpu_->hooks().stream;
      runtime.begin_step(stream, 1);
      (void)runtime.fetch_layer(stream, first);
      runtime.release_layer(stream, first);
    } else if (what == "close_in_step") {
      std::mt19937_64 random(5);
      workload.forward(runtime, runtime.begin_step(gpu_->hooks().stream, 1).mode, 5, random);
      runtime.close();
      return gpu_->finish();
    } else {
      steps(workload, runtime);
    }
    if (gpu_) gpu_->wait();
    if (what == "steps" || what == "held_rows") runtime.check();  // before what was computed is looked at
    if (gpu_) gpu_->finish();
    if (number("linger", 0) != 0) {
      mark("waiting");
      await("stop");
      if (what == "steps") runtime.check();
    }
    if (number("trace", 0) != 0) {
      const RuntimeStats after = settled_stats(runtime);
      const Trace trace = runtime.stop_trace();
      check_trace(trace, before, after, ringed(runtime));
      note("copies", copies_in(trace));
    }
    report(runtime.stats());
    if (number("close_in_capture", 0) != 0) gpu_->in_capture([&] { runtime.close(); });
    note("idle", runtime.close() ? 1 : 0);
    if (gpu_) note("still_registered", gpu_->num_registered());
    note("freed", backend->close() ? 1 : 0);
    mark("closed");
  }

  static std::vector<LayerIndex> ringed(const Runtime& runtime) {
    const Placement& placement = runtime.pool().placement();
    const Rank rank = runtime.pool().backend().rank();
    std::vector<LayerIndex> layers;
    for (const RingEntry& entry : placement.ring_plan(rank)) layers.push_back(entry.layer);
    layers.resize(std::min(layers.size(), static_cast<std::size_t>(placement.num_slots(rank))));
    return layers;
  }
  // Of this process's memory maps, those with a file of such a name.
  static std::int64_t num_mapped(const std::string& name) {
    std::ifstream maps("/proc/self/maps");
    std::int64_t count = 0;
    for (std::string line; std::getline(maps, line);) count += line.find(name) != std::string::npos ? 1 : 0;
    return count;
  }

  // A trace with room for just as many events as there are has no want of anything else.
  void check_trace_room(Runtime& runtime, Workload& workload) {
    std::size_t room = 1000;
    for (int i = 0; i < 2; ++i) {
      std::mt19937_64 random(4);
      settled_stats(runtime);
      runtime.start_trace(room);
      workload.step(runtime, {}, random);
      gpu_->wait();
      settled_stats(runtime);
      const Trace trace = runtime.stop_trace();
      if (trace.dropped + trace.unfinished != 0 || (i > 0 && trace.events.size() != room))
        throw Mismatch(std::to_string(trace.events.size()) + " of " + std::to_string(room) + " events, " +
                       std::to_string(trace.dropped) + " dropped");
      room = trace.events.size();
    }
  }

  // An engine at a local layer of a CaS step: how=held, how=released, or how=ended, the step without a release. Or at
  // the remote layer before one, whose how=first or how=last op was answered.
  void turn(Runtime& runtime) {
    const Stream stream = gpu_->hooks().stream;
    const std::string how = text("how", "held");
    LayerIndex local = 1;
    while (!runtime.pool().is_local(local) || runtime.pool().is_local(local - 1)) ++local;
    runtime.begin_step(stream, 1);
    const std::vector<Op>& ops = runtime.mailbox()->ops();
    std::vector<std::byte> x, y;
    if (how == "first" || how == "last") {
      const auto op = static_cast<OpIndex>(how == "first" ? 0 : ops.size() - 1);
      x.resize(ops[static_cast<std::size_t>(op)].in_row_bytes);
      y.resize(ops[static_cast<std::size_t>(op)].out_row_bytes);
      runtime.remote_compute(stream, local - 1, op, x.data(), 1, y.data());
    } else {
      (void)runtime.fetch_layer(stream, local);
    }
    if (how == "released") runtime.release_layer(stream, local);
    if (how == "ended") runtime.end_step(/*broken_off=*/true);
    gpu_->wait();
    mark("in turn");
    await("end");
    if (how != "ended") runtime.end_step(/*broken_off=*/true);
    gpu_->wait();
  }

  // Requests one after the other, each of a layer that is asked for and of `local` layers in front of it.
  void run_ahead(Runtime& runtime) {
    const Stream stream = gpu_->hooks().stream;
    LayerIndex remote = 0, local = 0;
    while (runtime.pool().is_local(remote)) ++remote;
    while (!runtime.pool().is_local(local)) ++local;
    std::vector<std::byte> x(8192), y(8192);
    std::int64_t unanswered = 0;
    const auto answered = [&] {
      const auto by_peer = runtime.stats().requester.requests_by_peer;
      return std::accumulate(by_peer.begin(), by_peer.end(), std::int64_t{0});
    };
    runtime.begin_step(stream, 1);
    for (std::int64_t asked = 1; asked <= 12; ++asked) {
      for (std::int64_t i = 0; i < number("local", 0); runtime.release_layer(stream, local), ++i)
        (void)runtime.fetch_layer(stream, local);
      runtime.remote_compute(stream, remote, 0, x.data(), 1, y.data());
      unanswered = std::max(unanswered, asked - answered());
    }
    runtime.end_step(false);
    note("unanswered", unanswered);
    runtime.begin_step(stream, 1, StepKind::kRun, Mode::kWas);
    note("unanswered_before_was", 12 - answered());
    runtime.end_step(true);
  }

  // Pools one after the other on a device where others take memory and give it back in between.
  void reopen(const std::shared_ptr<Bootstrap>& bootstrap) {
    gpu_->set_total(static_cast<std::size_t>(number("total", 0)));
    const bool takes = number("take_rank", rank_) == rank_;
    for (std::int64_t i = 0; i < number("times", 3); ++i) {
      if (takes && i == number("take_at", -1)) gpu_->take(number("take", 0));
      if (takes && i == number("give_back_at", -1)) gpu_->take(-number("take", 0));
      const std::string token = token_ + std::to_string(i);
      auto backend = make_backend(
          {.name = "nvshmem", .rank = rank_, .world_size = spec_.world_size, .token = token, .device = 0}, bootstrap);
      try {
        WeightPool pool(backend, spec_.placement(), spec_.manifest());
        if (!backend->close()) throw std::runtime_error("close() kept the memory");
        note("opened", i);
      } catch (const Error& error) {
        if (error.code() != ErrorCode::kCapacity) throw;
        note("refused", i);
      }
      if (gpu_->num_pieces() != 0) throw std::runtime_error("symmetric memory is left");
    }
  }

  // `steps` steps, then on until the mark "stop" is there, then one more.
  void steps(Workload& workload, Runtime& runtime) {
    std::mt19937_64 random(static_cast<std::uint64_t>(number("seed", 1) * 100 + rank_));
    const auto start = Clock::now();
    const bool until_stop = number("until_stop", 0) != 0;
    std::int64_t longest_us = 0, count = 0;
    for (bool stopping = false; count < number("steps", 5) || (until_stop && !stopping); ++count) {
      stopping = std::filesystem::exists(folder_ / "stop");
      if (Clock::now() - start > kMarkDeadline) throw std::runtime_error("the mark 'stop' did not come");
      StepPlan plan{.num_tokens = 1 + static_cast<std::int64_t>(random() % 6)};
      if (!stopping && random() % 8 == 0) plan.break_at = static_cast<LayerIndex>(random() % spec_.layer_bytes.size());
      const auto step_start = Clock::now();
      workload.step(runtime, plan, random);
      if (gpu_ && count % 4 == 3) gpu_->wait();  // an engine does not run ahead for ever
      longest_us = std::max<std::int64_t>(
          longest_us, std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - step_start).count());
    }
    note("steps", count);
    note("longest_ms", longest_us / 1000);
  }

  void report(const RuntimeStats& stats) {
    std::uint64_t requests = 0, served = 0, copied = 0;
    const LaneStats& lane = stats.prefetcher.lane;
    for (const auto n : stats.requester.requests_by_peer) requests += n;
    for (const auto n : stats.service.served_by_peer) served += n;
    for (const auto n : lane.bytes_by_peer) copied += n;
    note("was_steps", stats.steps[0]);
    note("cas_steps", stats.steps[1]);
    note("fetches", stats.prefetcher.fetches);
    double longest_ms = 0;
    std::uint64_t timed = 0;
    for (const auto& entry : stats.step_times) {
      timed += entry.steps;
      longest_ms = std::max(longest_ms, entry.measured_ms);
    }
    note("timed", timed);
    note("longest_us", static_cast<std::int64_t>(1e3 * longest_ms));
    note("fallbacks", stats.requester.fallbacks);
    note("requests", requests);
    note("rows", stats.requester.rows_sent);
    note("served", served);
    note("deferred", stats.service.deferred);
    note("not_served", stats.service.failed);
    note("copied", copied);
    note("owners_engines", std::count(lane.owners_engines.begin(), lane.owners_engines.end(), true));
    note("why_read", lane.why_read);
    note("exclusive_links", lane.exclusive_links);
    note("links_taken", lane.links_taken);
  }

  template <typename Value>
  void note(const std::string& key, const Value& value) {
    result_ << key << ' ' << value << '\n';
  }
  void mark(const std::string& name) const { write_file(folder_ / (name + "-" + std::to_string(rank_)), ""); }
  void await(const std::string& name) const {
    if (!poll_until(kMarkDeadline, [&] { return std::filesystem::exists(folder_ / name); }))
      throw std::runtime_error("the mark '" + name + "' did not come");
  }
  [[nodiscard]] std::string text(const std::string& key, const std::string& otherwise) const {
    const auto found = settings_.find(key);
    return found == settings_.end() ? otherwise : found->second;
  }
  [[nodiscard]] std::int64_t number(const std::string& key, std::int64_t otherwise) const {
    const auto found = settings_.find(key);
    return found == settings_.end() ? otherwise : std::stoll(found->second);
  }

  std::filesystem::path folder_;
  Rank rank_;
  std::string token_;
  std::map<std::string, std::string> settings_;
  WorkloadSpec spec_;
  std::unique_ptr<EmulatedGpu> gpu_;
  std::ostringstream result_;
};

}  // namespace
}  // namespace sidp::test

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "usage: %s FOLDER RANK WORLD_SIZE TOKEN [key=value ...]\n", argv[0]);
    return 2;
  }
  ::umask(0);  // the mode of a segment must not depend on it
  std::map<std::string, std::string> settings;
  for (int i = 5; i < argc; ++i) {
    const std::string argument = argv[i];
    settings[argument.substr(0, argument.find('='))] = argument.substr(argument.find('=') + 1);
  }
  return sidp::test::RankProcess(argv[1], std::atoi(argv[2]), std::atoi(argv[3]), argv[4], std::move(settings)).run();
}
