#include "emulated_gpu.hpp"
#include "sidp/error.hpp"

namespace sidp::test {

std::unique_ptr<EmulatedGpu> make_emulated_gpu(const std::filesystem::path&, Rank, Rank) {
  throw Error(ErrorCode::kUnsupported, "the GPU backend is not in this build");
}

}  // namespace sidp::test
