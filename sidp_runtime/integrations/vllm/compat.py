"""Every version gate: which vLLM, which hooks with which signatures, and which of its settings the pool works with.

Each check raises ``UnsupportedError`` with the reason and what to do, at start-up and before weights are read.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedError

if TYPE_CHECKING:
    import torch

#: Lowest version, and the first one above the highest, whose hooks were read: (major, minor).
OLDEST, BEYOND = (0, 20), (0, 34)

#: Quantisations of checkpoints, as vLLM names them, beside none.
QUANTIZATIONS = ("fp8",)

# Module, dotted name in it, leading parameters. All of 0.20.2, 0.32.0 and 0.33.0.
_HOOKS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("vllm.model_executor.model_loader", "register_model_loader", ("load_format",)),
    (
        "vllm.model_executor.model_loader.base_loader",
        "BaseModelLoader.load_model",
        ("self", "vllm_config", "model_config", "prefix"),
    ),
    ("vllm.model_executor.model_loader.base_loader", "BaseModelLoader.load_weights", ("self", "model", "model_config")),
    ("vllm.model_executor.model_loader.base_loader", "BaseModelLoader.download_model", ("self", "model_config")),
    ("vllm.model_executor.offloader.base", "set_offloader", ("instance",)),
    ("vllm.model_executor.offloader.base", "BaseOffloader.wrap_modules", ("self", "modules_generator")),
    ("vllm.model_executor.models.utils", "make_layers", ("num_hidden_layers", "layer_fn", "prefix")),
    ("vllm.model_executor.layers.linear", "UnquantizedLinearMethod.apply", ("self", "layer", "x", "bias")),
    ("vllm.model_executor.layers.linear", "UnquantizedLinearMethod.process_weights_after_loading", ("self", "layer")),
    ("vllm.model_executor.layers.activation", "SiluAndMul.forward_native", ("x",)),
    ("vllm.model_executor.layers.activation", "SiluAndMul.forward_cuda", ("self", "x")),
    ("vllm.model_executor.layers.quantization.fp8", "Fp8LinearMethod.apply", ("self", "layer", "x", "bias")),
    (
        "vllm.model_executor.layers.quantization.fp8",
        "Fp8LinearMethod.process_weights_after_loading",
        ("self", "layer"),
    ),
    (
        "vllm.model_executor.layers.quantization.kv_cache",
        "BaseKVCacheMethod.process_weights_after_loading",
        ("self", "layer"),
    ),
    (
        "vllm.compilation.cuda_graph",
        "CUDAGraphWrapper.__init__",
        ("self", "runnable", "vllm_config", "runtime_mode", "cudagraph_options"),
    ),
    ("vllm.v1.worker.gpu_worker", "Worker.load_model", ("self",)),
    ("vllm.v1.worker.gpu_worker", "Worker.determine_available_memory", ("self",)),
    ("vllm.v1.worker.gpu_worker", "Worker.compile_or_warm_up_model", ("self",)),
    ("vllm.v1.worker.gpu_worker", "Worker.get_model", ("self",)),
)


def installed_version() -> str:
    """vLLM's version text. ``UnsupportedError`` if it is not one of those that were read."""
    import vllm

    text = str(vllm.__version__)
    found = re.match(r"(\d+)\.(\d+)", text)
    version = (int(found[1]), int(found[2])) if found else None
    if version is None or not OLDEST <= version < BEYOND:
        raise UnsupportedError(
            f"vLLM {text} is not between {OLDEST[0]}.{OLDEST[1]} and {BEYOND[0]}.{BEYOND[1] - 1}, whose hooks this "
            "integration knows; install one of those"
        )
    return text


def check_hooks() -> None:
    """The version, and each hook's parameters."""
    version = installed_version()
    for module, name, parameters in _HOOKS:
        hook = _find(module, name, version)
        seen = tuple(inspect.signature(hook).parameters)
        if seen[: len(parameters)] != parameters:
            raise UnsupportedError(
                f"vLLM {version}: {module}.{name} takes ({', '.join(seen)}), expected ({', '.join(parameters)}, ...); "
                "this integration needs an update for it"
            )


