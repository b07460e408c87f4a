#include "emulated_gpu.hpp"

#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <deque>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <thread>

#include "backends/nvshmem/event_clock.hpp"
#include "backends/nvshmem/event_timer.hpp"
#include "backends/nvshmem/nvshmem_backend.hpp"
#include "backends/registry.hpp"
#include "sidp/error.hpp"

namespace sidp::test {

namespace {

using BeginCapture = CUresult(CUstream, CUstreamCaptureMode);
using EndCapture = CUresult(CUstream, CUgraph*);

constexpr Milliseconds kStreamDeadline{20000};
constexpr ByteCount kMostBytes = 32768;  // of an op's answer

void* load(const char* path) {
  // By path and before anybody else: a later request for its soname finds this one.
  void* const library = ::dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) throw std::runtime_error(::dlerror());
  return library;
}

template <typename Function>
Function* look_up(void* library, const char* name) {
  auto* const function = reinterpret_cast<Function*>(::dlsym(library, name));
  if (function == nullptr) throw std::runtime_error(std::string("the emulator lacks ") + name);
  return function;
}

void must(CUresult result, const char* what) {
  if (result != CUDA_SUCCESS) throw std::runtime_error(std::string(what) + " failed");
}

template <typename Call>
void expect_usage(Call call, const std::string& words) {
  try {
    call();
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kUsage && std::string(error.what()).find(words) != std::string::npos) return;
    throw;
  }
  throw Mismatch("nothing was thrown where '" + words + "' should have been");
}

class Emulation final : public EmulatedGpu {
 public:
  Emulation(const std::filesystem::path& folder, Rank rank, Rank world_size)
      : cuda_(load(SIDP_EMULATED_CUDA)), nvshmem_(load(SIDP_EMULATED_NVSHMEM)) {
    look_up<void(const char*, int, int)>(nvshmem_, "emulator_start_nvshmem")(folder.c_str(), rank, world_size);
    look_up<void(int)>(cuda_, "emulator_set_num_devices")(world_size);
    for (Rank other = 0; other < world_size; ++other) ordinals_.push_back((other - rank + world_size) % world_size);
    device_ = std::make_shared<const sidp::nvshmem::Device>(0);
    for (auto& stream : streams_)
      stream = std::make_unique<sidp::nvshmem::DeviceStream>(*device_, sidp::nvshmem::DeviceStream::Priority::kDefault);
    current_ = streams_[0]->get();
  }

  [[nodiscard]] std::vector<int> ordinals() const override { return ordinals_; }
  void set_total(std::size_t bytes) override { look_up<void(std::size_t)>(cuda_, "emulator_set_total")(bytes); }
  void take(std::int64_t bytes) override { look_up<void(std::int64_t)>(cuda_, "emulator_use")(bytes); }
  void fail_launches() override { look_up<void(bool)>(cuda_, "emulator_fail_graph_launch")(true); }
  void in_capture(const std::function<void()>& calls) override {
    begin_capture(CU_STREAM_CAPTURE_MODE_GLOBAL);
    calls();  // in this thread's own mode: no ContextScope here
    end_capture();
  }
  void fail_registration() override { look_up<void()>(nvshmem_, "emulator_fail_registration")(); }
  void misbehave(const std::string& how) override {
    if (how == "hide_peers") return ordinals_.clear();
    if (how == "hide_one") return std::replace(ordinals_.begin(), ordinals_.end(), 1, -1);
    if (!how.empty()) look_up<void()>(cuda_, ("emulator_" + how).c_str())();
  }
  void hold_gets() override { look_up<void()>(nvshmem_, "emulator_hold_gets")(); }
  void hold_context() override { look_up<void(CUstream)>(cuda_, "emulator_hold_context")(current_); }
  [[nodiscard]] WorkloadHooks hooks() override;
  std::vector<Op> ops(Backend& backend, const std::vector<Op>& plain) const override;
  void capture(Runtime& runtime, const std::vector<Op>& plain) override;
  [[nodiscard]] int num_pieces() const override { return look_up<int()>(nvshmem_, "emulator_num_pieces")(); }
  [[nodiscard]] int num_registered() const override { return look_up<int()>(nvshmem_, "emulator_num_registered")(); }
  void wait() override;
  void finish() override;
  void check_events() override;
  void check_streams(Workload& workload, Runtime& runtime) override;
  void hold_rows(Workload& workload, Runtime& runtime, const std::function<void()>& meanwhile) override;
  void check_reopened(const std::shared_ptr<Bootstrap>& bootstrap, Rank rank, const WorkloadSpec& spec,
                      const std::string& token) override;
  void check_replay(Workload& workload, Runtime& runtime) override;

