"""Several processes that train one run together: they begin together, and none fails alone.

A process that ends with an error while the others wait for it in a collective would leave them
hanging. So it tells them first, through the key-value store of the coordinator; a thread in each
of the others listens there, repeats its line, and ends its process with the same exit code.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from lowdim_diffusion.cli.config import DistributedConfig
from lowdim_diffusion.cli.errors import CommandError, ExitCode, explain

__all__ = ["joined"]

_FAILED = "lowdim/failed"
_HEARD = "lowdim/heard"
_HEAR_S = 5
"""Longest time that a failing process waits for the others to have heard of it."""
_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "Connection closed")
"""Words of the runtime where a collective broke off."""


class _Failure(NamedTuple):
    process: int
    code: int
    line: str


@contextlib.contextmanager
def joined(config: DistributedConfig, name: str) -> Iterator[None]:
    """Be one of several processes while the block runs; leaving it waits for the others.

    Args:
        config: where the coordinator is; empty to find it by the cluster around.
        name: of the command, in front of an error that comes from another process.
    """
    from lowdim_diffusion import sharding

    patience = config.initialization_timeout or 300
    with _watched(patience, config, name):
        sharding.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            # The runtime gives up with an abort; our own line comes before it.
            initialization_timeout=patience + 60,
            heartbeat_timeout=config.heartbeat_timeout or 100,
        )
    import jax

    # Libraries of the runtime write to file descriptor 1 (Gloo); what we print goes past it.
    sys.stdout.flush()
    sys.stdout = open(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    client, process = _client(), jax.process_index()
    listener = threading.Thread(target=_listen, args=(client, process, name), daemon=True)
    listener.start()
    try:
        yield
        jax.distributed.shutdown()
        # It wakes up now; an interpreter that ends under its feet would abort.
        listener.join(10)
    except BaseException as error:
        found = _translated(error)
        code, line = explain(found)
        if not _tell(client, _Failure(process, code, line)):
            listener.join()  # another process failed first: its line and code are the run's
        # The runtime's own way out waits for processes that will not come.
        atexit.register(_end, code)
        raise found from error


@contextlib.contextmanager
def _watched(patience: int, config: DistributedConfig, name: str) -> Iterator[None]:
    """End the process with one line if the others are not there in time."""
    where = f" at {config.coordinator}" if config.coordinator else ""

    def give_up() -> None:
        _say(
            f"{name}: error: not all processes came together{where} within {patience} s; are all "
            "of them started, and can they reach process 0? More time: "
            "--distributed.initialization-timeout"
        )
        _end(ExitCode.PEER_LOST)

    timer = threading.Timer(patience, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _client() -> Any:
    # Not public, but the only channel beside the collectives; Orbax uses it too.
    from jax._src import distributed

    return distributed.global_state.client


def _translated(error: BaseException) -> BaseException:
    text = " ".join(str(error).split())
    if type(error).__name__ == "JaxRuntimeError" and any(word in text for word in _LOST):
        return CommandError(
            "lost another process of this run; the same command continues from the newest "
            f"checkpoint ({text[:120]})",
            ExitCode.PEER_LOST,
        )
    return error


def _tell(client: Any, mine: _Failure) -> bool:
    """Tell the others of a failure and wait until they heard; False if one had failed before."""
    if mine.process:
        # What went wrong in process 0 comes to the others as an error too, and may come first.
        with contextlib.suppress(Exception):
            client.blocking_key_value_get(_FAILED, 1000)
            return False
    try:
        client.key_value_set(_FAILED, json.dumps(mine))
        client.wait_at_barrier(_HEARD, _HEAR_S * 1000)
    except Exception as error:  # the coordinator is gone, or somebody will never hear
        return "ALREADY_EXISTS" not in str(error)
    return True


def _listen(client: Any, process: int, name: str) -> None:
    """Wait for another process's failure, for as long as the run lasts."""
    try:
        failure = _Failure(*json.loads(client.blocking_key_value_get(_FAILED, 10**9)))
    except Exception:  # the run has ended
        return
    if failure.process == process:
        return
    with contextlib.suppress(Exception):
        client.wait_at_barrier(_HEARD, _HEAR_S * 1000)
    _say(f"{name}: error: process {failure.process}: {failure.line}")
    _end(failure.code)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _end(code: int) -> typing.NoReturn:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)