def _find(module: str, name: str, version: str) -> Callable[..., Any]:
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(f"vLLM {version} has no {module}.{name} ({error}); another version is needed") from error
    hook: Callable[..., Any] = found
    return hook


def check_settings(vllm_config: Any) -> None:
    """What of vLLM's settings a pool of whole decoder layers cannot serve."""
    from vllm.config import CompilationMode

    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    refusals = (
        (parallel.tensor_parallel_size > 1, "tensor_parallel_size > 1: the replicas share the weights instead"),
        (parallel.pipeline_parallel_size > 1, "pipeline_parallel_size > 1"),
        (parallel.data_parallel_size > 1, "a lock-step data-parallel group: start independent engines"),
        (bool(getattr(parallel, "enable_dbo", False)), "enable_dbo: a step would be two interleaved ones"),
        (
            model.quantization not in (None, *QUANTIZATIONS),
            f"quantization {model.quantization!r}: give a checkpoint that is {', '.join(QUANTIZATIONS)}, bf16, fp16 or "
            "fp32",
        ),
        (
            # vLLM up to 0.2x
            not getattr(vllm_config.quant_config, "is_checkpoint_fp8_serialized", True),
            "weights that are quantised while they are loaded: give a checkpoint that is fp8",
        ),
        (vllm_config.lora_config is not None, "LoRA: adapters wrap the pooled linears"),
        (vllm_config.speculative_config is not None, "speculative decoding: the draft would need a pool of its own"),
        (bool(getattr(model, "enable_sleep_mode", False)), "sleep mode: peers read this engine's weights at any time"),
        (
            vllm_config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE,
            "compilation mode 1 (STOCK_TORCH_COMPILE): a step could not begin outside the graph; use 0 or 3",
        ),
        (
            # That runner launches a graph without a forward context, which says what graph it is.
            vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs() and _has_second_runner(vllm_config),
            "full CUDA graphs of vLLM's second model runner: a step could not begin outside the graph; set "
            "VLLM_USE_V2_MODEL_RUNNER=0, or give compilation_config={'cudagraph_mode': 'PIECEWISE'} or 'NONE'",
        ),
    )
    for refused, words in refusals:
        if refused:
            raise UnsupportedError(f"load_format='sidp' does not work with {words}")


def _has_second_runner(vllm_config: Any) -> bool:
    import vllm.envs

    chosen = getattr(vllm_config, "use_v2_model_runner", None)
    return bool(vllm.envs.VLLM_USE_V2_MODEL_RUNNER if chosen is None else chosen)


def default_graphs() -> str:
    """The ``cudagraph_mode`` to ask for on a GPU: graphs of whole steps too, where the runner is surely the first."""
    import vllm.envs

    return "FULL_AND_PIECEWISE" if vllm.envs.VLLM_USE_V2_MODEL_RUNNER is False else "PIECEWISE"


