"""Sessions of ONNX Runtime."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}
"""Providers on which features stay on the device from stage to stage; with others they pass through numpy."""
EXACT = {"CUDAExecutionProvider": {"use_tf32": 0}}

Provider = str | tuple[str, dict[str, Any]]


class RunnerError(ValueError):
    """An exported folder, or what it was given, is not usable."""


@dataclass(frozen=True)
class Settings:
    """How ONNX Runtime shall run.

    Args:
        threads: that share the work of one operator; 0: one for each core.
        providers: by name, or name and options; the first has to be there.
        spinning: threads without work wait actively also when no run lasts, a brake on everything else, the sessions
            of other stages among it. Else they do so within a run alone.
        shared_pool: all sessions share ONNX Runtime's global threads, as many as the first of them asked for. It is
            for the whole process: every session made later must say so as well. The fastest for programs that do
            nothing else.
        device_id: number of the GPU, for providers whose own options do not say it.
    """

    threads: int = 0
    providers: tuple[Provider, ...] = ("CPUExecutionProvider",)
    spinning: bool = False
    shared_pool: bool = False
    device_id: int = 0

    @property
    def numbered(self) -> list[Provider]:
        """The providers; those of a GPU with its number, CUDA without TF32, which it would take for float32."""
        pairs = [(one, {}) if isinstance(one, str) else one for one in self.providers]
        return [
            (name, {"device_id": self.device_id, **EXACT.get(name, {}), **options}) if name in DEVICES else one
            for one, (name, options) in zip(self.providers, pairs, strict=True)
        ]

    def open(self, model: str | Path | bytes, name: str) -> Any:
        """A session.

        Args:
            model: its file, or its bytes.
            name: of the model, for messages.

        Raises:
            RunnerError: ONNX Runtime, or a provider, is not there or does not take the model.
        """
        runtime = load_onnxruntime()
        asked = [one if isinstance(one, str) else one[0] for one in self.providers]
        unknown = [one for one in asked if one not in runtime.get_available_providers()]
        if unknown or not asked:
            there = ", ".join(runtime.get_available_providers())
            raise RunnerError(f"no provider {', '.join(unknown) or 'is named'}. This onnxruntime has: {there}.")
        if self.device_id < 0:
            raise RunnerError(f"devices are numbered from 0 on, got device_id={self.device_id}.")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        if self.shared_pool:
            # Threads that are there already stay as they are: whoever came first has chosen how many.
            with contextlib.suppress(runtime.capi.onnxruntime_pybind11_state.Fail):
                runtime.set_global_thread_pool_sizes(self.threads, 1)
            options.use_per_session_threads = False
        else:
            options.intra_op_num_threads = self.threads
            options.inter_op_num_threads = 1
            # Were threads to sleep within a run, ResNet-56 would take 1.4 x as long on a single image.
            options.add_session_config_entry("session.force_spinning_stop", "0" if self.spinning else "1")
        try:
            source = model if isinstance(model, bytes) else str(model)
            session = runtime.InferenceSession(source, options, providers=self.numbered)
        except Exception as error:  # whatever a damaged or too new model makes of being read
            why = " ".join(str(error).split())[-300:]  # what is wrong comes last, behind where that was found
            raise RunnerError(f"onnxruntime {runtime.__version__} does not open {name}: {why}") from error
        if asked[0] not in session.get_providers():
            raise RunnerError(f"{asked[0]} does not start; onnxruntime would run {name} on {session.get_providers()}.")
        return session


def load_onnxruntime() -> Any:
    """ONNX Runtime.

    Raises:
        RunnerError: it is not there.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RunnerError(f"this needs onnxruntime ({error}). Install it with: pip install onnxruntime") from error
    return onnxruntime
