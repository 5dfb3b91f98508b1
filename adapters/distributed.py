"""Where this process stands in a launch of several, and the few things the processes say to each other."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import PosthocError

T = TypeVar("T")
_HEARTBEAT = 5.0  # seconds between collectives while others wait: far below the time-out of any process group


@dataclass(frozen=True)
class Launch:
    """The processes that were started together: this one's `rank` among `world`."""

    rank: int
    world: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs `work` in the main process only; every process gets its result, or its exception.

        Every process of the launch must call this. The others wait in short collectives, so `work` may take longer
        than the time-out of the process group (30 minutes with gloo, 10 with NCCL).
        """
        if self.world == 1:
            return work()
        from accelerate.utils import broadcast_object_list

        def tell(message: tuple[str, Any]) -> tuple[str, Any]:
            return broadcast_object_list([message], from_process=0)[0]

        if not self.is_main:
            while (message := tell(("", None)))[0] == "wait":
                pass
        else:
            with ThreadPoolExecutor(1) as pool:
                message = self._await(pool.submit(work), tell)
        if message[0] == "error":
            raise message[1]
        return message[1]

    @staticmethod
    def _await(future: Any, tell: Callable[[tuple[str, Any]], tuple[str, Any]]) -> tuple[str, Any]:
        while True:
            try:
                return tell(("done", future.result(timeout=_HEARTBEAT)))
            except FutureTimeout:
                if future.done():  # `work` itself raised a TimeoutError
                    return tell(("error", future.exception()))
                tell(("wait", None))
            except PosthocError as error:
                return tell(("error", error))
            except Exception as error:
                tell(("error", PosthocError(f"the main process failed: {error!r}")))
                raise

    def barrier(self) -> None:
        """Waits until every process of the launch is here."""
        if self.world > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def check_launch() -> Launch:
    """This process's place in the launch, through accelerate; call it before anything is written.

    Raises PosthocError when WORLD_SIZE says that several processes were started but accelerate sees one: each of them
    would believe itself alone, and all would write the same files.
    """
    promised = int(os.environ.get("WORLD_SIZE") or 1)
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    fresh = not PartialState._shared_state
    # Without a launch nothing is initialised: the caller may still want to build an Accelerator with other options.
    if promised == 1 and fresh:
        return Launch(0, 1)
    # A launch numbers its processes; without a number some versions of accelerate see one process, some fail.
    state = None
    if not fresh or "RANK" in os.environ:
        # Accelerator reads this variable itself, PartialState does not.
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if state is None or (promised > 1 and state.num_processes == 1):
        raise PosthocError(
            f"WORLD_SIZE is {promised}, but accelerate sees one process: each of the {promised} would believe itself "
            "alone and write the same files. On CPU start with `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
            f"--num_processes {promised} -m MODULE`; on GPU check that each process sees its device; for one process "
            "unset WORLD_SIZE."
        )
    return Launch(state.process_index, state.num_processes)
