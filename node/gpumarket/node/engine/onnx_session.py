"""onnxruntime behind its bounds: which device, how many threads, how long a pass may take.

Invariant: what a session reports as its device is what onnxruntime really uses; a device that is there and cannot be used is an error, and
nothing else is taken in its place. onnxruntime's own messages are never passed on: they quote the numbers that it was given.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from gpumarket.core.errors import EngineFailed

GRACE_SECONDS: Final = 2.0
"""An operator that does not end so long after it was told to is ended with the process."""
FATAL: Final = 4
LOAD_SECONDS: Final = 120
_CUDA: Final = "CUDAExecutionProvider"
_CPU: Final = "CPUExecutionProvider"
_CUDA_OPTIONS: Final = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
"""Products in full float32: a checker on another device could not tell 10-bit products from another model."""


class Session:
    """A loaded model."""

    def __init__(self, session: Any, device: str, pass_seconds: float) -> None:
        self._session, self.device, self._pass_seconds = session, device, pass_seconds
        self._options: Any = None

    def run(self, outputs: Sequence[str], inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """One pass. EngineFailed when it breaks, takes too long or was interrupted; a pass that does not let go ends the process."""
        options = onnxruntime.RunOptions()
        options.log_severity_level = FATAL
        self._options = options
        try:
            with Deadline(self._pass_seconds, lambda: setattr(options, "terminate", True)) as deadline:
                found = self._session.run(list(outputs), inputs, options)
        except Exception as error:  # a class of its own for each of its error codes
            late = f"a pass over the model took longer than {self._pass_seconds:g} s" if deadline.passed else ""
            raise EngineFailed(late or f"onnxruntime failed in a pass ({type(error).__name__})", hint="see the model") from None
        finally:
            self._options = None
        return [np.ascontiguousarray(value) for value in found]

    def interrupt(self) -> bool:
        """End the pass under way after its present operator; whether there is one."""
        options = self._options
        if options is not None:
            options.terminate = True
        return options is not None


class Deadline:
    """Calls `stop` after a time; when the work still goes on a while after that, ends the process: nothing else ends an operator."""

    def __init__(self, seconds: float, stop: Any) -> None:
        self._seconds, self._stop = seconds, stop
        self._done = threading.Event()
        self.passed = False

    def __enter__(self) -> Deadline:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        if self._done.wait(self._seconds):
            return
        self.passed = True
        self._stop()
        if not self._done.wait(GRACE_SECONDS):
            print(f"a pass over the model did not end {self._seconds:g} s after it began", file=sys.stderr, flush=True)
            os._exit(70)


def open_session(raw: bytes, threads: int, pass_seconds: float) -> Session:
    """Load a model that `onnx_file` let pass. EngineFailed when it does not load."""
    onnxruntime.disable_telemetry_events()
    onnxruntime.set_default_logger_severity(FATAL)
    wanted = [(_CUDA, _CUDA_OPTIONS), _CPU] if _CUDA in onnxruntime.get_available_providers() else [_CPU]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = FATAL
    options.enable_cpu_mem_arena = False  # else one large request is kept for good
    options.use_deterministic_compute = True
    # The optimizer folds constants, which is where a file's own bombs go off: a basic level folds, the higher ones only fuse more.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    try:
        with Deadline(LOAD_SECONDS, lambda: options.set_load_cancellation_flag(True)):
            session = onnxruntime.InferenceSession(raw, options, providers=wanted)
    except Exception as error:
        raise EngineFailed(
            f"onnxruntime does not load the model ({type(error).__name__})", hint="check the file with onnxruntime", retryable=False
        ) from None
    first = wanted[0][0] if isinstance(wanted[0], tuple) else wanted[0]
    if session.get_providers()[0] != first:
        raise EngineFailed(
            f"onnxruntime has {first} and could not use it", hint="mend CUDA, or hide the GPU: CUDA_VISIBLE_DEVICES=''", retryable=False
        )
    return Session(session, "cuda" if first == _CUDA else "cpu", pass_seconds)
