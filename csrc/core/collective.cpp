#include "collective.hpp"

#include <algorithm>
#include <exception>
#include <string_view>

#include "sidp/error.hpp"

namespace sidp {

namespace {

// The next line of a text, which loses it; "(nothing)" at its end.
std::string_view take_line(std::string_view& text) {
  if (text.empty()) return "(nothing)";
  const std::string_view line = text.substr(0, text.find('\n'));
  text.remove_prefix(std::min(line.size() + 1, text.size()));
  return line;
}

std::string first_difference(std::string_view mine, std::string_view theirs) {
  for (int number = 1;; ++number) {
    const bool over = mine.empty() && theirs.empty();
    const std::string here(take_line(mine)), there(take_line(theirs));
    if (here != there || over) return "line " + std::to_string(number) + ": '" + here + "' here, '" + there + "' there";
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
  } catch (const std::exception& error) {  // the others must not wait for a rank that ran out of memory, say
    mine = std::current_exception();
    verdict = static_cast<char>('A' + static_cast<int>(ErrorCode::kCapacity)) + std::string(error.what());
  }
  const auto all = bootstrap.all_gather(key, verdict);
  if (mine) std::rethrow_exception(mine);
  for (std::size_t r = 0; r < all.size(); ++r)
    if (!all[r].empty())
      throw Error(static_cast<ErrorCode>(all[r][0] - 'A'), "rank " + std::to_string(r) + ": " + all[r].substr(1),
                  {.rank = rank, .peer = static_cast<std::int64_t>(r)});
}

}  // namespace sidp
