// The timer of backends whose calls do not outlast a step: this machine's clock.
#include <chrono>
#include <utility>

#include "sidp/backend.hpp"

namespace sidp {

namespace {

class ClockTimer final : public StepTimer {
 public:
  bool begin(Stream) noexcept override {
    start_ = Clock::now();
    return true;
  }
  void end(Stream) noexcept override {
    last_ms_ = std::chrono::duration<double, std::milli>(Clock::now() - start_).count();
  }
  void drop() noexcept override {}
  std::optional<double> take() noexcept override { return std::exchange(last_ms_, std::nullopt); }

 private:
  Clock::time_point start_;
  std::optional<double> last_ms_;
};

}  // namespace

std::unique_ptr<StepTimer> Backend::make_step_timer() { return std::make_unique<ClockTimer>(); }

}  // namespace sidp
