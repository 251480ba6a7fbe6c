"""The worker: the thread that runs batches. The engine's thread hands it what a pass gave, and waits for nothing."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

from runner.errors import BloomdeskError, explained
from runner.generation.capacity import MOST_AT_A_TIME
from runner.server.engine import Engine, Growth, PassFailed, Stopped, Unavailable
from runner.server.jobs.batches import Batch, Batches
from runner.server.jobs.files import Files
from runner.server.jobs.job import Job, OtherModel
from runner.server.jobs.work import LineWork
from runner.server.settings import Settings

THREAD_NAME = "jobs"
# Requests of lines that the engine has, so that each pass can be full.
MOST_OPEN = 2 * MOST_AT_A_TIME
# Seconds between looks at a model that is loading.
LOOK = 0.2
# Seconds before something that failed is tried again: the first time, the most, and after a pass that failed.
FIRST_WAIT, LONGEST_WAIT, PASS_WAIT = 1.0, 60.0, 10.0

Told = tuple[Job, LineWork, Sequence[Growth], BloomdeskError | None]


class Worker:
    """Runs batches in the order in which they were made. `add`, `wake` and `stop` may be called from any thread."""

    def __init__(
        self,
        engine: Engine,
        files: Files,
        batches: Batches,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._files, self._batches, self._settings = engine, files, batches, settings
        self._clock = clock
        self._changed = threading.Condition()
        self._inbox: list[Told] = []
        self._is_awake, self._is_stopping = True, False
        self._jobs = [self._job(batch) for batch in batches.all() if batch.is_running]
        # When those that failed are tried again, and how long they have waited for that.
        self._waits: dict[Job, tuple[float, float]] = {}
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, batch: Batch) -> None:
        """Run a new batch."""
        with self._changed:
            self._jobs = [*self._jobs, self._job(batch)]
        self.wake()

    def wake(self) -> None:
        """Look at the batches again."""
        with self._changed:
            self._is_awake = True
            self._changed.notify()

    def stop(self) -> None:
        """End, once what the engine has given is on the disk; call it when the engine has ended."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Whether the thread has ended, after waiting up to `timeout` seconds for it."""
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _job(self, batch: Batch) -> Job:
        return Job(batch, self._files, self._batches, self._settings, self._tell)

    def _tell(self, *told: object) -> None:
        with self._changed:
            self._inbox.append(told)
            self._changed.notify()

    def _run(self) -> None:
        timeout = None
        while True:
            told, is_last = self._wait(timeout)
            for job, work, growths, failure in told:
                self._guarded(job, lambda job=job, rest=(work, growths, failure): job.take(*rest))
            if is_last:
                break
            timeout = self._go_on()
        for job in self._jobs:
            self._guarded(job, job.write)
            job.close()

    def _wait(self, timeout: float | None) -> tuple[list[Told], bool]:
        """What was told, and whether the thread shall end; waits for something to happen."""
        with self._changed:
            if not (self._inbox or self._is_awake or self._is_stopping):
                self._changed.wait(timeout)
            told, self._inbox, self._is_awake = self._inbox, [], False
            return told, self._is_stopping

    def _go_on(self) -> float | None:
        """Take a step of each batch; seconds until the next that needs no event, or None."""
        now = self._clock()
        room = MOST_OPEN - sum(job.requests for job in self._jobs)
        for job in self._jobs:
            if job in self._waits and now < self._waits[job][0] and not self._is_cancelled(job):
                continue
            before = job.requests
            self._guarded(job, lambda job=job, room=room: self._step(job, room))
            room -= max(0, job.requests - before)
        with self._changed:
            self._jobs = [job for job in self._jobs if job.batch.is_running]
        self._waits = {job: wait for job, wait in self._waits.items() if job in self._jobs}
        if any(job.is_impatient and job not in self._waits for job in self._jobs):
            return 0.0
        soonest = min((at for at, _ in self._waits.values()), default=math.inf)
        return max(0.0, soonest - self._clock()) if soonest < math.inf else None

    def _step(self, job: Job, room: int) -> None:
        try:
            job.go_on(self._engine, room)
        finally:
            job.tell_progress()
        self._waits.pop(job, None)
        if job.paused:
            job.paused = None
            job.tell_progress()

    def _is_cancelled(self, job: Job) -> bool:
        return self._batches.get(job.batch.id).status != job.batch.status

    def _guarded(self, job: Job, act: Callable[[], None]) -> None:
        """Act; what fails pauses the batch, which is tried again later."""
        try:
            act()
        except Stopped:
            pass
        except Unavailable as error:
            self._pause(job, error.message, LOOK)
        except OtherModel as error:
            self._pause(job, error.message, math.inf)
        except PassFailed as error:
            self._pause(job, error.message, PASS_WAIT)
        except BloomdeskError as error:
            self._pause(job, error.message)
        except (OSError, MemoryError) as error:
            why = explained(error)[0]
            self._pause(job, f"{why}; it goes on when that is over")
        except Exception as error:
            self._pause(job, f"unexpected {type(error).__name__}: {error}")

    def _pause(self, job: Job, why: str, wait: float | None = None) -> None:
        job.paused = why
        job.tell_progress()
        last = self._waits.get(job, (0.0, 0.0))[1]
        wait = min(LONGEST_WAIT, max(FIRST_WAIT, 2 * last)) if wait is None else wait
        self._waits[job] = self._clock() + wait, wait
