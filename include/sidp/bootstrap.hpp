// The one collective that set-up needs. Never used on the path of a step.
#pragma once

#include <string>
#include <vector>

namespace sidp {

class Bootstrap {
 public:
  virtual ~Bootstrap() = default;
  // Every rank's payload, by rank. Keys are used once. Throws Error(kDeadline) naming the ranks that did not come.
  virtual std::vector<std::string> all_gather(const std::string& key, const std::string& payload) = 0;
};

}  // namespace sidp
