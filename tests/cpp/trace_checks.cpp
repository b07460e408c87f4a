#include "trace_checks.hpp"

#include <algorithm>
#include <map>
#include <set>
#include <thread>

namespace sidp::test {

namespace {

using Kind = TraceEvent::Kind;

void require(bool holds, const std::string& what) {
  if (!holds) throw Mismatch("trace: " + what);
}

std::vector<TraceEvent> of(const Trace& trace, Kind kind) {
  std::vector<TraceEvent> events;
  std::copy_if(trace.events.begin(), trace.events.end(), std::back_inserter(events),
               [&](const TraceEvent& event) { return event.kind == kind; });
  std::sort(events.begin(), events.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
  return events;
}

void check_nesting(const Trace& trace) {
  std::map<std::pair<TraceEvent::Track, bool>, std::vector<TraceEvent>> tracks;
  for (const TraceEvent& event : trace.events)
    if (event.kind != Kind::kUse) tracks[{event.track, event.on_stream}].push_back(event);
  for (auto& [track, events] : tracks) {
    std::sort(events.begin(), events.end(), [](const TraceEvent& a, const TraceEvent& b) {
      return a.begin != b.begin ? a.begin < b.begin : a.end > b.end;
    });
    std::vector<TraceEvent> open;
    for (const TraceEvent& event : events) {
      require(event.begin <= event.end, "an event ends before it begins");
      while (!open.empty() && open.back().end <= event.begin) open.pop_back();
      require(open.empty() || event.end <= open.back().end,
              std::string(to_string(event.kind)) + " of layer " + std::to_string(event.layer) + " ends after the " +
                  std::string(to_string(open.empty() ? event.kind : open.back().kind)) + " that it began in");
      if (event.kind != Kind::kStep && track.first == TraceEvent::Track::kEngine && event.kind != Kind::kQueueCopy)
        require(!open.empty() && open.front().kind == Kind::kStep,
                std::string(to_string(event.kind)) + " lies in no step");
      open.push_back(event);
    }
  }
}

// Each layer is copied once for each time that it is waited for, and has arrived when the wait ends.
void check_copies(const Trace& trace, const std::vector<LayerIndex>& ringed) {
  std::map<LayerIndex, std::vector<TraceEvent>> copies, waits;
  for (const TraceEvent& event : of(trace, Kind::kCopy)) copies[event.layer].push_back(event);
  for (const TraceEvent& event : of(trace, Kind::kWaitFull)) waits[event.layer].push_back(event);
  for (const auto& [layer, consumed] : waits) {
    const std::size_t early = std::find(ringed.begin(), ringed.end(), layer) != ringed.end() ? 1 : 0;
    const auto& arrived = copies[layer];
    require(arrived.size() >= consumed.size() - early, "layer " + std::to_string(layer) + " was not copied");
    for (std::size_t i = early; i < consumed.size(); ++i)
      require(arrived[i - early].end <= consumed[i].end,
              "a wait for layer " + std::to_string(layer) + " ends before its copy");
  }
}

}  // namespace

RuntimeStats settled_stats(const Runtime& runtime) {
  const Placement& placement = runtime.pool().placement();
  const Rank rank = runtime.pool().backend().rank();
  const std::size_t num_streamed = placement.streamed_layers(rank).size();
  const auto num_slots = static_cast<std::size_t>(placement.num_slots(rank));
  const auto start = Clock::now();
  while (true) {
    RuntimeStats stats = runtime.stats();
    const std::uint64_t due = stats.prefetcher.fetches + std::min(num_slots, num_streamed);
    if (num_streamed == 0 || stats.prefetcher.lane.copies == due) return stats;
    if (Clock::now() - start > Milliseconds(20000))
      throw Mismatch("the lane made " + std::to_string(stats.prefetcher.lane.copies) + " copies, not " +
                     std::to_string(due));
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

void check_trace(const Trace& trace, const RuntimeStats& before, const RuntimeStats& after,
                 const std::vector<LayerIndex>& ringed) {
  require(trace.dropped == 0 && trace.unfinished == 0,
          std::to_string(trace.dropped) + " dropped, " + std::to_string(trace.unfinished) + " unfinished");
  check_nesting(trace);
  check_copies(trace, ringed);
  const auto equal = [](const std::string& what, std::uint64_t seen, std::uint64_t expected) {
    require(seen == expected, std::to_string(seen) + " " + what + ", stats say " + std::to_string(expected));
  };
  const bool on_stream =
      std::any_of(trace.events.begin(), trace.events.end(), [](const auto& e) { return e.on_stream; });
  const auto count = [&](Kind kind, bool streams) {
    const auto events = of(trace, kind);
    return static_cast<std::uint64_t>(
        std::count_if(events.begin(), events.end(), [&](const TraceEvent& e) { return e.on_stream == streams; }));
  };
  std::vector<ByteCount> bytes(after.prefetcher.lane.bytes_by_peer.size());
  for (const TraceEvent& event : of(trace, Kind::kCopy)) bytes[static_cast<std::size_t>(event.peer)] += event.bytes;
  std::uint64_t requests = 0, served = 0, rows = 0;
  for (std::size_t peer = 0; peer < bytes.size(); ++peer) {
    equal("bytes of rank " + std::to_string(peer), bytes[peer],
          after.prefetcher.lane.bytes_by_peer[peer] - before.prefetcher.lane.bytes_by_peer[peer]);
    requests += after.requester.requests_by_peer[peer] - before.requester.requests_by_peer[peer];
    served += after.service.served_by_peer[peer] - before.service.served_by_peer[peer];
  }
  for (const TraceEvent& event : of(trace, Kind::kRequest))
    rows += event.on_stream ? 0 : static_cast<std::uint64_t>(event.rows);
  std::uint64_t steps = after.steps_broken_off - before.steps_broken_off;
  for (std::size_t mode = 0; mode < 2; ++mode) steps += after.steps[mode] - before.steps[mode];
  for (const bool streams : {false, true}) {
    if (streams && !on_stream) continue;
    equal("steps", count(Kind::kStep, streams), steps);
    equal("requests", count(Kind::kRequest, streams), requests);
    equal("services", count(Kind::kService, streams), served);
  }
  equal("rows", rows, after.requester.rows_sent - before.requester.rows_sent);
  equal("copies", count(Kind::kCopy, on_stream), after.prefetcher.lane.copies - before.prefetcher.lane.copies);
  equal("waits", count(Kind::kWaitFull, on_stream), after.prefetcher.fetches - before.prefetcher.fetches);
  std::uint64_t broken_off = 0;
  for (const TraceEvent& event : of(trace, Kind::kStep)) broken_off += event.broken_off && !event.on_stream ? 1 : 0;
  equal("steps broken off", broken_off, after.steps_broken_off - before.steps_broken_off);
}

std::string copies_in(const Trace& trace) {
  std::string copies;
  for (const TraceEvent& event : of(trace, Kind::kCopy))
    copies += std::to_string(event.peer) + ' ' + std::to_string(event.begin) + ' ' + std::to_string(event.end) + ' ';
  return copies;
}

}  // namespace sidp::test
