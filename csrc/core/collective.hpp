// Set-up steps in which all ranks succeed or all throw.
#pragma once

#include <functional>
#include <string>

#include "sidp/bootstrap.hpp"
#include "sidp/types.hpp"

namespace sidp {

// Collective: throws Error(kManifestMismatch) on every rank unless `text` is the same on all. `what` names the text.
void check_same_on_all_ranks(Bootstrap& bootstrap, Rank rank, const std::string& what, const std::string& text);

// Collective: runs `attempt` here; if it threw Error on any rank, every rank throws: its own error, or one of the same
// code with the first failing rank's words.
void all_or_none(Bootstrap& bootstrap, Rank rank, const std::string& key, const std::function<void()>& attempt);

}  // namespace sidp