 private:
  void enqueue(std::function<void()> work) {
    works_.push_back([this, work = std::move(work)] {
      try {
        work();
      } catch (const std::exception& error) {
        const std::lock_guard lock(mutex_);
        if (!failure_) failure_ = error.what();
      }
    });
    const sidp::nvshmem::ContextScope scope(*device_);
    must(device_->api().cuLaunchHostFunc(
             current_, [](void* data) { (*static_cast<std::function<void()>*>(data))(); }, &works_.back()),
         "cuLaunchHostFunc");
  }

  void begin_capture(CUstreamCaptureMode mode) {
    must(look_up<BeginCapture>(cuda_, "cuStreamBeginCapture_v2")(current_, mode), "begin");
  }
  CUgraph end_capture() {
    CUgraph graph = nullptr;
    must(look_up<EndCapture>(cuda_, "cuStreamEndCapture")(current_, &graph), "end");
    return graph;
  }
  CUgraphExec captured(const std::function<void()>& calls) {
    const sidp::nvshmem::ContextScope scope(*device_);
    CUgraphExec executable = nullptr;
    begin_capture(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
    calls();
    must(device_->api().cuGraphInstantiate(&executable, end_capture(), 0), "cuGraphInstantiate");
    return executable;
  }

  void* cuda_;
  std::vector<int> ordinals_;
  void* nvshmem_;
  std::shared_ptr<const sidp::nvshmem::Device> device_;
  std::unique_ptr<sidp::nvshmem::DeviceStream> streams_[2];
  CUstream current_;
  std::deque<std::function<void()>> works_;  // kept: graphs run them again
  std::deque<std::vector<std::byte>> answers_;
  std::mutex mutex_;
  std::optional<std::string> failure_;  // of a check on a stream; under mutex_
};

WorkloadHooks Emulation::hooks() {
  WorkloadHooks hooks;
  hooks.stream = {current_};
  hooks.on_stream = [this](std::function<void()> work) { enqueue(std::move(work)); };
  hooks.refuse = false;
  return hooks;
}

std::vector<Op> Emulation::ops(Backend& backend, const std::vector<Op>& plain) const {
  std::vector<Op> ops = plain;
  const auto& gpu = dynamic_cast<sidp::nvshmem::NvshmemBackend&>(backend);
  for (Op& op : ops)
    for (auto& kernel : op.kernels)
      if (kernel) kernel = std::make_shared<sidp::nvshmem::GraphOp>(gpu.device());
  return ops;
}

void Emulation::capture(Runtime& runtime, const std::vector<Op>& plain) {
  const auto& channel = dynamic_cast<const sidp::nvshmem::StreamChannel&>(*runtime.channel());
  const WeightPool& pool = runtime.pool();
  const Rank rank = pool.backend().rank();
  for (std::size_t o = 0; o < plain.size(); ++o)
    for (LayerIndex layer = 0; layer < pool.placement().num_layers(); ++layer) {
      const OpKernel* const kernel = plain[o].kernels[static_cast<std::size_t>(layer)].get();
      const Rank owner = pool.placement().owner(layer);
      if (kernel == nullptr || owner < 0) continue;
      const std::byte* const weights = owner == rank ? pool.local_layer(layer) : pool.peer_layer(layer);
      // NOLINTNEXTLINE: the mailbox hands its kernels out as const; this one is being filled
      auto& graphs = const_cast<sidp::nvshmem::GraphOp&>(
          dynamic_cast<const sidp::nvshmem::GraphOp&>(runtime.mailbox()->kernel(layer, static_cast<OpIndex>(o))));
      for (Rank requester = 0; requester < pool.placement().world_size(); ++requester) {
        if ((owner == rank) == (requester == rank)) continue;
        for (const std::int64_t rows : runtime.mailbox()->row_buckets()) {
          std::vector<std::byte>& y = answers_.emplace_back(kMostBytes);
          const std::byte* const x = channel.slot(owner, requester);
          const CUgraphExec ignored = captured([&] {
            channel.await_rows({current_}, {owner, requester, rows},
                               static_cast<ByteCount>(rows) * plain[o].in_row_bytes);
            enqueue([kernel, weights, x, rows, &y] { kernel->run(weights, x, rows, y.data()); });
            channel.put_answer({current_}, {owner, requester, rows},
                               {{y.data(), static_cast<ByteCount>(rows) * plain[o].out_row_bytes}});
          });
          // The emulator's graphs and their instances are one type, and add() copies it.
          graphs.add({owner, requester, rows}, reinterpret_cast<CUgraph>(ignored));
        }
      }
    }
}

void Emulation::wait() {
  const auto start = Clock::now();
  for (const auto& stream : streams_)
    while (!stream->idle()) {
      if (Clock::now() - start > kStreamDeadline) throw Mismatch("a stream did not come to its end");
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
}

void Emulation::finish() {
  wait();
  const std::lock_guard lock(mutex_);
  if (failure_) throw Mismatch(*failure_);
}

void Emulation::check_events() {
  const auto num_events = look_up<int()>(cuda_, "emulator_num_events");
  const int before = num_events();
  look_up<void(int)>(cuda_, "emulator_fail_event")(5);
  try {
    const sidp::nvshmem::EventTimer timer(device_);
    throw Mismatch("a timer was made of events that were not");
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kDevice) throw;
  }
  if (num_events() != before) throw Mismatch(std::to_string(num_events() - before) + " events are left");

  look_up<void(double)>(cuda_, "emulator_set_drift")(0.5);
  sidp::nvshmem::EventClock clock(device_, 2);
  constexpr TraceMark kMarks = 2;
  std::int64_t marked_ns[kMarks];
  for (TraceMark i = 0; i < kMarks; ++i) {
    std::this_thread::sleep_for(Milliseconds(60));
    if (clock.mark({current_}) != i) throw Mismatch("no mark");
    clock.wait(i, Clock::now() + kStreamDeadline);
    marked_ns[i] = trace_ns(Clock::now());
  }
  if (clock.mark({current_}) != kNoMark) throw Mismatch("more marks than were asked for");
  clock.finish(Clock::now() + kStreamDeadline);
  for (TraceMark i = 0; i < kMarks; ++i) {
    const auto ns = clock.ns(i);
    const std::int64_t off = ns ? *ns - marked_ns[i] : 0;
    // A wait may see the mark late on a busy machine; the drift alone is 30 ms at the first.
    if (!ns || off > clock.error_ns() + 1'000'000 || off < -20'000'000)
      throw Mismatch("mark " + std::to_string(i) + " is off by " + std::to_string(off) + " ns");
  }
}

void Emulation::check_streams(Workload& workload, Runtime& runtime) {
  std::mt19937_64 random(7);
  for (int i = 0; i < 12; ++i) {
    current_ = streams_[i % 2]->get();
    workload.use_stream({current_});
    if (i % 2 == 0) enqueue([] { std::this_thread::sleep_for(Milliseconds(20)); });
    workload.step(runtime, {.break_at = i % 5 == 3 ? 2 : -1}, random);
  }
  finish();
}

void Emulation::hold_rows(Workload& workload, Runtime& runtime, const std::function<void()>& meanwhile) {
  auto* const hold = look_up<void(bool)>(cuda_, "emulator_hold_rows");
  std::mt19937_64 random(9);
  hold(true);
  workload.step(runtime, {.break_at = 2}, random);
  meanwhile();
  hold(false);
}

void Emulation::check_reopened(const std::shared_ptr<Bootstrap>& bootstrap, Rank rank, const WorkloadSpec& spec,
                               const std::string& token) {
  std::mt19937_64 random(10);
  for (int i = 0; i < 4; ++i) {
    const auto backend = make_backend({.name = "nvshmem",
                                       .rank = rank,
                                       .world_size = spec.world_size,
                                       .token = token + std::to_string(i),
                                       .device = 0,
                                       .gpus = ordinals_},
                                      bootstrap);
    Workload workload(backend, spec, hooks());
    const std::vector<Op> plain = workload.ops();
    RuntimeOptions options;
    options.deadline = Milliseconds(3000);
    options.max_rows = spec.max_rows;
    options.profile = cas_profile();
    options.policy.fixed = Mode::kCas;
    options.row_buckets = spec.row_buckets(options.spin_rows);
    options.deferred_start = true;
    Runtime runtime(workload.pool(), ops(*backend, plain), options);
    capture(runtime, plain);
    runtime.start();
    for (int step = 0; step < 2 + i; ++step) workload.step(runtime, {}, random);
    wait();
    runtime.check();
    finish();
    bootstrap->all_gather("asked", "");
    if (!runtime.close() || !backend->close()) throw Mismatch("a runtime or its pool was not freed");
  }
}

void Emulation::check_replay(Workload& workload, Runtime& runtime) {
  std::mt19937_64 random(8);
  const Stream stream{current_};
  CUgraphExec graphs[2];
  for (const Mode mode : {Mode::kWas, Mode::kCas})
    graphs[static_cast<std::size_t>(mode)] = captured([&] {
      runtime.begin_step(stream, 1, StepKind::kCapture, mode);
      workload.forward(runtime, mode, -1, random);
      runtime.end_step(/*broken_off=*/false);
    });
  if (runtime.stats().steps != decltype(runtime.stats().steps){}) throw Mismatch("a capture was counted as a step");
  const auto answered = [&] {
    const auto by_peer = runtime.stats().requester.requests_by_peer;
    return std::accumulate(by_peer.begin(), by_peer.end(), std::uint64_t{0});
  };
  const auto launch = [&](Mode mode) {
    const sidp::nvshmem::ContextScope scope(*device_);
    must(device_->api().cuGraphLaunch(graphs[static_cast<std::size_t>(mode)], current_), "cuGraphLaunch");
    runtime.launched();
  };
  std::uint64_t requests = 0, of_a_graph = 0, due = 0;  // when a step begins: those of all steps but the last
  for (const Mode mode : {Mode::kCas, Mode::kCas, Mode::kCas, Mode::kWas, Mode::kWas, Mode::kCas, Mode::kCas}) {
    runtime.begin_step(stream, 1, StepKind::kReplay, mode);
    if (answered() < due) throw Mismatch("a third graph is launched behind requests without an answer");
    launch(mode);
    runtime.end_step(/*broken_off=*/false);
    if (of_a_graph == 0) {
      device_->api().cuStreamSynchronize(current_);
      of_a_graph = answered();
    }
    due = requests;
    requests += mode == Mode::kCas ? of_a_graph : 0;
  }
  const auto replay = [&](Mode mode) {
    runtime.begin_step(stream, 1, StepKind::kReplay, mode);
    launch(mode);
    runtime.end_step(/*broken_off=*/false);
  };
  for (int i = 0; i < 3; ++i) replay(Mode::kWas);
  const auto nap = [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(300)); };
  {
    const sidp::nvshmem::ContextScope scope(*device_);
    must(device_->api().cuLaunchHostFunc(current_, nap, nullptr), "cuLaunchHostFunc");
  }
  const auto start = Clock::now();
  for (int i = 0; i < 4; ++i) replay(Mode::kWas);
  if (Clock::now() - start > std::chrono::milliseconds(200)) throw Mismatch("graphs without requests wait for none");
  runtime.begin_step(stream, 1, StepKind::kRun, Mode::kCas);
  workload.forward(runtime, Mode::kCas, -1, random);
  runtime.end_step(/*broken_off=*/false);
  runtime.begin_step(stream, 1, StepKind::kReplay, Mode::kWas);
  const std::uint64_t seen = answered();
  device_->api().cuStreamSynchronize(current_);
  if (answered() != seen) throw Mismatch("a graph begins before the requests of calls are answered");
  launch(Mode::kWas);
  runtime.end_step(/*broken_off=*/false);
  for (int i = 0; i < 60; ++i) {
    if (i % 10 == 4) {  // calls one by one follow a graph of requests
      runtime.begin_step(stream, 1, StepKind::kRun, Mode::kWas);
      const std::uint64_t before = answered();
      device_->api().cuStreamSynchronize(current_);
      if (i == 4 && answered() != before)
        throw Mismatch("a step began before the requests of the graph before it were answered");
      workload.forward(runtime, Mode::kWas, -1, random);
      runtime.end_step(/*broken_off=*/false);
      workload.step(runtime, {}, random);
    }
    const Mode mode = runtime.begin_step(stream, 1, StepKind::kReplay, i % 3 == 0 ? Mode::kCas : Mode::kWas).mode;
    if (i % 10 == 5) {  // the engine raised before the launch
      runtime.end_step(/*broken_off=*/true);
      continue;
    }
    if (i % 10 == 6) {
      expect_usage([&] { runtime.end_step(/*broken_off=*/false); }, "launched");
      continue;
    }
    launch(mode);
    expect_usage([&] { runtime.check_launch(); }, "once");
    if (i % 10 == 7) device_->api().cuStreamSynchronize(current_);  // the engine waits inside the step
    runtime.end_step(/*broken_off=*/i % 10 == 8);                   // or raises after the launch
  }
  finish();
}

}  // namespace

std::unique_ptr<EmulatedGpu> make_emulated_gpu(const std::filesystem::path& folder, Rank rank, Rank world_size) {
  return std::make_unique<Emulation>(folder, rank, world_size);
}

}  // namespace sidp::test
