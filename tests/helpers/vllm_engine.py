"""vLLM engines in processes of their own, driven by the test: plain ones and ones with a pool."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from sidp_runtime import _C, _torch

#: Of every engine, with a pool or without: the arithmetic must be the same.
COMMON: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "enable_prefix_caching": False,
    "enforce_eager": True,
    "seed": 0,
}
_STEP_S = 120

# vLLM is imported once, by the process that engines are forked from.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["vllm.entrypoints.llm", "sidp_runtime.integrations.vllm.loader"])


def register_plain_loader() -> None:
    """``load_format="plain"``: vLLM's own loader, but linears stay as they were read, as they do in a pool.

    vLLM packs them for a CPU, and then multiplies with other kernels.
    """
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class PlainLoader(DefaultModelLoader):
        def __init__(self, load_config: Any) -> None:
            load_config.load_format = "auto"
            super().__init__(load_config)

        def load_weights(self, model: Any, model_config: Any) -> None:
            super().load_weights(model, model_config)
            for module in model.modules():
                module._cpu_skip_gemm_dispatch = True

    register_model_loader("plain")(PlainLoader)


def _serve(
    connection: Connection,
    model: str,
    pool: dict[str, Any] | None,
    more: dict[str, Any],
    log: str,
    environment: dict[str, str],
    prepare: Callable[[], None] | None,
) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    tempfile.tempdir = os.path.dirname(log)  # noqa: PTH120 - vLLM's rendezvous file outlives a killed engine
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_NO_USAGE_STATS="1",
        **environment,
    )
    try:
        import torch
        from vllm import LLM, SamplingParams

        torch.set_num_threads(1)
        if prepare is not None:
            prepare()
        if pool is None:
            register_plain_loader()
            chosen: dict[str, Any] = {"load_format": "plain"}
        else:
            from sidp_runtime.integrations.vllm import engine_arguments

            chosen = engine_arguments(**pool)
        given = {**COMMON, **more, **chosen}
        llm = LLM(model=model, skip_tokenizer_init=True, disable_log_stats=True, **given)
        connection.send(("ok", llm.llm_engine.vllm_config.cache_config.num_gpu_blocks))
        while True:
            call, *arguments = connection.recv()
            if call == "generate":
                prompts, count = arguments
                params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
                outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
                connection.send(("ok", [list(output.outputs[0].token_ids) for output in outputs]))
            else:
                connection.send(("ok", llm.collective_rpc(call, args=tuple(arguments))[0]))
    except (EOFError, OSError):
        pass  # the test is over
    except BaseException:
        connection.send(("error", traceback.format_exc()))


class EngineProcess:
    """One engine. ``pool``: arguments of ``engine_arguments``; None: plain vLLM. Calls go out before answers come.

    ``prepare`` is called in its process before the engine is made.
    """

    def __init__(
        self,
        model: str,
        log: str,
        pool: dict[str, Any] | None = None,
        *,
        environment: dict[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
        **more: Any,
    ) -> None:
        self._log = log
        self._connection, theirs = _context.Pipe()
        arguments = (theirs, model, pool, more, log, environment or {}, prepare)
        self._process = _context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def call(self, *message: Any) -> None:
        self._connection.send(message)

    def answer(self) -> Any:
        """Of the oldest call; the first is the number of KV blocks, when the engine is ready."""
        try:
            kind, value = self._connection.recv() if self._connection.poll(_STEP_S) else ("error", "no answer")
        except EOFError:
            kind, value = "error", "it has ended"
        assert kind == "ok", f"{value}\n{self.output()[-4000:]}"
        return value

    def ask(self, *message: Any) -> Any:
        self.call(*message)
        return self.answer()

    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> None:
        self.call("generate", [list(ids) for ids in prompts], count)

    def kill(self) -> None:
        self._process.kill()
        self._process.join(10)

    def output(self) -> str:
        with open(self._log, errors="replace") as handle:  # noqa: PTH123
            return handle.read()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


@contextlib.contextmanager
def engines_of(
    model: Path, folder: Path, kv_bytes: Sequence[int], pool: dict[str, Any] | None = None, **more: Any
) -> Iterator[list[EngineProcess]]:
    """Two engines with a pool, still starting, with room for their KV caches."""
    token = secrets.token_hex(16)
    store, host, port = _torch.make_store_server()
    assert store is not None
    own = {"serve_store": False, "token": token, "setup_ms": 100_000, "deadline_ms": 10_000}
    with contextlib.ExitStack() as stack:
        stack.callback(_C.unlink_segments, token, 2)
        yield [
            stack.enter_context(
                EngineProcess(
                    str(model),
                    str(folder / f"{rank}.log"),
                    {
                        "rank": rank,
                        "store": f"{host}:{port}",
                        "own": own,
                        "world_size": 2,
                        "max_rows": 64,
                        **(pool or {}),
                    },
                    kv_cache_memory_bytes=kv_bytes[rank],
                    **more,
                )
            )
            for rank in range(2)
        ]
    assert not [path for path in Path("/dev/shm").iterdir() if token in path.name]
    assert len(list(folder.glob("vllm_dist_*"))) >= 2  # not in a directory that nobody empties
