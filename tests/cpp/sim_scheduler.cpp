#include "sim_scheduler.hpp"

#include <algorithm>
#include <exception>
#include <utility>

namespace sidp::test {

namespace {

constexpr std::uint64_t kMaxChoices = 200000;
constexpr std::size_t kTraceLength = 40;

thread_local void* current = nullptr;

const char* name(ThreadKind kind) {
  return kind == ThreadKind::kEngine ? "engine" : kind == ThreadKind::kLane ? "lane" : "service";
}

}  // namespace

RandomChooser::RandomChooser(std::uint64_t seed) : random_(seed) {
  constexpr std::uint64_t kStay[] = {0, 30, 60, 85};
  stay_percent_ = kStay[random_() % 4];
}

std::size_t RandomChooser::choose(std::size_t count) { return random_() % 100 < stay_percent_ ? 0 : random_() % count; }

std::size_t ExhaustiveChooser::choose(std::size_t count) {
  if (position_ == path_.size()) path_.push_back({0, std::min(count, budget_ - spent_ + 1)});
  const std::size_t picked = path_[position_++].picked;
  spent_ += picked;
  return picked;
}

bool ExhaustiveChooser::next() {
  while (!path_.empty() && path_.back().picked + 1 >= path_.back().options) path_.pop_back();
  if (path_.empty()) return false;
  ++path_.back().picked;
  position_ = 0;
  spent_ = 0;
  return true;
}

std::thread Scheduler::start(Rank rank, ThreadKind kind, std::function<void()> body) {
  threads_.push_back(std::make_unique<Thread>());
  Thread& thread = *threads_.back();
  thread.rank = rank;
  thread.kind = kind;
  thread.number = threads_.size() - 1;
  return std::thread([this, &thread, rank, kind, body = std::move(body)] {
    current = &thread;
    thread.go.acquire();
    try {
      if (!teardown_) body();
    } catch (const SimKilled&) {
    } catch (const std::exception& error) {
      fail("rank " + std::to_string(rank) + " " + name(kind) + " threw: " + error.what());
    }
    thread.finished = true;
    switch_from(thread);
  });
}

void Scheduler::run() {
  Thread* first = threads_.front().get();
  first->go.release();
  over_.acquire();
}

void Scheduler::yield(const char* what, bool quiet) {
  auto& self = *static_cast<Thread*>(current);
  self.at = what;
  if (!teardown_) remember(self);
  switch_from(self);
  if (teardown_ && !quiet) throw SimKilled{};
}

bool Scheduler::block(const char* what, std::function<bool()> ready, std::int64_t deadline_ms, bool quiet) {
  auto& self = *static_cast<Thread*>(current);
  self.at = what;
  self.ready = std::move(ready);
  self.expires_at = deadline_ms < 0 ? -1 : now_ms_ + deadline_ms;
  self.expired = false;
  if (!teardown_) remember(self);
  switch_from(self);
  const bool is_ready = self.ready();
  self.ready = nullptr;
  if (teardown_ && !quiet) throw SimKilled{};
  return is_ready;
}

void Scheduler::fail(const std::string& what) {
  if (failure_.empty()) {
    failure_ = what + "\n  at choice " + std::to_string(choices_) + ", threads:";
    for (const auto& thread : threads_)
      if (!thread->finished) failure_ += "\n    " + describe(*thread) + (thread->ready ? " (blocked)" : "");
    failure_ += "\n  last primitives:";
    for (const std::string& line : trace_) failure_ += "\n    " + line;
  }
  teardown_ = true;
}

bool Scheduler::finished(Rank rank, ThreadKind kind) const {
  return std::all_of(threads_.begin(), threads_.end(), [&](const auto& thread) {
    return thread->finished || thread->rank != rank || thread->kind != kind;
  });
}

void Scheduler::switch_from(Thread& self) {
  Thread* next = pick(self);
  if (next == &self) return;
  const bool stays = !self.finished;  // after the hand-over the next thread may look at self
  if (next != nullptr)
    next->go.release();
  else
    over_.release();
  if (stays) self.go.acquire();
}

Scheduler::Thread* Scheduler::pick(const Thread& self) {
  if (teardown_) return pick_for_teardown();
  if (++choices_ > kMaxChoices) fail("livelock: " + std::to_string(kMaxChoices) + " choices");
  apply_faults();
  std::vector<Thread*> options;
  while (!teardown_) {
    for (std::size_t i = 0; i < threads_.size(); ++i) {
      Thread* thread = threads_[(self.number + i) % threads_.size()].get();
      if (thread->finished || dead(thread->rank) || hung(*thread) || thread->not_before > choices_) continue;
      if (!thread->ready || thread->expired || thread->ready()) options.push_back(thread);
    }
    if (!options.empty()) return options[armed_at_ && options.size() > 1 ? chooser_.choose(options.size()) : 0];
    if (!advance()) break;
  }
  teardown_ = true;
  return pick_for_teardown();
}

// Lanes and services first: a destructor of the engine's thread joins them.
Scheduler::Thread* Scheduler::pick_for_teardown() {
  Thread* left = nullptr;
  for (const auto& thread : threads_) {
    if (thread->finished) continue;
    if (thread->kind != ThreadKind::kEngine) return thread.get();
    left = thread.get();
  }
  return left;
}

void Scheduler::apply_faults() {
  if (!armed_at_) return;
  const std::uint64_t at = choices_ - *armed_at_;
  if (faults_.dies && !died_at_ && at >= faults_.die_at) died_at_ = choices_;
  if (died_at_ && choices_ >= *died_at_ + faults_.detect_after) detected_ = true;
  if (faults_.hangs && hang_ == Hang::kBefore && at >= faults_.hang_at) hang_ = Hang::kNow;
  if (hang_ == Hang::kNow && gave_up_at_ && choices_ >= *gave_up_at_ + faults_.resume_after) hang_ = Hang::kOver;
  if (delays_() % 1000 < faults_.delays_per_mille)
    threads_[delays_() % threads_.size()]->not_before = choices_ + 1 + delays_() % 40;
}

// Nothing can run: what happens next, in the order in which time would bring it. False when the run is over.
bool Scheduler::advance() {
  bool delayed = false;
  for (const auto& thread : threads_)
    if (std::exchange(thread->not_before, 0) > choices_) delayed = true;
  if (delayed) return true;
  if (died_at_ && !std::exchange(detected_, true)) return true;
  Thread* earliest = nullptr;
  for (const auto& thread : threads_)
    if (!thread->finished && thread->ready && thread->expires_at >= 0 && !dead(thread->rank) && !hung(*thread) &&
        (earliest == nullptr || thread->expires_at < earliest->expires_at))
      earliest = thread.get();
  if (earliest != nullptr) {
    now_ms_ = std::max(now_ms_, earliest->expires_at);
    earliest->expired = true;
    ++expiries_;
    if (hang_ == Hang::kNow && !gave_up_at_) gave_up_at_ = choices_;
    return true;
  }
  if (hang_ == Hang::kNow) {
    hang_ = Hang::kOver;
    return true;
  }
  for (const auto& thread : threads_)
    if (!thread->finished && !dead(thread->rank)) {
      fail("deadlock: nothing can run and no wait has a deadline");
      break;
    }
  return false;
}

bool Scheduler::hung(const Thread& thread) const {
  return hang_ == Hang::kNow && faults_.hangs == thread.rank &&
         (!faults_.hangs_only || *faults_.hangs_only == thread.kind);
}

std::string Scheduler::describe(const Thread& thread) const {
  return "rank " + std::to_string(thread.rank) + " " + name(thread.kind) + ": " + thread.at +
         (dead(thread.rank) ? " (dead)"
          : hung(thread)    ? " (hung)"
                            : "");
}

void Scheduler::remember(const Thread& thread) {
  if (trace_.size() == kTraceLength) trace_.pop_front();
  trace_.push_back(describe(thread));
}

}  // namespace sidp::test
