// Step times from events on the step's stream: calls only enqueue, so the host's clock says nothing of them.
#pragma once

#include <memory>
#include <vector>

#include "device.hpp"

namespace sidp::nvshmem {

class EventTimer final : public StepTimer {
 public:
  explicit EventTimer(std::shared_ptr<const Device> device);  // throws Error(kDevice)

  bool begin(Stream stream) noexcept override;
  void end(Stream stream) noexcept override;
  void drop() noexcept override {}  // its events are recorded anew by the next one
  std::optional<double> take() noexcept override;

 private:
  // An engine that runs further ahead of its GPU has some steps untimed.
  static constexpr std::size_t kUnderWay = 8;
  struct Pair {
    DeviceEvent start, end;
    bool failed = false;  // an event could not be recorded
  };
  std::shared_ptr<const Device> device_;
  std::vector<Pair> pairs_;
  std::size_t oldest_ = 0;
  std::size_t ended_ = 0;  // pairs from the oldest on that wait to be taken
};

}  // namespace sidp::nvshmem
