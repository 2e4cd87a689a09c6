"""Where cells are evaluated: in this process, in processes of this machine, or on a cluster."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from symmetrize.errors import InvalidInputError, MissingDependencyError

#: Takes and returns plain JSON.
Task = Callable[[dict[str, Any]], dict[str, Any]]

#: Libraries read these once, when they are loaded. torch's profiler, which counts memory, reports on itself otherwise.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "KINETO_LOG_LEVEL": "99",
}


class Workers(ABC):
    """Something that carries out tasks; a context manager that stops them when it is left."""

    #: How many tasks it takes at a time.
    capacity: int = 1

    @abstractmethod
    def submit(self, task: Task, spec: dict[str, Any]) -> Future[dict[str, Any]]:
        """Start a task."""

    @abstractmethod
    def close(self) -> None:
        """Stop everything, unfinished tasks included."""

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *details: Any) -> None:
        self.close()


class Here(Workers):
    """This process, one task after the other."""

    def submit(self, task: Task, spec: dict[str, Any]) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        try:
            future.set_result(task(spec))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Nothing is left behind."""


class Processes(Workers):
    """Processes of this machine, each with one thread.

    Each is an executor of its own: where a process dies, of whatever, it takes no other task along.

    Parameters
    ----------
    n_workers : int
    """

    def __init__(self, n_workers: int) -> None:
        self.capacity = n_workers
        self._idle: list[ProcessPoolExecutor] = []
        self._busy: dict[Future[dict[str, Any]], ProcessPoolExecutor] = {}

    def submit(self, task: Task, spec: dict[str, Any]) -> Future[dict[str, Any]]:
        self._collect()
        pool = self._idle.pop() if self._idle else _new_process()
        with _environment():
            future: Future[dict[str, Any]] = pool.submit(task, spec)
        self._busy[future] = pool
        return future

    def close(self) -> None:
        for pool in [*self._idle, *self._busy.values()]:
            _stop(pool)
        self._idle, self._busy = [], {}

    def _collect(self) -> None:
        """Processes whose task is done are free again, unless they are dead."""
        for future, pool in list(self._busy.items()):
            if future.done():
                del self._busy[future]
                if future.cancelled() or isinstance(future.exception(), BrokenProcessPool):
                    _stop(pool)
                else:
                    self._idle.append(pool)


class Cluster(Workers):
    """A cluster, through the scheduler of dask.distributed.

    Its workers need this package, and the files of the study under the paths that they have here.

    Parameters
    ----------
    address : str
        Of the scheduler, such as ``"tcp://host:8786"``.

    Raises
    ------
    MissingDependencyError
        dask.distributed is not installed.
    InvalidInputError
        No scheduler answers.
    """

    def __init__(self, address: str, timeout: float = 30.0) -> None:
        try:
            from dask.distributed import Client
        except ImportError as error:
            raise MissingDependencyError(
                "scheduler: a cluster needs dask.distributed; install it with: pip install 'torch-symmetrize[cluster]'"
            ) from error
        try:
            self._client = Client(address, timeout=timeout, set_as_default=False)
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"scheduler: expected one at {address!r}, got no answer: {error}") from error
        # A task that takes its process down is not tried on every other worker. Tasks are functions of their
        # specification; the name of one that failed must not stand for its next attempt.
        self._executor = self._client.get_executor(retries=0, pure=False)
        self.capacity = max(1, sum(self._client.nthreads().values()))

    def submit(self, task: Task, spec: dict[str, Any]) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = self._executor.submit(task, spec)
        return future

    def close(self) -> None:
        self._executor.shutdown(wait=False)
        self._client.close()


def default_workers() -> int:
    """Two, or as many as there are cores for this process."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return min(2, cores)


def make_workers(n_workers: int | None, scheduler: str | None) -> Workers:
    """As the arguments of `run_study` say.

    Raises
    ------
    InvalidInputError
        For a negative number of workers.
    """
    if scheduler is not None:
        return Cluster(scheduler)
    n_workers = default_workers() if n_workers is None else n_workers
    if n_workers < 0:
        raise InvalidInputError(f"workers: expected zero (this process) or a positive number, got {n_workers}")
    return Here() if n_workers == 0 else Processes(n_workers)


def _new_process() -> ProcessPoolExecutor:
    # Forked processes would inherit torch's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_initialize)


def _initialize() -> None:
    import torch

    torch.set_num_threads(1)
    # Of the terminal: it reaches all processes, and the one that started them ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process whose parent was killed would otherwise wait for the next task for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


@contextmanager
def _environment() -> Iterator[None]:
    """That of a process that is started here."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _stop(pool: ProcessPoolExecutor) -> None:
    # There is no public way to end a process in the middle of a task before Python 3.14.
    processes = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
    for process in processes:
        process.join(timeout=5.0)