def whole_graph() -> Any:
    """vLLM's descriptor of the CUDA graph of a whole step that is to be captured or launched now, or None."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available():
        return None
    context = get_forward_context()
    return context.batch_descriptor if context.cudagraph_runtime_mode == CUDAGraphMode.FULL else None


def step_through_graphs(runner: Any, launch: Callable[[Any, int, Callable[[], Any]], Any]) -> None:
    """Has ``launch(graph, tokens, call)`` launch each CUDA graph of a whole step, by ``call``, on a loaded runner.

    ``UnsupportedError`` if the runner holds such graphs in another way than vLLM's ``CUDAGraphWrapper``.
    """
    from vllm.compilation.cuda_graph import CUDAGraphWrapper

    held = runner.model
    if type(held) is not CUDAGraphWrapper:
        raise UnsupportedError(
            f"vLLM {installed_version()} holds its model in a {type(held).__name__}, not a CUDAGraphWrapper, so its "
            "full CUDA graphs cannot be followed: give compilation_config={'cudagraph_mode': 'PIECEWISE'} or 'NONE'"
        )

    class SteppedGraphs(CUDAGraphWrapper):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            graph = whole_graph()
            entry = None if graph is None else self.concrete_cudagraph_entries.get(graph)
            call = functools.partial(super().__call__, *args, **kwargs)
            if entry is None or entry.cudagraph is None:
                return call()  # the model is called, to run or to be captured
            return launch(graph, graph.num_tokens, call)

    runner.model = SteppedGraphs(held.runnable, held.vllm_config, held.runtime_mode, held.cudagraph_options)


def check_backend(backend: str) -> None:
    """The pool's backend is the platform's."""
    from vllm.platforms import current_platform

    on_cpu = bool(current_platform.is_cpu())
    if (backend == "host") != on_cpu:
        raise UnsupportedError(
            f"backend {backend!r} with vLLM on {'a CPU' if on_cpu else 'GPUs'}: on CPUs it is 'host', on GPUs 'nvshmem'"
        )


def check_worker(vllm_config: Any) -> None:
    """Warm-up ends where our workers say so; with another the engine would stay in it."""
    from .worker import PooledWorker

    module, _, name = str(vllm_config.parallel_config.worker_cls).rpartition(".")
    if not (module and issubclass(_find(module, name, installed_version()), PooledWorker)):  # type: ignore[arg-type]
        raise UnsupportedError(
            f"load_format='sidp' needs worker_cls {PooledWorker.__module__}.SidpWorker (SidpCpuWorker on a CPU) or a "
            f"class derived from it, not {vllm_config.parallel_config.worker_cls!r}; use "
            "sidp_runtime.integrations.vllm.engine_arguments"
        )


def keep_weights_plain(model: Any) -> None:
    """On a CPU, keeps vLLM from packing the linears into copies of its own and dropping the weights."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    if "_cpu_skip_gemm_dispatch" not in inspect.getsource(UnquantizedLinearMethod.process_weights_after_loading):
        raise UnsupportedError(
            f"vLLM {installed_version()} packs all weights on a CPU, which a pool cannot hold; use 0.32 or later there"
        )
    for module in model.modules():
        if isinstance(getattr(module, "quant_method", None), UnquantizedLinearMethod):
            module._cpu_skip_gemm_dispatch = True


def is_torchs_product(method: Any) -> bool:
    """Whether a linear's method gives what ``torch.nn.functional.linear`` does, so that torch may put it elsewhere."""
    import vllm.envs
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    if type(method) is not UnquantizedLinearMethod or vllm.envs.VLLM_BATCH_INVARIANT:
        return False
    product = getattr(method, "_gemm_impl", None) or utils.dispatch_unquantized_gemm()  # of the method from 0.2x on
    return product is utils.default_unquantized_gemm


