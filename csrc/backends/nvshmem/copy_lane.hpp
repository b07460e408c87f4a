// A lane on copy engines: streams on which waits for empty slots, copies and what says that a slot is full are queued.
// No kernel runs for it, except inside NVSHMEM's own gets. Copies are made by the owner's copy engine where this
// process can have a stream on that GPU, else by the own one. They run one at a time, whoever makes them, in the order
// of the program. Flags are waited for and set by streams of the own GPU, so that an owner's engine only waits and
// copies.
//
// Lane and consumer order each other by events in a step whose calls are made one by one: an event costs the host a
// sixth of a stream memory operation (0.15 us of 0.85 on an H200). Graphs wait for flags, by stream memory operations
// (CUDA driver API, "Stream Memory Operations"), because a launch would take an event as it is then, and copies in
// mid-step are queued later. A copy for the next step, which may be either, sets both; so a flag is full only in slots
// whose layer was copied ahead of its step or for a graph.
//
// A copy is queued when the release of its slot has been queued, by the thread that queued the release. So whatever a
// stream waits for is queued already, as with events. A stream that waited for work that a thread still has to queue
// would hang the process as soon as the engine makes a call that holds the context until its streams are idle: loading
// a module at a kernel's first launch, cudaDeviceSynchronize, cudaFree.
#pragma once

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "device.hpp"
#include "link_gate.hpp"
#include "nvshmem_api.hpp"
#include "owner_engine.hpp"

namespace sidp::nvshmem {

// The part of the ring into which a program gets, as NVSHMEM must know it; nothing for a program without gets.
class Landing {
 public:
  // Throws Error(kDevice).
  Landing(const Device& device, const NvshmemApi& nvshmem, const std::vector<LaneOp>& program);
  ~Landing() { unregister(); }  // no get may be under way, or abandon() comes first
  Landing(const Landing&) = delete;
  Landing& operator=(const Landing&) = delete;
  void unregister() noexcept;
  void abandon() noexcept { begin_ = nullptr; }  // stays registered

 private:
  const Device& device_;
  const NvshmemApi& nvshmem_;
  std::byte* begin_ = nullptr;
};

class CopyLane final : public Lane {
 public:
  // flags: the own words on the device, one each `flag_stride` bytes. All slots are empty, and their copies are queued.
  // gpus: of all ranks, by their ordinals in this process; -1: not visible. queue: for the owners' links, if they are
  // exclusive. kept: see HostWords.
  CopyLane(const std::shared_ptr<const Device>& device, const NvshmemApi& nvshmem, CUdeviceptr flags,
           ByteCount flag_stride, const std::vector<int>& gpus, std::vector<LaneOp> program, const LaneOptions& options,
           std::optional<LinkQueue> queue, Tracer& tracer, std::shared_ptr<const bool> kept);
  ~CopyLane() override;

  // Once the copies that are queued have arrived, or given up at the deadline of the options: what copies under way may
  // still write then stays registered and allocated for the life of the process.
  bool stop() noexcept override;
  bool wait_full(Stream stream, std::uint32_t flag) override;
  bool set_empty(Stream stream, std::uint32_t flag) override;
  void used_by_graph(std::uint32_t flag) override;
  [[nodiscard]] LaneStats stats() const override;

 private:
  // What a copy leaves on its stream. Events belong to the GPU of their stream.
  struct Marks {
    explicit Marks(const Device& device)
        : started(device, DeviceEvent::Kind::kOrder), full(device, DeviceEvent::Kind::kOrder) {}
    DeviceEvent started, full;
  };
  struct Slot {
    explicit Slot(const Device& device)
        : used(device, DeviceEvent::Kind::kOrder),
          flag_set(device, DeviceEvent::Kind::kOrder),
          entered(device, DeviceEvent::Kind::kOrder),
          timed(device, DeviceEvent::Kind::kOrder) {}
    std::map<const Device*, Marks> marks;  // by where its copies run
    std::atomic<CUevent> full = nullptr;   // of its copy
    DeviceEvent used;                      // its release was seen: after its last use, or when the flag was waited for
    DeviceEvent flag_set;                  // to full, for the copy that did so last
    DeviceEvent entered;                   // its owner's link is this copy's
    DeviceEvent timed;                     // its copy ended, as the trace has it
    bool empty = true;                     // its release is queued, and no copy has taken the slot since
    bool copied = false;                   // a copy is queued, with its event
    bool used_by_event = false;            // the release was an event, not the flag
    bool flagged = false;                  // the copy sets the flag too
    std::uint64_t pass = 0;                // of its copy
    // Of its copy: as many had been queued with it; 0 while one is being queued. stats() reads it from any thread.
    std::atomic<std::uint32_t> number{0};
  };
  static constexpr std::uint64_t kNoPass = ~std::uint64_t{0};

  // Queues the copies whose slots are empty. `by_event`: the pass whose copies nobody waits for by the flag.
  void queue_next(std::uint64_t by_event);
  // One copy, from the wait for its empty slot to the signal that it is full.
  void queue(const LaneOp& copy, CUdeviceptr flag, Slot& slot, Tracer::Session session);
  void start(CUstream on, Slot& slot);  // once the slot is empty and the copy before has ended
  void enter_link(CUstream on, CUstream signals, Slot& slot);
  void leave_link(CUstream on, CUstream signals, CUevent full);
  void move(CUstream on, const LaneOp& copy);
  void signal(CUstream on, CUdeviceptr flag);
  void ask_owners(const std::vector<int>& gpus);
  [[nodiscard]] bool idle() const;
  void record(CUevent event, CUstream stream) const;
  void wait_for(CUevent event, CUstream stream) const;
  [[nodiscard]] CUdeviceptr flag(std::uint32_t index) const { return flags_ + index * flag_stride_; }

  const Device& device_;
  const NvshmemApi& nvshmem_;
  CUdeviceptr flags_;
  ByteCount flag_stride_;
  std::vector<LaneOp> program_;
  LaneOptions options_;
  Tracer& tracer_;
  std::vector<LaneOp> copies_;  // of one pass of the program, in order
  std::deque<Slot> slots_;      // by flag
  std::size_t next_ = 0;        // position of the next wait in the program
  std::uint64_t pass_ = 0;      // of the program, that next_ is in
  std::uint32_t queued_ = 0;    // copies, low 32 bits
  bool stopped_ = false;
  bool abandoned_ = false;  // stopped with copies under way
  Landing landing_;
  HostWords arrived_;                                  // word 0: as arrived_total_, of copies that set their flag
  DeviceStream stream_;                                // of waits for flags, and of copies by the own engine
  std::vector<std::unique_ptr<OwnerEngine>> engines_;  // by rank, or null
  std::string why_read_;
  std::optional<DeviceStream> signals_;  // with owners' engines: what sets all flags, and times copies for a trace
  std::optional<LinkGate> gate_;
  CUstream last_on_ = nullptr;  // of the copy that was queued last:
  CUevent last_full_ = nullptr;
  std::vector<ByteCount> pass_bytes_by_peer_;
  mutable std::mutex mutex_;
  mutable std::uint64_t arrived_total_ = 0;  // copies that have arrived, as far as was looked; under mutex_
};

}  // namespace sidp::nvshmem
