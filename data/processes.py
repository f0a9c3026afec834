"""Cases in processes of their own, one core each, which end with their parent."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from tqdm import tqdm

from data.files import InputError
from data.signals import set_handlers, signals_ignored


def open_pool(workers: int, cases: int) -> contextlib.AbstractContextManager:
    """Processes for `run_cases`, one core each; None for one worker. `workers` 0: one per core.

    Forked from a clean server, which loads the libraries once: forking after threads can hang.
    """
    workers = min(workers or os.cpu_count() or 1, cases)
    if workers <= 1:
        return one_core()
    forkserver = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows
    context = multiprocessing.get_context("forkserver" if forkserver else None)
    if forkserver:
        from multiprocessing.forkserver import ensure_running

        context.set_forkserver_preload(["data.check"])
        with signals_ignored():  # whoever is started in here ignores them from its first moment
            ensure_running()
    return ProcessPoolExecutor(workers, context, initializer=end_with_parent)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """torch's threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def end_with_parent() -> None:
    """A worker whose parent was killed must not go on writing; it keeps to one core.

    It leaves Ctrl-C and SIGTERM to its parent, which ends it.
    """
    set_handlers(signal.SIG_IGN)
    torch.set_num_threads(1)

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # a worker has one
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_cases(
    pool: ProcessPoolExecutor | None,
    work: Callable[..., dict[str, Any]],
    jobs: Sequence[Any],
    *arguments: Any,
    title: str,
) -> list[dict[str, Any]]:
    """`work(job, *arguments)` for each job, under one bar; results in the order of the jobs."""
    results, slices = {}, 0
    how: dict[str, Any] = {"total": len(jobs), "desc": title, "unit": "case", "disable": None}
    with tqdm(**how) as bar, workers_ended(pool, title):  # None: a bar on a terminal alone
        if pool is None:
            done = ((index, work(job, *arguments)) for index, job in enumerate(jobs))
        else:
            futures = {pool.submit(work, job, *arguments): i for i, job in enumerate(jobs)}
            done = ((futures[future], future.result()) for future in as_completed(futures))
        for index, result in done:
            results[index] = result
            slices += result.get("slices", 0)
            bar.set_postfix_str(f"{slices / (bar.format_dict['elapsed'] + 1e-9):.0f} slices/s")
            bar.update()
    return [results[index] for index in range(len(jobs))]


@contextlib.contextmanager
def workers_ended(pool: ProcessPoolExecutor | None, title: str) -> Iterator[None]:
    """Whatever ends the work before its time ends the workers too, and nobody waits for them."""
    try:
        yield
    except BaseException as error:
        if pool:
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
                process.join()
        if isinstance(error, BrokenProcessPool):
            raise InputError(
                f"{title}: a worker process was ended by the system, most likely for memory; run "
                "the same command again with fewer --workers, finished cases are kept"
            ) from error
        raise
