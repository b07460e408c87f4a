// Real rank processes for tests: started by posix_spawn, bounded by deadlines, killed by their parent whatever happens.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "sidp/types.hpp"

namespace sidp::test {

// What a rank process reported, key by key; see rank_process.cpp.
using RankResult = std::map<std::string, std::string>;

// A reported number; -1 if the rank did not report it.
std::int64_t number(const RankResult& result, const std::string& key);

class RankGroup {
 public:
  // settings: "key=value" arguments for every rank.
  RankGroup(Rank world_size, std::vector<std::string> settings);
  ~RankGroup();  // kills what is left and removes folder and names
  RankGroup(const RankGroup&) = delete;
  RankGroup& operator=(const RankGroup&) = delete;

  void start(Rank rank, const std::vector<std::string>& more = {});
  void start_all();
  void signal(Rank rank, int number);  // SIGKILL also reaps
  // Until the rank wrote that mark, e.g. "ready". Fails the test after the deadline.
  void wait_for_mark(Rank rank, const std::string& mark);
  void set_mark(const std::string& name);  // a file that rank processes look for, e.g. "stop"
  // Ends within the deadline or is killed and reported. Exit status of a rank that was killed before: -SIGKILL.
  int wait(Rank rank);
  [[nodiscard]] RankResult result(Rank rank) const;
  [[nodiscard]] std::string log(Rank rank) const;

  [[nodiscard]] const std::string& token() const { return token_; }
  [[nodiscard]] std::vector<std::string> names_left() const;  // of this group, in /dev/shm

 private:
  [[nodiscard]] std::string file(const std::string& name, Rank rank) const;

  Rank world_size_;
  std::vector<std::string> settings_;
  std::filesystem::path folder_;
  std::string token_;
  std::vector<pid_t> pids_;  // 0: not started or reaped
  std::vector<int> status_;
};

}  // namespace sidp::test
