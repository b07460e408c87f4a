#include "shared_segment.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <limits>

#include "sidp/error.hpp"

namespace sidp::host {

namespace {

std::string last_error() { return std::strerror(errno); }

// MemAvailable of this machine, or no limit if it cannot be read.
ByteCount available_bytes() {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> meminfo(std::fopen("/proc/meminfo", "re"), std::fclose);
  char line[256];
  unsigned long long kib = 0;
  while (meminfo && std::fgets(line, sizeof line, meminfo.get()) != nullptr)
    if (std::sscanf(line, "MemAvailable: %llu", &kib) == 1) return ByteCount{kib} * 1024;
  return std::numeric_limits<ByteCount>::max();
}

[[noreturn]] void does_not_fit(const std::string& what, ByteCount bytes, ByteCount available, const char* where) {
  throw Error(ErrorCode::kCapacity,
              what + " needs " + std::to_string(bytes) + " bytes, " + where + " has " + std::to_string(available) +
                  " left; use more replicas, fewer ring slots or resident layers, or a larger machine",
              {.num_bytes = static_cast<std::int64_t>(bytes), .seen = static_cast<std::int64_t>(available)});
}

std::byte* map(int fd, ByteCount bytes, int protection) {
  void* data = ::mmap(nullptr, bytes, protection, MAP_SHARED, fd, 0);
  return data == MAP_FAILED ? nullptr : static_cast<std::byte*>(data);
}

class UnnamedBuffer final : public LocalBuffer {
 public:
  UnnamedBuffer(std::byte* data, ByteCount bytes) : data_(data), bytes_(bytes) {}
  ~UnnamedBuffer() override { ::munmap(data_, bytes_); }
  UnnamedBuffer(const UnnamedBuffer&) = delete;
  UnnamedBuffer& operator=(const UnnamedBuffer&) = delete;
  [[nodiscard]] std::byte* data() const override { return data_; }
  [[nodiscard]] ByteCount bytes() const override { return bytes_; }

 private:
  std::byte* data_;
  ByteCount bytes_;
};

}  // namespace

std::string SharedSegment::name(const std::string& token, Rank rank, const std::string& label) {
  return "/sidp-" + token + "-" + std::to_string(rank) + "-" + label;
}

std::unique_ptr<SharedSegment> SharedSegment::create(const std::string& name, ByteCount bytes) {
  const int fd = ::shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, S_IRUSR | S_IWUSR);
  if (fd < 0)
    throw Error(ErrorCode::kConfig, "cannot create shared memory " + name + ": " + last_error() +
                                        (errno == EEXIST ? "; two processes have the same rank" : ""));
  const auto give_up = [&] {
    ::close(fd);
    unlink(name);
  };
  struct statvfs space{};
  ByteCount available = available_bytes();
  if (::fstatvfs(fd, &space) == 0) available = std::min<ByteCount>(available, space.f_bavail * space.f_frsize);
  if (bytes > available) {
    give_up();
    does_not_fit("shared memory " + name, bytes, available, "/dev/shm");
  }
  // Reserve every page now: a full /dev/shm later would be a SIGBUS in the middle of a step.
  if (const int error = ::posix_fallocate(fd, 0, static_cast<off_t>(bytes)); error != 0) {
    give_up();
    does_not_fit("shared memory " + name, bytes, available, "/dev/shm");
  }
  std::byte* data = map(fd, bytes, PROT_READ | PROT_WRITE);
  if (data == nullptr) {
    give_up();
    does_not_fit("mapping of shared memory " + name, bytes, available, "the address space");
  }
  return std::unique_ptr<SharedSegment>(new SharedSegment(fd, data, bytes));
}

std::unique_ptr<SharedSegment> SharedSegment::attach(const std::string& name, ByteCount bytes, bool writable) {
  const int fd = ::shm_open(name.c_str(), (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC, 0);
  if (fd < 0) throw Error(ErrorCode::kPeerDead, "cannot open shared memory " + name + " of a peer: " + last_error());
  struct stat status{};
  if (::fstat(fd, &status) != 0 || static_cast<ByteCount>(status.st_size) != bytes) {
    ::close(fd);
    throw Error(
        ErrorCode::kManifestMismatch,
        "shared memory " + name + " has " + std::to_string(status.st_size) + " bytes, not " + std::to_string(bytes),
        {.num_bytes = status.st_size, .expected = static_cast<std::int64_t>(bytes)});
  }
  std::byte* data = map(fd, bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ);
  if (data == nullptr) {
    ::close(fd);
    does_not_fit("mapping of shared memory " + name, bytes, 0, "the address space");
  }
  return std::unique_ptr<SharedSegment>(new SharedSegment(fd, data, bytes));
}

void SharedSegment::unlink(const std::string& name) noexcept { ::shm_unlink(name.c_str()); }

SharedSegment::~SharedSegment() {
  ::munmap(data_, bytes_);
  ::close(fd_);
}

// A POSIX record lock belongs to the process, is not inherited by fork, and the kernel drops it when the process ends:
// no heartbeat, no stale pid. It is also dropped when the process closes any descriptor of the segment, so a rank never
// attaches its own.
void SharedSegment::hold_life() {
  struct flock lock{};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_len = 1;
  if (::fcntl(fd_, F_SETLK, &lock) != 0)
    throw Error(ErrorCode::kUnsupported, "cannot lock a shared memory segment: " + last_error());
}

void SharedSegment::release_life() noexcept {
  struct flock lock{};
  lock.l_type = F_UNLCK;
  lock.l_whence = SEEK_SET;
  lock.l_len = 1;
  ::fcntl(fd_, F_SETLK, &lock);
}

bool SharedSegment::life_held() const {
  struct flock lock{};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_len = 1;
  return ::fcntl(fd_, F_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

// A memfd rather than anonymous memory: its pages are reserved now instead of faulting (or failing) in a step, and the
// mapping carries a name that memory reports can find. It has no name in any file system.
std::unique_ptr<LocalBuffer> allocate_unnamed(ByteCount bytes, const std::string& label) {
  const ByteCount available = available_bytes();
  if (bytes > available) does_not_fit("the " + label, bytes, available, "this machine");
  const int fd = ::memfd_create(("sidp-" + label).c_str(), MFD_CLOEXEC);
  if (fd < 0) throw Error(ErrorCode::kUnsupported, "cannot create memory for the " + label + ": " + last_error());
  std::byte* data =
      ::posix_fallocate(fd, 0, static_cast<off_t>(bytes)) == 0 ? map(fd, bytes, PROT_READ | PROT_WRITE) : nullptr;
  ::close(fd);
  if (data == nullptr) does_not_fit("the " + label, bytes, available, "this machine");
  return std::make_unique<UnnamedBuffer>(data, bytes);
}

}  // namespace sidp::host
