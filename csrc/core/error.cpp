#include "sidp/error.hpp"

namespace sidp {

const char* to_string(ErrorCode code) {
  switch (code) {  // no default: the compiler names a missing case
    case ErrorCode::kConfig:
      return "ConfigError";
    case ErrorCode::kUsage:
      return "UsageError";
    case ErrorCode::kClosed:
      return "ClosedError";
    case ErrorCode::kUnknownName:
      return "UnknownNameError";
    case ErrorCode::kShape:
      return "ShapeError";
    case ErrorCode::kManifestMismatch:
      return "ManifestMismatchError";
    case ErrorCode::kCapacity:
      return "CapacityError";
    case ErrorCode::kDeadline:
      return "DeadlineError";
    case ErrorCode::kPeerDead:
      return "PeerDeadError";
    case ErrorCode::kUnsupported:
      return "UnsupportedError";
    case ErrorCode::kRemoteOp:
      return "RemoteOpError";
    case ErrorCode::kDevice:
      return "DeviceError";
  }
  return "SidpError";
}

}  // namespace sidp
