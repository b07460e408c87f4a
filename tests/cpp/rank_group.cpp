#include "rank_group.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <random>
#include <sstream>

#include "backends/host/host_backend.hpp"
#include "file_bootstrap.hpp"

extern char** environ;

namespace sidp::test {

namespace {

constexpr Milliseconds kChildDeadline{40000};  // of any single thing that a child shall do

std::string random_token() {
  std::random_device device;
  std::ostringstream token;
  for (int i = 0; i < 4; ++i) token << std::hex << (device() | 0x10000000u);
  return token.str();
}

std::size_t index(Rank rank) { return static_cast<std::size_t>(rank); }

}  // namespace

std::int64_t number(const RankResult& result, const std::string& key) {
  const auto found = result.find(key);
  return found == result.end() ? -1 : std::stoll(found->second);
}

RankGroup::RankGroup(Rank world_size, std::vector<std::string> settings)
    : world_size_(world_size),
      settings_(std::move(settings)),
      token_(random_token()),
      pids_(index(world_size), 0),
      status_(index(world_size), 0) {
  folder_ = std::filesystem::temp_directory_path() / ("sidp-test-" + token_);
  std::filesystem::create_directory(folder_);
}

RankGroup::~RankGroup() {
  for (Rank rank = 0; rank < world_size_; ++rank)
    if (pids_[index(rank)] != 0) {
      signal(rank, SIGCONT);
      signal(rank, SIGKILL);
    }
  host::unlink_segments(token_, world_size_);
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

std::string RankGroup::file(const std::string& name, Rank rank) const {
  return (folder_ / (name + "-" + std::to_string(rank))).string();
}

void RankGroup::start_all() {
  for (Rank rank = 0; rank < world_size_; ++rank) start(rank);
}

void RankGroup::start(Rank rank, const std::vector<std::string>& more) {
  std::vector<std::string> arguments{SIDP_RANK_PROCESS, folder_.string(), std::to_string(rank),
                                     std::to_string(world_size_), token_};
  arguments.insert(arguments.end(), settings_.begin(), settings_.end());
  arguments.insert(arguments.end(), more.begin(), more.end());
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, file("log", rank).c_str(), O_WRONLY | O_CREAT | O_TRUNC,
                                     0600);
  ::posix_spawn_file_actions_adddup2(&actions, STDERR_FILENO, STDOUT_FILENO);
  const int error = ::posix_spawn(&pids_[index(rank)], argv[0], &actions, nullptr, argv.data(), environ);
  ::posix_spawn_file_actions_destroy(&actions);
  if (error != 0) pids_[index(rank)] = 0;
  ASSERT_EQ(error, 0) << "cannot start " << argv[0];
}

void RankGroup::signal(Rank rank, int number) {
  if (pids_[index(rank)] == 0) return;
  ::kill(pids_[index(rank)], number);
  if (number != SIGKILL) return;
  int status = 0;
  ::waitpid(pids_[index(rank)], &status, 0);
  pids_[index(rank)] = 0;
  status_[index(rank)] = WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

void RankGroup::wait_for_mark(Rank rank, const std::string& mark) {
  const bool seen = poll_until(kChildDeadline, [&] { return std::filesystem::exists(file(mark, rank)); });
  ASSERT_TRUE(seen) << "rank " << rank << " did not come to '" << mark << "'; its log:\n" << log(rank);
}

void RankGroup::set_mark(const std::string& name) { write_file(folder_ / name, ""); }

int RankGroup::wait(Rank rank) {
  pid_t& pid = pids_[index(rank)];
  if (pid == 0) return status_[index(rank)];
  int status = 0;
  if (!poll_until(kChildDeadline, [&] { return ::waitpid(pid, &status, WNOHANG) == pid; })) {
    ADD_FAILURE() << "rank " << rank << " did not end; killed. Its log:\n" << log(rank);
    signal(rank, SIGCONT);
    signal(rank, SIGKILL);
    return status_[index(rank)];
  }
  pid = 0;
  return status_[index(rank)] = WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

RankResult RankGroup::result(Rank rank) const {
  RankResult result;
  std::istringstream lines(read_file(file("result", rank)).value_or(""));
  for (std::string line; std::getline(lines, line);) {
    const std::size_t space = line.find(' ');
    result[line.substr(0, space)] = line.substr(std::min(space + 1, line.size()));
  }
  return result;
}

std::string RankGroup::log(Rank rank) const { return read_file(file("log", rank)).value_or("(no log)"); }

std::vector<std::string> RankGroup::names_left() const {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm"))
    if (entry.path().filename().string().starts_with("sidp-" + token_)) names.push_back(entry.path().filename());
  return names;
}

}  // namespace sidp::test
