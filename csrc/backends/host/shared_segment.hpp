// POSIX shared memory. Names derive from the group's secret token, so any member can remove what a dead one left.
#pragma once

#include <memory>
#include <string>

#include "sidp/backend.hpp"

namespace sidp::host {

class SharedSegment {
 public:
  // "/sidp-<token>-<rank>-<label>"; the token must be unguessable (128 random bits).
  static std::string name(const std::string& token, Rank rank, const std::string& label);
  // Creates (mode 0600, must not exist), reserves every page and maps. Throws Error(kCapacity) before taking more than
  // there is, Error(kConfig) if the name exists.
  static std::unique_ptr<SharedSegment> create(const std::string& name, ByteCount bytes);
  static std::unique_ptr<SharedSegment> attach(const std::string& name, ByteCount bytes, bool writable);
  static void unlink(const std::string& name) noexcept;  // nothing to do if it is gone

  ~SharedSegment();
  SharedSegment(const SharedSegment&) = delete;
  SharedSegment& operator=(const SharedSegment&) = delete;

  [[nodiscard]] std::byte* data() const { return data_; }
  [[nodiscard]] ByteCount bytes() const { return bytes_; }

  // Marks this process as the living owner until release_life() or its end, however it comes.
  void hold_life();
  void release_life() noexcept;
  // Whether another process holds it.
  [[nodiscard]] bool life_held() const;

 private:
  SharedSegment(int fd, std::byte* data, ByteCount bytes) : fd_(fd), data_(data), bytes_(bytes) {}
  int fd_;
  std::byte* data_;
  ByteCount bytes_;
};

// Memory of this process alone, shown as "/memfd:sidp-<label>" in its memory maps. Throws Error(kCapacity) if the
// machine has less than `bytes` available.
std::unique_ptr<LocalBuffer> allocate_unnamed(ByteCount bytes, const std::string& label);

}  // namespace sidp::host
