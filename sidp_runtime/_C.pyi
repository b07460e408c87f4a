"""
C++ core of sidp_runtime. Use the Python classes of sidp_runtime instead.
"""

from __future__ import annotations

import collections.abc
import typing

import typing_extensions

__all__: list[str] = [
    "ALIGNMENT",
    "LARGEST_SIMULATED",
    "LINK_GRACE_SHARE",
    "SPIN_ROWS",
    "Backend",
    "ByteView",
    "Decision",
    "MachineProfile",
    "Mode",
    "OneSided",
    "Op",
    "OpKernel",
    "Placement",
    "PolicySimulation",
    "RingEntry",
    "Runtime",
    "StepKind",
    "StepShape",
    "StepTimes",
    "Trace",
    "TraceEvent",
    "WeightPool",
    "add_graph",
    "await_rows",
    "backend_names",
    "check_policy",
    "cuda_report",
    "decide",
    "graph_op",
    "load_torch",
    "make_backend",
    "measure_copies",
    "measure_round_trip_us",
    "next_reader",
    "peer_layer",
    "predict_step",
    "products_s",
    "put_answer",
    "request_slot",
    "service_stream",
    "step_over_stream",
    "torch_kernel",
    "unlink_segments",
]

class RingEntry:
    """
    One copy of a step: a layer, its slot and the layer to be released first.
    """
    @property
    def after_layer(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def layer(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def slot(self) -> int: ...

class Placement:
    """
    Who owns which layer, and where everything lies. Pure: equal on all ranks.
    """
    @staticmethod
    def by_layer(
        layer_bytes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        world_size: typing.SupportsInt | typing.SupportsIndex,
        *,
        ring_slots: typing.SupportsInt | typing.SupportsIndex = 2,
        resident_layers: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] = [],
    ) -> Placement:
        """
        Whole layers in order, each to the rank that holds fewest bytes so far.

        layer_bytes: bytes of each layer, above 0. ring_slots: upper bound of a rank's slots. resident_layers: kept on
        every rank. No rank holds more than total / world_size + the largest layer. Raises ConfigError.
        """
    def is_local(
        self, rank: typing.SupportsInt | typing.SupportsIndex, layer: typing.SupportsInt | typing.SupportsIndex
    ) -> bool: ...
    def is_resident(self, layer: typing.SupportsInt | typing.SupportsIndex) -> bool: ...
    def layer_bytes(self, layer: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def num_slots(self, rank: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def offset(self, layer: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Bytes from the start of the owner's pool.
        """
    def owner(self, layer: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Owner of a layer; -1 for a resident one.
        """
    def pool_bytes(self, rank: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Bytes of the layers that the rank owns.
        """
    def ring_bytes(self, rank: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def ring_plan(self, rank: typing.SupportsInt | typing.SupportsIndex) -> list[RingEntry]: ...
    def slot_bytes(self, rank: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def streamed_layers(self, rank: typing.SupportsInt | typing.SupportsIndex) -> list[int]:
        """
        Layers owned elsewhere, in order of use.
        """
    @property
    def num_layers(self) -> int: ...
    @property
    def resident_bytes(self) -> int:
        """
        Bytes of the resident layers, on each rank.
        """
    @property
    def world_size(self) -> int: ...

class Backend:
    def alive(self, rank: typing.SupportsInt | typing.SupportsIndex) -> bool:
        """
        False once the rank has left or its process has ended.
        """
    @property
    def name(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...

class OpKernel:
    """
    An op's computation, run from C++ without the GIL.
    """

class Op:
    def __init__(
        self,
        *,
        name: str,
        description: str,
        in_row_bytes: typing.SupportsInt | typing.SupportsIndex,
        out_row_bytes: typing.SupportsInt | typing.SupportsIndex,
        kernels: collections.abc.Sequence[OpKernel | None],
    ) -> None:
        """
        kernels: one for each layer of the pool, None where a layer lacks the op.
        """
    @property
    def name(self) -> str: ...

class Mode:
    """
    How the streamed layers of one step are used.

    Members:

      WAS : layers are copied into the ring ahead of use

      CAS : activations are sent to the owner of the layer
    """

    CAS: typing.ClassVar[Mode]
    WAS: typing.ClassVar[Mode]
    __members__: typing.ClassVar[dict[str, Mode]]
    @typing.overload
    def __eq__(self, other: Mode) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: Mode) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class MachineProfile:
    def __init__(
        self,
        *,
        copy_bytes_per_s: typing.SupportsFloat | typing.SupportsIndex,
        round_trip_us: typing.SupportsFloat | typing.SupportsIndex,
        memory_bytes_per_s: typing.SupportsFloat | typing.SupportsIndex,
        flops_per_s: typing.SupportsFloat | typing.SupportsIndex,
        copy_latency_us: typing.SupportsFloat | typing.SupportsIndex = 0.0,
        request_bytes_per_s: typing.SupportsFloat | typing.SupportsIndex = 0.0,
        products: collections.abc.Sequence[
            tuple[typing.SupportsFloat | typing.SupportsIndex, typing.SupportsFloat | typing.SupportsIndex]
        ] = [],
    ) -> None: ...

class StepShape:
    def __init__(
        self,
        *,
        total_bytes: typing.SupportsInt | typing.SupportsIndex,
        streamed_bytes: typing.SupportsInt | typing.SupportsIndex,
        resident_bytes: typing.SupportsInt | typing.SupportsIndex = 0,
        streamed_layers: typing.SupportsInt | typing.SupportsIndex,
        ops_per_layer: typing.SupportsInt | typing.SupportsIndex = 0,
        row_bytes: typing.SupportsInt | typing.SupportsIndex = 0,
        element_bytes: typing.SupportsInt | typing.SupportsIndex = 4,
        world_size: typing.SupportsInt | typing.SupportsIndex = 2,
    ) -> None: ...

class StepTimes:
    @property
    def cas_s(self) -> float: ...
    @property
    def copy_s(self) -> float: ...
    @property
    def local_s(self) -> float: ...
    @property
    def was_floor_s(self) -> float: ...
    @property
    def was_s(self) -> float: ...
    @property
    def work_s(self) -> float: ...

class Decision:
    @property
    def cas_ms(self) -> float: ...
    @property
    def explanation(self) -> str: ...
    @property
    def margin(self) -> float: ...
    @property
    def mode(self) -> Mode: ...
    @property
    def reason(self) -> str: ...
    @property
    def was_ms(self) -> float: ...

class PolicySimulation:
    """
    The policy and its history without a runtime: for tests.
    """
    def __init__(
        self,
        *,
        shape: StepShape,
        profile: MachineProfile,
        max_rows: typing.SupportsInt | typing.SupportsIndex,
        hysteresis: typing.SupportsFloat | typing.SupportsIndex = 0.1,
    ) -> None: ...
    def step(
        self,
        num_tokens: typing.SupportsInt | typing.SupportsIndex,
        was_ms: typing.SupportsFloat | typing.SupportsIndex,
        cas_ms: typing.SupportsFloat | typing.SupportsIndex,
    ) -> Decision:
        """
        Decides, and times the step with what it would take in the chosen mode.
        """
    @property
    def changes(self) -> int: ...

class ByteView:
    """
    Bytes of a pool; torch.from_dlpack() makes a uint8 tensor that keeps them alive.
    """
    def __dlpack__(
        self,
        *,
        stream: typing.Any = None,
        max_version: typing.Any = None,
        dl_device: typing.Any = None,
        copy: typing.Any = None,
    ) -> typing_extensions.CapsuleType:
        """
        DLPack's protocol. On a GPU no stream is waited for: the memory is not a stream's.
        """
    def __dlpack_device__(self) -> tuple[int, int]: ...
    @property
    def num_bytes(self) -> int: ...

class WeightPool:
    def __init__(self, backend: Backend, placement: Placement, manifest: str) -> None: ...
    def close_backend(self) -> bool:
        """
        Collective: frees what all ranks allocated together. False if a rank did not come; the memory then stays.
        """
    def is_local(self, layer: typing.SupportsInt | typing.SupportsIndex) -> bool: ...
    def local_layer(self, layer: typing.SupportsInt | typing.SupportsIndex) -> ByteView:
        """
        Bytes of a local layer.
        """
    def publish(self) -> None: ...
    def ring_view(
        self, offset: typing.SupportsInt | typing.SupportsIndex, bytes: typing.SupportsInt | typing.SupportsIndex
    ) -> ByteView:
        """
        Bytes of the ring; valid between fetch_layer and release_layer.
        """
    @property
    def published(self) -> bool: ...

class TraceEvent:
    """
    A span of a trace; see include/sidp/trace.hpp.
    """
    @property
    def begin(self) -> int:
        """
        nanoseconds of CLOCK_MONOTONIC, which processes of a host share
        """
    @property
    def broken_off(self) -> bool: ...
    @property
    def bytes(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def layer(self) -> int: ...
    @property
    def mode(self) -> Mode: ...
    @property
    def on_stream(self) -> bool:
        """
        times of the device; otherwise of the calling thread
        """
    @property
    def op(self) -> int: ...
    @property
    def peer(self) -> int: ...
    @property
    def reason(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def track(self) -> str: ...

class Trace:
    @property
    def dropped(self) -> int: ...
    @property
    def events(self) -> list[TraceEvent]: ...
    @property
    def stream_error_ns(self) -> int: ...
    @property
    def unfinished(self) -> int: ...

class StepKind:
    """
    How the calls of a step reach the device.

    Members:

      RUN

      CAPTURE

      REPLAY
    """

    CAPTURE: typing.ClassVar[StepKind]
    REPLAY: typing.ClassVar[StepKind]
    RUN: typing.ClassVar[StepKind]
    __members__: typing.ClassVar[dict[str, StepKind]]
    @typing.overload
    def __eq__(self, other: StepKind) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: StepKind) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Runtime:
    def __init__(
        self,
        pool: WeightPool,
        ops: collections.abc.Sequence[Op],
        *,
        deadline_ms: typing.SupportsInt | typing.SupportsIndex,
        max_rows: typing.SupportsInt | typing.SupportsIndex,
        row_bytes: typing.SupportsInt | typing.SupportsIndex,
        element_bytes: typing.SupportsInt | typing.SupportsIndex,
        profile: MachineProfile,
        fixed: Mode | None,
        fixed_sizes: collections.abc.Sequence[tuple[typing.SupportsInt | typing.SupportsIndex, Mode]],
        hysteresis: typing.SupportsFloat | typing.SupportsIndex,
        row_buckets: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] = [],
        deferred_start: bool = False,
        spin_rows: typing.SupportsInt | typing.SupportsIndex = 128,
        owners_engines: bool = True,
        exclusive_links: bool = True,
        test_lane_delay_us: typing.SupportsInt | typing.SupportsIndex = 0,
        test_service_delay_us: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> None: ...
    def begin_step(
        self,
        num_tokens: typing.SupportsInt | typing.SupportsIndex,
        stream: typing.SupportsInt | typing.SupportsIndex = 0,
        kind: StepKind = ...,
        mode: Mode | None = None,
    ) -> Decision: ...
    def bucket(
        self, layer: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex
    ) -> int:
        """
        Rows of the result that a request of so many rows needs room for.
        """
    def check(self) -> None:
        """
        Throws if a stream-ordered request was not answered.
        """
    def check_launch(self) -> None:
        """
        Raises unless a graph may be launched now, in a replay step.
        """
    def close(self) -> bool:
        """
        False if a stream is still at work: keep the memory of captured ops.
        """
    def end_step(self, broken_off: bool) -> None: ...
    def fetch_layer(
        self, layer: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex = 0
    ) -> None:
        """
        Waits for the layer, or makes the stream wait; its bytes are at the address that the placement gives.
        """
    def launched(self) -> None:
        """
        It has been launched; call at once.
        """
    def lent(
        self,
        layer: typing.SupportsInt | typing.SupportsIndex,
        rows: typing.SupportsInt | typing.SupportsIndex,
        num_bytes: typing.SupportsInt | typing.SupportsIndex,
    ) -> ByteView | None:
        """
        Where the answer to a request of so many rows is when it is not copied; None: it always is.
        """
    def predict(self, num_tokens: typing.SupportsInt | typing.SupportsIndex) -> StepTimes:
        """
        Predicted times of such a step, uncorrected.
        """
    def preview(self, num_tokens: typing.SupportsInt | typing.SupportsIndex) -> Decision:
        """
        What the policy would decide now; nothing begins.
        """
    def release_layer(
        self, layer: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex = 0
    ) -> None: ...
    def remote_compute(
        self,
        layer: typing.SupportsInt | typing.SupportsIndex,
        op: typing.SupportsInt | typing.SupportsIndex,
        x: tuple[
            typing.SupportsInt | typing.SupportsIndex,
            typing.SupportsInt | typing.SupportsIndex,
            typing.SupportsInt | typing.SupportsIndex,
        ],
        y: tuple[
            typing.SupportsInt | typing.SupportsIndex,
            typing.SupportsInt | typing.SupportsIndex,
            typing.SupportsInt | typing.SupportsIndex,
        ],
        stream: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> None:
        """
        y = op(layer, x); x and y: (address, rows, bytes a row) of row-major memory on the pool's device, which must outlive the call, and on a GPU the work that the stream has then. y at address 0: the answer is lent().
        """
    def start(self, failure: str = "") -> None:
        """
        Collective after deferred_start: begins to answer the other ranks. failure: why this one cannot; all raise.
        """
    def start_trace(self, num_events: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Records what this rank does, between steps; see include/sidp/trace.hpp.
        """
    def stats(self) -> dict[str, typing.Any]: ...
    def stop_trace(self) -> Trace:
        """
        Cuts an open step, which goes on; also once closed.
        """

class OneSided:
    """
    Rows and a flag to another GPU, and the wait for a flag; see backends/nvshmem/one_sided.hpp. Addresses are of memory of this GPU or mapped here. Lives as long as graphs made with it.
    """
    def __init__(self, device: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def failed(self) -> bool:
        """
        Whether a wait ended by release().
        """
    def put(
        self,
        dst: typing.SupportsInt | typing.SupportsIndex,
        src: typing.SupportsInt | typing.SupportsIndex,
        num_bytes: typing.SupportsInt | typing.SupportsIndex,
        flag: typing.SupportsInt | typing.SupportsIndex,
        stream: typing.SupportsInt | typing.SupportsIndex,
    ) -> None:
        """
        Enqueues a copy and then a 1 in the 32 bits of the flag.
        """
    def release(self) -> None:
        """
        Ends all waits, for a peer that died. From any thread.
        """
    def wait(
        self, flag: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex
    ) -> None:
        """
        Makes the stream wait for a flag in this GPU's memory, and sets it to 0.
        """

def add_graph(
    op: OpKernel,
    owner: typing.SupportsInt | typing.SupportsIndex,
    requester: typing.SupportsInt | typing.SupportsIndex,
    rows: typing.SupportsInt | typing.SupportsIndex,
    graph: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    graph: a cudaGraph_t that begins with await_rows(), computes `rows` rows from request_slot() and ends in put_answer().
    """

def await_rows(
    runtime: Runtime,
    owner: typing.SupportsInt | typing.SupportsIndex,
    requester: typing.SupportsInt | typing.SupportsIndex,
    rows: typing.SupportsInt | typing.SupportsIndex,
    bytes: typing.SupportsInt | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Enqueues the wait for the rows of a request, `bytes` in request_slot(), where it is announced before them.
    """

def backend_names() -> list[str]:
    """
    Backends of this build.
    """

def check_policy(profile: MachineProfile) -> None:
    """
    Raises ConfigError for a profile that makes no sense.
    """

def cuda_report() -> dict[str, typing.Any]:
    """
    What the CUDA driver says about this machine; never raises for what is missing.

    Keys: ``compiled`` (this build has the CUDA part), ``compiled_version`` (of the headers, "13.0" or None),
    ``driver`` (CUDA version that the driver supports, or None), ``reason`` (why no device can be used, "" when one
    can), ``devices`` (one dict each: ordinal, name, uuid, memory_bytes, compute_capability, num_sms,
    num_async_engines, stream_mem_ops_64bit, stream_wait_value_nor, flush_remote_writes, and can_access_peer, a list
    of bool by ordinal). The driver is initialised: a process forked afterwards cannot use CUDA.
    """

def decide(
    *,
    num_tokens: typing.SupportsInt | typing.SupportsIndex,
    max_rows: typing.SupportsInt | typing.SupportsIndex,
    unavailable_peer: typing.SupportsInt | typing.SupportsIndex | None = None,
    previous: Mode | None = None,
    recent_changes: typing.SupportsInt | typing.SupportsIndex = 0,
    was: tuple[typing.SupportsFloat | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex] = (1.0, 0),
    cas: tuple[typing.SupportsFloat | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex] = (1.0, 0),
    shape: StepShape,
    profile: MachineProfile,
    fixed: Mode | None = None,
    fixed_sizes: collections.abc.Sequence[tuple[typing.SupportsInt | typing.SupportsIndex, Mode]] = [],
    hysteresis: typing.SupportsFloat | typing.SupportsIndex = 0.1,
) -> Decision:
    """
    The pure mode policy; was, cas: correction and the timed steps that it rests on.
    """

def graph_op(backend: Backend) -> OpKernel:
    """
    An op that runs as captured CUDA graphs; add_graph() fills it.
    """

def load_torch(library: str) -> None:
    """
    Looks up torch's functions in the loaded libtorch_cpu.
    """

def make_backend(
    name: str,
    rank: typing.SupportsInt | typing.SupportsIndex,
    world_size: typing.SupportsInt | typing.SupportsIndex,
    token: str,
    all_gather: collections.abc.Callable[[str, bytes], list[bytes]],
    device: typing.SupportsInt | typing.SupportsIndex = -1,
    gpus: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] = [],
    deadline_ms: typing.SupportsInt | typing.SupportsIndex = 30000,
    test_without_mappings: bool = False,
) -> Backend: ...
def measure_copies(budget_ms: typing.SupportsInt | typing.SupportsIndex) -> dict[str, typing.Any]:
    """
    Measures copy-engine rates between the GPUs, for `budget_ms` in all; never raises for what is missing.

    Keys: ``reason`` (why nothing was measured, "" when it was), ``rates`` (one dict for each ordered pair: ``src`` and
    ``dst``, ordinals; ``direct``, dst maps the memory of src, else the copies go through host memory; ``gbps``, 1e9 bytes
    a second, the best of several rounds of 64 MiB copies). It starts CUDA on every GPU and a driver that hangs hangs it:
    for a process of its own.
    """

def measure_round_trip_us(rounds: typing.SupportsInt | typing.SupportsIndex) -> float:
    """
    Median microseconds of a round trip between two threads through the host backend's flags.
    """

def next_reader(
    last: typing.SupportsInt | typing.SupportsIndex,
    world_size: typing.SupportsInt | typing.SupportsIndex,
    waiting: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
) -> int:
    """
    Whom an owner's link serves next: the first of last-1, last-2 ... (modulo world_size) that waits, or -1.
    """

def peer_layer(pool: WeightPool, layer: typing.SupportsInt | typing.SupportsIndex) -> ByteView:
    """
    A streamed layer at its owner as mapped here; read-only.
    """

def predict_step(
    rows: typing.SupportsFloat | typing.SupportsIndex,
    profile: MachineProfile,
    shape: StepShape,
    other_s: typing.SupportsFloat | typing.SupportsIndex = 0.0,
) -> StepTimes:
    """
    Predicted seconds of a step; other_s: its work besides the pool's products.
    """

def products_s(
    num_bytes: typing.SupportsFloat | typing.SupportsIndex,
    rows: typing.SupportsFloat | typing.SupportsIndex,
    profile: MachineProfile,
    element_bytes: typing.SupportsInt | typing.SupportsIndex,
) -> float:
    """
    Seconds of matrix products of so many rows with weights of so many bytes.
    """

def put_answer(
    runtime: Runtime,
    owner: typing.SupportsInt | typing.SupportsIndex,
    requester: typing.SupportsInt | typing.SupportsIndex,
    rows: typing.SupportsInt | typing.SupportsIndex,
    sources: collections.abc.Sequence[
        tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex]
    ],
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Enqueues the answer to a request of `rows` rows, a bucket: sources are (address, bytes), one after the other into the slot.
    """

def request_slot(
    runtime: Runtime,
    owner: typing.SupportsInt | typing.SupportsIndex,
    requester: typing.SupportsInt | typing.SupportsIndex,
    bytes: typing.SupportsInt | typing.SupportsIndex,
) -> ByteView:
    """
    The slot that a requester's rows come to at an owner, as mapped here.
    """

def service_stream(runtime: Runtime) -> int:
    """
    The stream that the owner's graphs are launched on.
    """

def step_over_stream(
    world_size: typing.SupportsInt | typing.SupportsIndex, work: typing.SupportsFloat | typing.SupportsIndex
) -> float:
    """
    A WaS step in units of the stream alone, with so many units of compute beside it.
    """

def torch_kernel(
    *,
    weights: list[
        tuple[
            typing.SupportsInt | typing.SupportsIndex,
            list[typing.SupportsInt | typing.SupportsIndex],
            list[typing.SupportsInt | typing.SupportsIndex],
            typing.SupportsInt | typing.SupportsIndex,
        ]
    ],
    calls: list[tuple[str, str, list[tuple[str, typing.Any, bool]]]],
    outputs: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    output_columns: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    output_element_bytes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    input_columns: typing.SupportsInt | typing.SupportsIndex,
    input_dtype: typing.SupportsInt | typing.SupportsIndex,
) -> OpKernel:
    """
    A straight-line ATen program. weights: (offset, shape, strides, dtype). calls: (name, overload, arguments).
    """

def unlink_segments(token: str, world_size: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Removes the shared memory names that a group can have left when ranks died in start-up.
    """

ALIGNMENT: int = 256
LARGEST_SIMULATED: int = 16
LINK_GRACE_SHARE: int = 128
SPIN_ROWS: int = 128
