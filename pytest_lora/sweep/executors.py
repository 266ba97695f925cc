"""Trials through any executor; what a dead worker loses is run again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

from pytest_lora.sweep.measure import first_line
from pytest_lora.sweep.rows import Failure, TrialRow
from pytest_lora.sweep.trial import run_trial

if TYPE_CHECKING:
    from pytest_lora.sweep.trial import Job


def run_all(executor: Executor | None, jobs: Sequence[Job]) -> Iterator[tuple[Job, TrialRow]]:
    """Run jobs and yield each with its row, as it finishes; in this process where there is no executor.

    A ``ProcessPoolExecutor`` breaks as a whole when one of its workers dies. It is made anew, and all that was not
    finished is run again: first side by side, and if the pool breaks again, one trial after another, so that the trial
    that kills its worker is known. That one becomes a failed row; no other is lost. Dask and the like start lost trials
    again themselves, and what they give up is a failed row too.
    """
    if executor is None:
        for job in jobs:
            yield job, run_trial(job)
        return
    waiting = list(jobs)
    with _Pool(executor) as pool:
        for _ in range(2):
            for job, row in pool.side_by_side(waiting):
                waiting.remove(job)
                yield job, row
            if not waiting:
                return
            if not pool.renew():
                break
        for job in waiting:
            yield job, pool.alone(job)


class _Pool:
    """The executor of the user, or the pool that took its place; only the latter is shut down here."""

    def __init__(self, executor: Executor) -> None:
        self.executor, self._own = executor, False

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._own:
            self.executor.shutdown(cancel_futures=True)

    def side_by_side(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, TrialRow]]:
        """Yield what finishes; jobs that a broken pool lost are left out."""
        futures: dict[Future[TrialRow], Job] = {}
        try:
            for job in jobs:
                future = self.executor.submit(run_trial, job)
                if not isinstance(future, Future):
                    raise TypeError(
                        f"executor must give futures of concurrent.futures, but {type(self.executor).__name__}.submit "
                        f"gave a {type(future).__name__}"
                    )
                futures[future] = job
        except BrokenExecutor:
            pass  # the futures so far say the same
        try:
            for future in as_completed(futures):
                error = future.exception()
                if isinstance(error, BrokenExecutor):
                    continue
                yield futures[future], _row(futures[future], future.result() if error is None else error)
        finally:
            for future in futures:
                future.cancel()

    def alone(self, job: Job) -> TrialRow:
        """Run one job with no other beside it; that it breaks the pool is its own failure."""
        try:
            return self.executor.submit(run_trial, job).result()
        except BrokenExecutor as error:
            self.renew()
            return _row(job, error)
        except Exception as error:
            return _row(job, error)

    def renew(self) -> bool:
        """Put a pool like the broken one in its place; False where it is none that can be made anew."""
        broken: Any = self.executor
        if not isinstance(broken, ProcessPoolExecutor):
            return False
        if self._own:
            broken.shutdown(wait=False, cancel_futures=True)
        self.executor = like(broken)
        self._own = True
        return True


def like(pool: Any) -> ProcessPoolExecutor:
    """A new pool with the settings of another, which the standard library keeps in private attributes."""
    return ProcessPoolExecutor(
        max_workers=pool._max_workers,
        mp_context=pool._mp_context,
        initializer=pool._initializer,
        initargs=pool._initargs,
        max_tasks_per_child=pool._max_tasks_per_child,
    )


def _row(job: Job, outcome: TrialRow | BaseException) -> TrialRow:
    if isinstance(outcome, TrialRow):
        return outcome
    said = f"{type(outcome).__name__}: {first_line(outcome)}"
    advice = "the system may have run out of memory: use fewer workers or a smaller batch"
    return job.plan.row(Failure("worker died", said, advice))
