"""An exported folder timed on a provider of ONNX Runtime: what leaving early takes there, noted in its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shallowdeep.errors import ConfigError, require
from shallowdeep.inference.onnx.manifest import write_laziness
from shallowdeep.inference.runner.sessions import RunnerError, Settings
from shallowdeep.inference.runner.timing import Bench, bench


def bench_folder(
    folder: str | Path,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    rounds: int = 20,
    threads: int | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    shared_pool: bool = False,
) -> Bench:
    """Time an input that leaves at the first exit against one that leaves at none, in every form of a folder.

    What the self-exiting files take on the first provider is written into the folder's manifest.

    Args:
        folder: what ``export`` wrote.
        batch_sizes: to be timed; the file for single samples is timed on one.
        rounds: times that each figure is taken; the median counts.
        threads: of the CPU; ``None``: one for each core.
        providers: of ONNX Runtime; the first has to be there.
        shared_pool: all sessions share one pool of threads, those that this process opens later too; where this
            onnxruntime has such a pool. For a process that does nothing else.

    Raises:
        ConfigError: the folder is damaged, its policy lets nobody leave, or the provider is not there.
    """
    if not batch_sizes or min(batch_sizes) < 1 or rounds < 1:
        raise ConfigError(
            f"a benchmark needs batch sizes and rounds of at least 1, got {list(batch_sizes)} and {rounds}."
        )
    has_pool = hasattr(require("onnxruntime", extra="onnx"), "set_global_thread_pool_sizes")
    settings = Settings(threads=threads or 0, providers=tuple(providers), shared_pool=shared_pool and has_pool)
    try:
        found = bench(folder, sizes=batch_sizes, repeats=rounds, settings=settings)
        write_laziness(folder, found)
    except RunnerError as error:
        raise ConfigError(str(error)) from error
    return found
