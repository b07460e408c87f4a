#include "collective.hpp"

#include <exception>
#include <sstream>

#include "sidp/error.hpp"

namespace sidp {

namespace {

std::string first_difference(const std::string& mine, const std::string& theirs) {
  std::istringstream a(mine), b(theirs);
  std::string line_a, line_b;
  for (int number = 1;; ++number) {
    const bool more_a = static_cast<bool>(std::getline(a, line_a));
    const bool more_b = static_cast<bool>(std::getline(b, line_b));
    if (!more_a) line_a = "(nothing)";
    if (!more_b) line_b = "(nothing)";
    if (line_a != line_b || (!more_a && !more_b))
      return "line " + std::to_string(number) + ": '" + line_a + "' here, '" + line_b + "' there";
  }
}

}  // namespace

void check_same_on_all_ranks(Bootstrap& bootstrap, Rank rank, const std::string& what, const std::string& text) {
  const auto all = bootstrap.all_gather(what, text);
  for (std::size_t r = 1; r < all.size(); ++r) {
    if (all[r] == all[0]) continue;
    // A rank that agrees with rank 0 names the one that does not.
    const std::size_t other = text == all[0] ? r : 0;
    throw Error(ErrorCode::kManifestMismatch,
                "rank " + std::to_string(rank) + " and rank " + std::to_string(other) + " disagree about the " + what +
                    ", " + first_difference(text, all[other]) +
                    "; start every rank with the same model, settings and version",
                {.rank = rank, .peer = static_cast<std::int64_t>(other)});
  }
}

void all_or_none(Bootstrap& bootstrap, Rank rank, const std::string& key, const std::function<void()>& attempt) {
  std::exception_ptr mine;
  std::string verdict;
  try {
    attempt();
  } catch (const Error& error) {
    mine = std::current_exception();
    verdict = static_cast<char>('A' + static_cast<int>(error.code())) + std::string(error.what());
  }
  const auto all = bootstrap.all_gather(key, verdict);
  if (mine) std::rethrow_exception(mine);
  for (std::size_t r = 0; r < all.size(); ++r)
    if (!all[r].empty())
      throw Error(static_cast<ErrorCode>(all[r][0] - 'A'), "rank " + std::to_string(r) + ": " + all[r].substr(1),
                  {.rank = rank, .peer = static_cast<std::int64_t>(r)});
}

}  // namespace sidp
