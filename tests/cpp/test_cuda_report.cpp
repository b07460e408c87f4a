// The CUDA report must be safe to ask for on any machine, from any thread, whether or not it has a driver.
#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

#include "cuda/device_info.hpp"

namespace {

TEST(CudaReport, SaysWhyOrListsDevices) {
  const sidp::cuda::CudaReport report = sidp::cuda::cuda_report();
  EXPECT_EQ(report.compiled, report.compiled_version.has_value());
  EXPECT_TRUE(!report.devices.empty() || !report.reason.empty());
  for (const auto& device : report.devices) {
    EXPECT_FALSE(device.name.empty());
    EXPECT_GT(device.memory_bytes, 0u);
    EXPECT_TRUE(!report.reason.empty() || device.can_access_peer.size() == report.devices.size());
  }
}

TEST(CudaReport, IsTheSameFromEveryThread) {
  constexpr std::size_t kThreads = 8;
  std::vector<std::string> reasons(kThreads);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < kThreads; ++i)
    threads.emplace_back([&reasons, i] { reasons[i] = sidp::cuda::cuda_report().reason; });
  for (auto& thread : threads) thread.join();
  for (const auto& reason : reasons) EXPECT_EQ(reason, reasons[0]);
}

}  // namespace
