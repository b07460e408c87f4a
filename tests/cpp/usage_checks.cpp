#include "usage_checks.hpp"

#include <functional>
#include <string>

#include "sidp/error.hpp"

namespace sidp::test {

namespace {

void expect(ErrorCode code, const std::string& what, const std::function<void()>& call,
            const std::string& message_part = "") {
  try {
    call();
  } catch (const Error& error) {
    if (error.code() != code)
      throw Mismatch(what + " threw " + to_string(error.code()) + ", not " + to_string(code) + ": " + error.what());
    if (std::string(error.what()).find(message_part) == std::string::npos)
      throw Mismatch(what + " does not say '" + message_part + "': " + error.what());
    return;
  }
  throw Mismatch(what + " was not refused");
}

void expect_works(Workload& workload, Runtime& runtime) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 3; ++i) workload.step(runtime, {}, random);
}

}  // namespace

void check_usage(Workload& workload, Runtime& runtime, const WorkloadSpec& spec, std::optional<Mode> mode,
                 Stream stream) {
  const Placement& placement = workload.pool()->placement();
  const Rank rank = workload.pool()->backend().rank();
  const auto plan = placement.ring_plan(rank);
  const LayerIndex first = plan[0].layer, second = plan[1].layer;
  LayerIndex local = 0;
  while (!placement.is_local(rank, local)) ++local;
  std::vector<std::byte> x(static_cast<std::size_t>(spec.max_rows + 1) * 8192), y(x.size());
  const auto compute = [&](LayerIndex layer, OpIndex op, std::int64_t rows) {
    return [&, layer, op, rows] { runtime.remote_compute(stream, layer, op, x.data(), rows, y.data()); };
  };
  const auto fetch = [&](LayerIndex layer) { return [&, layer] { (void)runtime.fetch_layer(stream, layer); }; };
  const auto release = [&](LayerIndex layer) { return [&, layer] { runtime.release_layer(stream, layer); }; };

  expect(ErrorCode::kUsage, "fetch outside a step", fetch(first));
  expect(ErrorCode::kUsage, "release outside a step", release(first));
  expect(ErrorCode::kUsage, "compute outside a step", compute(first, 0, 1));
  expect(ErrorCode::kUsage, "end outside a step", [&] { runtime.end_step(false); });
  expect(ErrorCode::kConfig, "a step of no tokens", [&] { runtime.begin_step(stream, 0); });
  expect(ErrorCode::kUsage, "publishing twice", [&] { workload.pool()->publish(); });
  expect(ErrorCode::kUsage, "writing a peer's layer", [&] { (void)workload.pool()->local_layer(first); });
  expect_works(workload, runtime);

  runtime.begin_step(stream, 1);
  int other = 0;
  expect(ErrorCode::kUsage, "another stream", [&] { (void)runtime.fetch_layer({&other}, local); }, "another stream");
  expect(ErrorCode::kUsage, "launched() of a step that runs", [&] { runtime.check_launch(); }, "replay");
  expect(ErrorCode::kUsage, "a step in a step", [&] { runtime.begin_step(stream, 1); });
  expect(ErrorCode::kUnknownName, "fetch of no layer", fetch(placement.num_layers()));
  expect(ErrorCode::kUnknownName, "release of no layer", release(-1));
  expect(ErrorCode::kUnknownName, "compute on no layer", compute(placement.num_layers(), 0, 1));
  expect(ErrorCode::kUsage, "compute on a local layer", compute(local, 0, 1));
  expect(ErrorCode::kUnknownName, "no such op name", [&] { (void)runtime.mailbox()->op_index("none"); }, "mix");
  if (mode == Mode::kWas) {
    expect(ErrorCode::kUsage, "compute in a WaS step", compute(first, 0, 1));
    expect(ErrorCode::kUsage, "fetch out of order", fetch(second), "layer " + std::to_string(first));
    expect(ErrorCode::kUsage, "release of what is not held", release(first));
    fetch(first)();
    expect(ErrorCode::kUsage, "fetch of a held layer", fetch(first));
    // The layers that follow go into other slots until the ring is used up.
    std::size_t next = 1;
    while (next < plan.size() && plan[next].slot != plan[0].slot) fetch(plan[next++].layer)();
    expect(ErrorCode::kUsage, "fetch into a held slot", fetch(plan[next].layer), "slot");
    expect(ErrorCode::kUsage, "an incomplete step", [&] { runtime.end_step(false); }, "skipped");
  } else {
    expect(ErrorCode::kUsage, "fetch in a CaS step", fetch(first));
    expect(ErrorCode::kShape, "no rows", compute(first, 0, 0));
    expect(
        ErrorCode::kUsage, "no room for an answer that is not lent",
        [&] { runtime.remote_compute(stream, first, 0, x.data(), spec.max_rows, nullptr); }, "always copied");
    expect(ErrorCode::kShape, "rows beyond the slot", compute(first, 0, spec.max_rows + 1), "max_rows");
    expect(ErrorCode::kUnknownName, "no such op", compute(first, 2, 1));
    expect(ErrorCode::kUnknownName, "no such op", compute(first, -1, 1));
    expect(ErrorCode::kUnknownName, "op that the layer lacks", compute(first % 2 == 1 ? first : second, 1, 1));
    runtime.end_step(false);
  }
  expect_works(workload, runtime);
  runtime.begin_step(stream, 1);
  runtime.end_step(/*broken_off=*/true);
  expect_works(workload, runtime);

  runtime.close();
  runtime.close();
  expect(ErrorCode::kClosed, "a step after close", [&] { runtime.begin_step(stream, 1); });
  expect(ErrorCode::kClosed, "fetch after close", fetch(first));
  expect(ErrorCode::kClosed, "compute after close", compute(first, 0, 1));
  expect(ErrorCode::kClosed, "end after close", [&] { runtime.end_step(true); });
  (void)runtime.stats();
  // Its lane and service left flags and ring in mid-order.
  expect(
      ErrorCode::kUsage, "a second runtime on one pool",
      [&] {
        RuntimeOptions options;
        options.profile = cas_profile();
        const Runtime another(workload.pool(), {}, options);
      },
      "one runtime");
}

void check_slow_lane(Runtime& runtime, const Workload& workload, bool break_off) {
  const Stream stream{};
  const LayerIndex first = workload.pool()->placement().ring_plan(workload.pool()->backend().rank())[0].layer;
  runtime.begin_step(stream, 1);
  const auto start = Clock::now();
  if (break_off) {
    expect(
        ErrorCode::kDeadline, "draining a slow lane", [&] { runtime.end_step(true); },
        "layer " + std::to_string(first));
  } else {
    expect(
        ErrorCode::kDeadline, "fetch of a slow lane", [&] { (void)runtime.fetch_layer({}, first); },
        "layer " + std::to_string(first));
    runtime.end_step(true);
  }
  if (Clock::now() - start > Milliseconds(5000)) throw Mismatch("the deadline was much too late");
  expect(
      ErrorCode::kUsage, "a step after a missed deadline", [&] { runtime.begin_step(stream, 1); },
      "no longer in order");
}

}  // namespace sidp::test
