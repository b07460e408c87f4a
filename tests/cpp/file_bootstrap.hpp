// A bootstrap over files in one folder, for ranks that are real processes of one machine.
#pragma once

#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "sidp/bootstrap.hpp"
#include "sidp/error.hpp"
#include "sidp/types.hpp"

namespace sidp::test {

inline std::optional<std::string> read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return std::nullopt;
  return std::string(std::istreambuf_iterator<char>(file), {});
}

// Readers see all of it or nothing.
inline void write_file(const std::filesystem::path& path, const std::string& content) {
  const std::filesystem::path part = path.string() + ".part";
  std::ofstream(part, std::ios::binary) << content;
  std::filesystem::rename(part, path);
}

// False when the deadline passed first.
inline bool poll_until(Milliseconds deadline, const std::function<bool()>& done) {
  const auto start = Clock::now();
  while (!done()) {
    if (Clock::now() - start >= deadline) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(300));
  }
  return true;
}

class FileBootstrap final : public Bootstrap {
 public:
  // hold(key): called when the ranks' payloads are complete, for tests that look at or kill a rank in set-up.
  FileBootstrap(std::filesystem::path folder, Rank rank, Rank world_size, Milliseconds deadline,
                std::function<void(const std::string&)> hold)
      : folder_(std::move(folder)), rank_(rank), world_size_(world_size), deadline_(deadline), hold_(std::move(hold)) {}

  std::vector<std::string> all_gather(const std::string& key, const std::string& payload) override {
    const std::string prefix = "gather-" + std::to_string(count_++) + "-";
    write_file(folder_ / (prefix + std::to_string(rank_)), key + "\n" + payload);
    std::vector<std::string> all;
    std::string missing;
    const auto start = Clock::now();
    for (Rank r = 0; r < world_size_; ++r) {
      std::optional<std::string> content;
      const auto left = deadline_ - std::chrono::duration_cast<Milliseconds>(Clock::now() - start);
      poll_until(left, [&] {
        content = read_file(folder_ / (prefix + std::to_string(r)));
        return content.has_value();
      });
      if (!content) {
        missing += " " + std::to_string(r);
        continue;
      }
      const std::size_t end = content->find('\n');
      if (content->substr(0, end) != key)
        throw Error(ErrorCode::kUsage, "rank " + std::to_string(r) + " is at '" + content->substr(0, end) + "', rank " +
                                           std::to_string(rank_) + " at '" + key + "'");
      all.push_back(content->substr(end + 1));
    }
    if (!missing.empty())
      throw Error(ErrorCode::kDeadline, "ranks did not come to '" + key + "':" + missing,
                  {.rank = rank_, .waited_ms = deadline_.count()});
    hold_(key);
    return all;
  }

 private:
  std::filesystem::path folder_;
  Rank rank_;
  Rank world_size_;
  Milliseconds deadline_;
  std::function<void(const std::string&)> hold_;
  int count_ = 0;
};

}  // namespace sidp::test
