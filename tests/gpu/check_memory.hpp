// Memory that kernels_check.cpp fills and compares, byte by byte.
#pragma once

#include <algorithm>
#include <vector>

#include "host_memory.hpp"

namespace sidp::nvshmem {

using Bytes = std::vector<std::byte>;

constexpr std::byte kUntouched{0xA5};

class CheckMemory {
 protected:
  void copy(CUdeviceptr dst, CUdeviceptr src, ByteCount bytes) const {
    if (bytes == 0) return;
    device_.check(device_.api().cuMemcpyAsync(dst, src, bytes, engine_.get()), "cuMemcpyAsync");
    engine_.synchronize();
  }

  // So many flags of 32 bits.
  [[nodiscard]] std::vector<std::uint32_t> read_flags(CUdeviceptr at, unsigned count) const {
    const HostMemory staging(device_, count * sizeof(std::uint32_t));
    copy(staging.at(0), at, count * sizeof(std::uint32_t));
    const auto* const first = reinterpret_cast<const std::uint32_t*>(staging.data());
    return {first, first + count};
  }
  void write(CUdeviceptr at, const void* content, ByteCount bytes) const {
    const HostMemory staging(device_, bytes);
    std::memcpy(staging.data(), content, bytes);
    copy(at, staging.at(0), bytes);
  }

  // Bytes that differ from their neighbours, and from one call to the next.
  Bytes pattern(ByteCount bytes) {
    Bytes made(bytes);
    std::uint32_t x = ++seed_ * 2654435761U;
    for (std::byte& b : made) b = static_cast<std::byte>((x = x * 1664525U + 1013904223U) >> 24);
    return made;
  }

  // Device memory that ends with the last byte of `content`, so that a tool sees every access behind it.
  struct Filled {
    Filled(const CheckMemory& check, ByteCount offset, const Bytes& content)
        : memory(check.device_, std::max(offset + content.size(), ByteCount{1}), "rows"), at(memory.at(offset)) {
      check.write(at, content.data(), content.size());
    }
    DeviceBuffer memory;
    CUdeviceptr at;
  };

  // As Filled, with 64 bytes on either side that must stay as they were.
  struct Guarded {
    Guarded(const CheckMemory& check, ByteCount offset, ByteCount bytes)
        : owner(check), front(64 + offset), size(bytes), filled(check, 0, Bytes(front + bytes + 64, kUntouched)) {}
    [[nodiscard]] CUdeviceptr at() const { return filled.at + front; }
    void expect(const Bytes& content, const std::string& what) const {
      Bytes expected(front + size + 64, kUntouched);
      std::copy(content.begin(), content.end(), expected.begin() + static_cast<std::ptrdiff_t>(front));
      const HostMemory staging(owner.device_, expected.size());
      owner.copy(staging.at(0), filled.at, expected.size());
      const auto wrong = std::mismatch(expected.begin(), expected.end(), staging.data()).first - expected.begin();
      require(wrong == std::ssize(expected),
              what + ": wrong byte at " + std::to_string(wrong - static_cast<std::ptrdiff_t>(front)));
    }
    const CheckMemory& owner;
    ByteCount front, size;
    Filled filled;
  };

  Device device_{0};
  ContextScope scope_{device_};
  DeviceStream engine_{device_, DeviceStream::Priority::kDefault};

  [[nodiscard]] std::uint32_t seed() const { return seed_; }

 private:
  std::uint32_t seed_ = 0;
};

}  // namespace sidp::nvshmem
