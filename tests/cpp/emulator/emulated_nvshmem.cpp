// A stand-in for libnvshmem_host.so.3 over files that all ranks map. Collectives wait for every rank, for ever, as
// NVSHMEM's do. The heap grows by multiples of 512 MiB of the emulated device's memory and never shrinks.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr std::size_t kGranularity = std::size_t{512} << 20;

struct Piece {
  std::size_t bytes;
  std::vector<char*> by_rank;
};

struct State {
  std::string folder;
  int rank = -1, world_size = 0;
  std::atomic<std::uint64_t>* arrivals = nullptr;  // shared by the ranks
  std::uint64_t meetings = 0;
  int allocations = 0;
  std::map<char*, Piece> pieces;
  std::size_t heap = 0, used = 0;
  std::multiset<std::size_t> freed;
  std::map<char*, std::size_t> registered;  // local memory
  bool fail_registration = false;
  std::atomic<bool> hold_gets = false;
  std::atomic<int> gets = 0;  // under way
};

State& state() {
  static auto* const s = new State;
  return *s;
}

void meet() {
  State& s = state();
  ++*s.arrivals;
  const std::uint64_t all = ++s.meetings * static_cast<std::uint64_t>(s.world_size);
  while (*s.arrivals < all) std::this_thread::sleep_for(std::chrono::microseconds(100));
}

char* map_file(const std::string& path, std::size_t bytes) {
  const int file = ::open(path.c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0 || ::ftruncate(file, static_cast<off_t>(bytes)) != 0) return nullptr;
  void* const memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  ::close(file);
  return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
}

template <typename Function>
Function from_cuda(const char* name) {
  return reinterpret_cast<Function>(::dlsym(::dlopen("libcuda.so.1", RTLD_NOW), name));
}

const std::pair<char* const, Piece>* piece_of(const void* memory) {
  for (const auto& entry : state().pieces)
    if (memory >= entry.first && memory < entry.first + entry.second.bytes) return &entry;
  return nullptr;
}

bool is_registered(char* memory, std::size_t bytes) {
  for (const auto& [begin, size] : state().registered)
    if (memory >= begin && memory + bytes <= begin + size) return true;
  return false;
}

struct Get {
  void* dst;
  const void* src;
  std::size_t bytes;
};

}  // namespace

#define EMULATED extern "C" __attribute__((visibility("default")))

// For tests: a folder that all ranks share.
EMULATED void emulator_start_nvshmem(const char* folder, int rank, int world_size) {
  State& s = state();
  s.folder = folder, s.rank = rank, s.world_size = world_size;
  s.arrivals = reinterpret_cast<std::atomic<std::uint64_t>*>(map_file(s.folder + "/nvshmem", 4096));
}

EMULATED int emulator_num_pieces() { return static_cast<int>(state().pieces.size()); }

EMULATED int emulator_num_registered() { return static_cast<int>(state().registered.size()); }
EMULATED void emulator_fail_registration() { state().fail_registration = true; }
EMULATED void emulator_hold_gets() { state().hold_gets = true; }  // for ever

EMULATED int nvshmem_my_pe() { return state().rank; }
EMULATED int nvshmem_n_pes() { return state().world_size; }

EMULATED void* nvshmem_malloc(std::size_t bytes) {
  State& s = state();
  const std::string name = s.folder + "/heap-" + std::to_string(s.allocations++) + "-";
  if (const auto piece = s.freed.lower_bound(bytes); piece != s.freed.end())
    s.freed.erase(piece);
  else
    s.used += bytes;
  while (s.heap < s.used) {
    s.heap += kGranularity;
    from_cuda<void (*)(std::int64_t)>("emulator_use")(static_cast<std::int64_t>(kGranularity));
  }
  Piece piece{bytes, {}};
  for (int rank = 0; rank < s.world_size; ++rank) piece.by_rank.push_back(map_file(name + std::to_string(rank), bytes));
  for (char* memory : piece.by_rank) from_cuda<void (*)(char*, std::size_t, bool)>("emulator_map")(memory, bytes, true);
  meet();  // all have mapped it
  char* const mine = piece.by_rank[static_cast<std::size_t>(s.rank)];
  std::memset(mine, 0x5A, std::min(bytes, std::size_t{1} << 20));  // it is not zeroed
  s.pieces[mine] = std::move(piece);
  return mine;
}

EMULATED void nvshmem_free(void* memory) {
  State& s = state();
  meet();
  const auto found = s.pieces.find(static_cast<char*>(memory));
  s.freed.insert(found->second.bytes);
  for (char* piece : found->second.by_rank) {
    from_cuda<void (*)(char*, std::size_t, bool)>("emulator_map")(piece, found->second.bytes, false);
    ::munmap(piece, found->second.bytes);
  }
  s.pieces.erase(found);
}

EMULATED void* nvshmem_ptr(const void* memory, int pe) {
  const auto* const found = piece_of(memory);
  if (found == nullptr) return nullptr;
  return found->second.by_rank[static_cast<std::size_t>(pe)] + (static_cast<const char*>(memory) - found->first);
}

EMULATED int nvshmemx_buffer_register(void* memory, std::size_t bytes) {
  auto* const begin = static_cast<char*>(memory);
  if (bytes == 0 || piece_of(memory) != nullptr || state().fail_registration) return 7;
  for (const auto& [other, size] : state().registered)
    if (begin < other + size && other < begin + bytes) return 7;
  state().registered[begin] = bytes;
  return 0;
}

EMULATED int nvshmemx_buffer_unregister(void* memory) {
  if (state().gets != 0) {
    std::fprintf(stderr, "the local buffer of a get is unregistered before it has arrived\n");
    std::abort();
  }
  return state().registered.erase(static_cast<char*>(memory)) == 1 ? 0 : 7;
}

// As for a peer that is not mapped, whom the transports reach: they end the process for memory that they do not know.
EMULATED void nvshmemx_getmem_on_stream(void* dst, const void* src, std::size_t bytes, int pe, void* stream) {
  if (piece_of(dst) == nullptr && !is_registered(static_cast<char*>(dst), bytes)) {
    std::fprintf(stderr, "the local buffer of a get is not registered with NVSHMEM\n");
    std::abort();
  }
  ++state().gets;
  auto* const get = new Get{dst, nvshmem_ptr(src, pe), bytes};
  const auto copy = [](void* data) {
    while (state().hold_gets) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    auto* const g = static_cast<Get*>(data);
    std::memcpy(g->dst, g->src, g->bytes);
    delete g;
    --state().gets;
  };
  from_cuda<int (*)(void*, void (*)(void*), void*)>("cuLaunchHostFunc")(stream, copy, get);
}
