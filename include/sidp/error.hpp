// Typed errors with the numbers of what happened. The control path throws them; waits on the data path of the
// host backend throw them too, a GPU backend reports them from its watchdog.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

namespace sidp {

enum class ErrorCode : std::uint8_t {
  kConfig,            // a setting or argument is out of range
  kUsage,             // a call that the object's state does not allow
  kClosed,            // use after close()
  kUnknownName,       // a layer or op that was never declared
  kShape,             // rows, bytes or dtype do not fit what was declared
  kManifestMismatch,  // ranks disagree about what the pool holds
  kCapacity,          // something does not fit in memory
  kDeadline,          // a wait outlived its deadline
  kPeerDead,          // a rank of the group died
  kUnsupported,       // the backend lacks the capability
  kRemoteOp,          // the owner's op failed
  kDevice,            // a call of the GPU's driver failed
};

// Name of the Python class that mirrors the code, e.g. "DeadlineError".
const char* to_string(ErrorCode code);

// Numbers of an error; empty where they do not apply.
struct ErrorContext {
  std::optional<std::int64_t> rank{};       // who reports
  std::optional<std::int64_t> peer{};       // whom it concerns
  std::optional<std::int64_t> layer{};      // pool index
  std::optional<std::int64_t> num_bytes{};  // bytes asked for
  std::optional<std::int64_t> waited_ms{};
  std::optional<std::int64_t> expected{};  // flag value or count
  std::optional<std::int64_t> seen{};
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message, ErrorContext context = {})
      : std::runtime_error(message), code_(code), context_(context) {}
  [[nodiscard]] ErrorCode code() const noexcept { return code_; }
  [[nodiscard]] const ErrorContext& context() const noexcept { return context_; }

 private:
  ErrorCode code_;
  ErrorContext context_;
};

}  // namespace sidp