def activation_of(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What an MLP's activation computes; SiluAndMul by vLLM's own kernel on a GPU.

    Called outside of vLLM's graphs the module may be what vLLM compiled for tensors of any shape: three times as slow
    as in them on an H200, and not allowed in a capture.
    """
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.platforms import current_platform

    if type(module) is not SiluAndMul:
        return module  # type: ignore[no-any-return]
    return module.forward_native if current_platform.is_cpu() else module.forward_cuda  # type: ignore[no-any-return]


def optional_parameters(model: Any) -> list[str]:
    """Names of parameters that a checkpoint may lack: scales of a quantised KV cache, which vLLM then sets itself."""
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    return [
        f"{name}.{short}"
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod)
        for short, _ in module.named_parameters(recurse=False)
    ]


def check_token_wise(linear: str, method: Any) -> None:
    """A row of a CaS request may not depend on the others: owners compute more rows than were asked for."""
    scale = getattr(getattr(method, "activation_quant_key", None), "scale", None)
    if scale is not None and not scale.static and scale.group_shape.is_per_tensor():
        raise UnsupportedError(
            f"{linear} has {type(method).__name__}, which scales all rows of a step by the largest; CaS computes rows "
            "by themselves: use mode 'was'"
        )


def split_graphs_at(vllm_config: Any, ops: tuple[str, ...]) -> None:
    """Makes piecewise CUDA graphs end at these operators, which then run between them."""
    compilation = vllm_config.compilation_config
    if compilation.splitting_ops:
        compilation.splitting_ops.extend(op for op in ops if op not in compilation.splitting_ops)
    elif compilation.cudagraph_mode.has_piecewise_cudagraphs():
        raise UnsupportedError(
            "load_format='sidp' does not work with piecewise CUDA graphs that are not cut at splitting_ops, which are "
            "empty (VLLM_USE_BREAKABLE_CUDAGRAPH does that): leave them to vLLM with compilation mode 3, or give "
            "compilation_config={'cudagraph_mode': 'NONE'}"
        )


def captured_rows(vllm_config: Any) -> list[int]:
    """Row counts of which CUDA graphs are captured, to which vLLM rounds up; none without graphs."""
    from vllm.config import CUDAGraphMode

    compilation = vllm_config.compilation_config
    none = compilation.cudagraph_mode == CUDAGraphMode.NONE
    return [] if none else sorted(compilation.cudagraph_capture_sizes or [])


def set_num_threads(count: int) -> None:
    """Threads of torch's arithmetic, before the engine is made: vLLM takes this call away afterwards."""
    import torch

    torch.set_num_threads(count)


def warm_up_products(worker: Any) -> None:
    """Compiles DeepGEMM's kernels, on a GPU, for linears that vLLM's warm-up did not know by their method.

    That of 0.20 goes by methods, later ones by what linears say. In mid-run a kernel's first use waits for the device.
    """
    import vllm.envs
    from vllm.model_executor.warmup import deep_gemm_warmup
    from vllm.utils.deep_gemm import is_deep_gemm_supported

    if (
        hasattr(deep_gemm_warmup, "_fp8_linear_may_use_deep_gemm")
        and vllm.envs.VLLM_USE_DEEP_GEMM
        and vllm.envs.VLLM_DEEP_GEMM_WARMUP != "skip"
        and is_deep_gemm_supported()
    ):
        deep_gemm_warmup.deep_gemm_warmup(worker.get_model(), worker.scheduler_config.max_num_batched_tokens)


def load_late_kernels(runner: Any) -> None:
    """Loads, on a GPU, the kernels that vLLM compiles in mid-run, which its own warm-up leaves out.

    Loading one waits for the device, and with CaS two engines that load at once would wait for each other's answers.
    Known: Triton compiles the slot mapping of a step anew for a number of tokens of 1, of a multiple of 16, and for
    others (vLLM 0.20 V1). A runner without it has none to load.
    """
    try:
        compute: Callable[..., None] = runner.input_batch.block_table.compute_slot_mapping
        starts, positions = runner.query_start_loc.gpu[:2], runner.positions
    except AttributeError:
        return
    starts.zero_()  # one request of no tokens: only what pads the mapping is written
    for tokens in (1, 16, 17):
        if tokens <= positions.shape[0]:
            compute(1, starts, positions[:tokens])


def load_kernels_of_logits(worker: Any) -> None:
    """Loads, on a GPU, the kernels of the product that follows a step, for each number of sequences that it may have.

    vLLM pads a step to a graph that it has launched before, and not its logits, of which each sequence has a row. Two
    engines that came to a new number at once stopped for good, for the reason above.
    """
    import torch

    model, config = worker.get_model(), worker.model_config
    rows = worker.scheduler_config.max_num_seqs
    hidden = torch.zeros(rows, config.get_hidden_size(), dtype=config.dtype, device=worker.device)
    with torch.inference_mode():
        for count in range(rows, 0, -1):  # downwards, so that all fit the memory of the first
            model.compute_logits(hidden[:count])
    torch.cuda.synchronize()
