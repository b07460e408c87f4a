// The backends of this build, by name.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "sidp/backend.hpp"

namespace sidp {

struct BackendOptions {
  std::string name = "host";
  Rank rank = 0;
  Rank world_size = 1;
  std::string token;
  int device = -1;                     // nvshmem: ordinal of this rank's GPU
  std::vector<int> gpus{};             // nvshmem: all ranks' in this process, -1: not visible; none: no peer's is
  Milliseconds deadline{30000};        // nvshmem: of each of NVSHMEM's collectives
  bool test_without_mappings = false;  // nvshmem, tests only
};

std::vector<std::string> backend_names();
// Throws Error(kUnsupported) for a backend that this build does not have.
std::shared_ptr<Backend> make_backend(const BackendOptions& options, std::shared_ptr<Bootstrap> bootstrap);

}  // namespace sidp
