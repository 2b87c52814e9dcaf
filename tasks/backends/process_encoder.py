"""An encoder in a process of its own: a lost CUDA context, a hang or the OOM killer takes that process, not the run."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

from tasks.backends.allocator import allocator_environment
from tasks.backends.device_memory import limit_address_space
from tasks.backends.encoder import Encoder
from tasks.backends.processes import spawn_pool
from tasks.backends.torch_encoder import Classify, TorchEncoder
from tasks.errors import BallastError, DeviceError
from tasks.records import BatchOutcome, DeviceMemory, EncoderInfo, TokenIds

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """What to build in the child; picklable. `classify` travels by name: a function of a module."""

    model_path: str
    device: str
    classify: Classify
    precision: str = "auto"
    fraction: float = 1.0
    revision: str = ""
    threads: int | None = None
    profiles_memory: bool = False  # on a CPU: tell each micro-batch's peak
    address_space_bytes: int | None = None  # RLIMIT_AS, above the process's size once the model is loaded

    def __call__(self) -> Encoder:
        """Build the encoder, here and now: in the child."""
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        encoder = TorchEncoder(
            self.model_path,
            device=self.device,
            classify=self.classify,
            precision=self.precision,
            fraction=self.fraction,
            revision=self.revision,
            threads=self.threads,
            profiles_memory=self.profiles_memory,
        )
        if self.address_space_bytes is not None:
            encoder.describe()
            limit_address_space(self.address_space_bytes)
        return encoder

    def environment(self) -> dict[str, str]:
        """What must be set before torch is imported."""
        environment = {"TOKENIZERS_PARALLELISM": "false"}
        if self.device == "cpu":
            # A CPU worker that initialised CUDA would take some hundred MB of the card it is meant to relieve.
            environment["CUDA_VISIBLE_DEVICES"] = ""
            # OpenMP threads that wait in a loop take the cores from those that work: with two threads on two busy cores
            # MiniLM made 1,213 tokens a CPU second in batches of 1,024 tokens, and 2,824 when waiting threads sleep.
            environment["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
        else:
            environment.update(allocator_environment())
        if self.profiles_memory:
            environment["KINETO_LOG_LEVEL"] = "99"  # the profiler writes two lines a batch to stderr otherwise
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(self.threads)
        return environment


class ProcessEncoder:
    """Hosts what `factory` builds in a fresh spawned process, started at the first call. One caller at a time.

    A child that dies or outlasts `batch_timeout_s` gives a sticky outcome, and so does every encode after it until
    restart(). Other calls raise DeviceError then.
    """

    def __init__(
        self,
        factory: Callable[[], Encoder],
        *,
        environment: Mapping[str, str] | None = None,
        batch_timeout_s: float = 600.0,
        start_timeout_s: float = 900.0,
    ) -> None:
        """`factory` is called in the child and must pickle: an EncoderSpec, or a function of a module.

        start_timeout_s covers imports and the weights, from a network disk at worst.
        """
        self._factory = factory
        self._environment = dict(environment or {})
        if environment is None and isinstance(factory, EncoderSpec):
            self._environment = factory.environment()
        self._batch_timeout_s = batch_timeout_s
        self._start_timeout_s = start_timeout_s
        self._pool: ProcessPoolExecutor | None = None
        self._process: BaseProcess | None = None
        self._info: EncoderInfo | None = None
        self._lost = ""  # why the child is gone, until restart()
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The child's process id while it lives."""
        return self._process.pid if self._process is not None and self._process.is_alive() else None

    def describe(self) -> EncoderInfo:
        """Start the child and load the model there. Raises ModelError or DeviceError, with the child's reason."""
        if self._info is None:
            self._require_open()
            self._start()
            value = self._ask("describe", timeout_s=self._start_timeout_s)
            if isinstance(value, _Lost) and value.is_dead:
                self._forgive(value)
                self._start()
                value = self._ask("describe", timeout_s=self._start_timeout_s)
            if isinstance(value, _Lost):
                raise DeviceError(f"{value.reason}, while it loaded the model. Check the memory of device and host.")
            self._info = value
        return self._info

    def encode(self, token_ids: Sequence[TokenIds]) -> BatchOutcome:
        """Embed one micro-batch in the child."""
        self._require_open()
        if self._lost:
            return BatchOutcome("sticky", message=f"{self._lost}; restart() the encoder")
        self.describe()
        value = self._ask("encode", list(token_ids), timeout_s=self._batch_timeout_s)
        if isinstance(value, _Lost):
            return BatchOutcome("sticky", message=value.reason)
        outcome: BatchOutcome = value
        return outcome

    def read_memory(self) -> DeviceMemory:
        """The device's memory as the child sees it. Raises DeviceError where the child is gone."""
        memory: DeviceMemory = self._call("read_memory")
        return memory

    def release_memory(self) -> None:
        """Collect garbage and give cached blocks back, in the child. A child that is gone has given back everything."""
        if self._pool is not None and not self._lost:
            self._call("release_memory")

    def restart(self) -> None:
        """A fresh process in place of the old one; the model loads at the next call. Raises DeviceError if closed."""
        self._require_open()
        logger.warning("restart_encoder pid=%s reason=%r", self.pid, self._lost or "asked for")
        self._stop(kill=True)
        self._lost = ""
        self._info = None
        self._start()

    def close(self) -> None:
        """End the child; whatever device memory it took is free afterwards."""
        self._closed = True
        self._stop(kill=False)

    # ------------------------------------------------------------------------------------------ the child

    def _require_open(self) -> None:
        if self._closed:
            raise DeviceError("This encoder is closed. Build a new one.")

    def _call(self, method: str) -> Any:
        self._require_open()
        if self._lost:
            raise DeviceError(f"{self._lost}. restart() the encoder.")
        self.describe()
        value = self._ask(method, timeout_s=self._batch_timeout_s)
        if isinstance(value, _Lost):
            raise DeviceError(f"{value.reason}. restart() the encoder.")
        return value

    def _start(self) -> None:
        if self._lost:
            raise DeviceError(f"{self._lost}. restart() the encoder.")
        if self._pool is not None:
            return
        lost, advice = self._start_child()
        if lost is not None and lost.is_dead:
            self._forgive(lost)
            lost, advice = self._start_child()
        if lost is not None:
            raise DeviceError(f"{lost.reason}, {advice}")

    def _start_child(self) -> tuple[_Lost | None, str]:
        """A child with its encoder built; where it was lost, how, and when with what to do about it."""
        self._pool = spawn_pool(1, environment=self._environment, initializer=_ignore_interrupts)
        pid = self._wait(self._pool.submit(os.getpid), self._start_timeout_s)
        if isinstance(pid, _Lost):
            return pid, "before it could do anything. Is Python itself usable there?"
        # Killed meanwhile, it is among the active ones no more: the next question to it tells.
        self._process = next((child for child in multiprocessing.active_children() if child.pid == pid), None)
        value = self._ask("", self._factory, timeout_s=self._start_timeout_s)
        lost = value if isinstance(value, _Lost) else None
        return lost, "while it was set up. Check the memory of device and host."

    def _forgive(self, lost: _Lost) -> None:
        """Let it be started once more: one that somebody killed as it started is no sign that it can't live."""
        logger.warning("start_encoder again reason=%r", lost.reason)
        self._lost = ""

    def _ask(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """What the encoder in the child answers, or _Lost. Raises BallastErrors; all others become DeviceErrors."""
        if self._lost or self._pool is None:
            return _Lost(self._lost or "The device process was not started")
        try:
            future = self._pool.submit(_answer, method, *arguments)
        except BrokenProcessPool:
            return self._lose("died while it was idle", kill=False)
        return self._wait(future, timeout_s)

    def _wait(self, future: Future[Any], timeout_s: float) -> Any:
        try:
            error = future.exception(timeout=timeout_s)
        except TimeoutError:
            return self._lose(f"did not answer within {timeout_s:g} s and was killed", kill=True)
        if error is None:
            return future.result()
        if isinstance(error, BrokenProcessPool):
            return self._lose("died", kill=False)
        if isinstance(error, BallastError):
            raise error
        # Not the exception itself, whatever its type holds: its words, and where in the child it was raised.
        raise DeviceError(f"The device process failed: {type(error).__name__}: {error}\n{error.__cause__ or ''}")

    def _lose(self, how: str, *, kill: bool) -> _Lost:
        pid = self._process.pid if self._process is not None else None
        exitcode = self._stop(kill=kill)
        self._lost = f"The device process (pid {pid}) {how}{'' if kill else _explain_exit(exitcode)}"
        return _Lost(self._lost, is_dead=not kill)

    def _stop(self, *, kill: bool) -> int | None:
        """End the child and its pool's thread; the child's exit code, negative for a signal, None if not known."""
        process, pool = self._process, self._pool
        self._process = self._pool = None
        if pool is None:
            return None
        if kill and process is not None:
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        if process is None:
            return None
        process.join(CLOSE_TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join(CLOSE_TIMEOUT_S)
        pool.shutdown(wait=True)
        return process.exitcode


@dataclass(frozen=True, slots=True)
class _Lost:
    """In place of an answer: the child is gone."""

    reason: str
    is_dead: bool = False  # it died; else it hung and was killed, or never was


def _explain_exit(exitcode: int | None) -> str:
    if exitcode is None:
        return ""
    if exitcode >= 0:
        return f" with exit code {exitcode}"
    name = signal.Signals(-exitcode).name
    return f" by {name}" + (" (the kernel's OOM killer, or somebody)" if name == "SIGKILL" else "")


def _ignore_interrupts() -> None:
    # Ctrl-C reaches the whole process group; the parent decides when the child ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# The child's encoder: a pool's worker has no other place for what outlives a call. Never set in the parent.
_hosted: Encoder | None = None


def _answer(method: str, *arguments: Any) -> Any:
    """Runs in the child: build the encoder for the empty method, else call it."""
    global _hosted
    if method == "":
        _hosted = arguments[0]()
        return None
    if _hosted is None:
        raise DeviceError("The device process has no encoder.")
    return getattr(_hosted, method)(*arguments)
