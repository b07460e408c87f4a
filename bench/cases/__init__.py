"""The table of all cases, in the order they run. Each is ``run(context)`` in the module of its key."""

from ..harness import Case

_COPY_PEERS = (
    "cudaMemcpyAsync_write",
    "cudaMemcpyAsync",
    "cudaMemcpyBatchAsync",
    "nvshmemx_getmem_on_stream",
    "load_store_kernel",
    "pinned_host",
    "torch_symmetric_memory",
    "nccl_broadcast",
    "nccl_all_gather",
    "memcpy",
    "gloo_broadcast",
    "gloo_all_gather",
)
_BYTES = "every byte that landed is compared with what its owner holds, once for each subject and size"
_LAYERS = "every fetched tensor is compared with its owner's, and one remote result with its product here"

CASES = (
    Case("link_bandwidth", "raw transfers between two ranks, by size, one and both directions", _BYTES, _COPY_PEERS,
         deadline_s=80),
    Case("incast", "1 to N-1 ranks pull from one owner", _BYTES, ("cudaMemcpyAsync", "memcpy"), ranks=3,
         every_gpu=True, deadline_s=60),
    Case("fetch", "whole layers through the ring, beside every other way to move the bytes", _BYTES, _COPY_PEERS,
         deadline_s=80),
    Case("put_signal", "one-sided rows and flag, there and back, by size", "what comes back is compared",
         ("nvshmem_put_signal", "memcpy_write_value"), deadline_s=60),
    Case("remote_compute", "a product at the layer's owner, over the same product here, by rows", _LAYERS),
    Case("step_time", "steps over tokens: WaS, CaS, all layers here, and the floor", _LAYERS,
         ("all_local", "pinned_offload", "tensor_parallel"), deadline_s=240),
    Case("step_boundary", "what refilling the ring across steps saves", _LAYERS, ("prefetch_in_step",)),
    Case("ring_depth", "WaS step time by slots of the ring", _LAYERS),
    Case("gemm_beside_copies", "matrix products beside copies: slowdown, waiting, clocks", _LAYERS, ("all_local",)),
    Case("host_cost", "host time of each call of a step", _LAYERS),
)  # fmt: skip
