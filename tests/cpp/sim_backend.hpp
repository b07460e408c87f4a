// N simulated ranks in one process: the Backend interface over plain memory and the deterministic scheduler.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "sidp/backend.hpp"
#include "sim_scheduler.hpp"

namespace sidp::test {

// What all ranks share. Memory outlives its rank, as mapped shared memory does.
class SimWorld {
 public:
  SimWorld(Scheduler& its_scheduler, Rank num_ranks)
      : scheduler(its_scheduler),
        world_size(num_ranks),
        flags(static_cast<std::size_t>(num_ranks)),
        left(static_cast<std::size_t>(num_ranks)) {}

  Scheduler& scheduler;
  const Rank world_size;
  std::vector<std::vector<FlagValue>> flags;                                           // by rank
  std::vector<bool> left;                                                              // by rank
  std::map<std::string, std::vector<std::optional<std::string>>> gathered;             // by key and rank
  std::map<std::string, std::vector<std::shared_ptr<std::vector<std::byte>>>> pieces;  // by label and rank
};

std::shared_ptr<Backend> make_sim_backend(SimWorld& world, Rank rank);

}  // namespace sidp::test
