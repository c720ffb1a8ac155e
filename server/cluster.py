"""Ray's processes: started or joined for a simulation, and ended with it."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from conf.exits import Exit, Stop
from conf.files import scratch_prefix
from conf.schema import Runtime, Settings

_SOCKET = 107 - len("/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store.123456")
"""Longest folder below which Ray's sockets still have room for their names."""


@contextmanager
def cluster(runtime: Runtime, *, preload: tuple[str, ...] = ()) -> Iterator[None]:
    """Ray for as long as the context lasts; nothing, where the runtime does not want it.

    Ray puts the working directory first where its workers look for modules, and another project's
    `client` would be taken for ours: inside, the working directory is an empty one. Paths must be absolute.

    Args:
        preload: modules that are imported while Ray starts.

    Raises:
        Stop: (`CONFIG`) no cluster answers at `runtime.ray_address`.
    """
    if runtime.name != "ray" or _running():
        yield
        return
    before = Path.cwd()
    folder = Path(tempfile.mkdtemp(prefix=scratch_prefix()))
    empty = folder / "empty"
    empty.mkdir()
    os.chdir(empty)
    # beside Ray's start, which is mostly waiting; an error in a module shows when it is imported again
    loader = threading.Thread(target=_load, args=(preload,), daemon=True)
    loader.start()
    import ray

    try:
        _start(runtime, folder)
        loader.join()
        yield
    finally:
        ray.shutdown()
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)


def absolute(settings: Settings) -> Settings:
    """The settings with paths that do not depend on the working directory."""
    data, run = settings.data, settings.run
    cache = data.cache and str(Path(data.cache).absolute())
    data = data.model_copy(update={"root": str(Path(data.root).absolute()), "cache": cache})
    run = run.model_copy(update={"dir": run.dir and str(Path(run.dir).absolute())})
    init = settings.init and str(Path(settings.init).absolute())
    return settings.model_copy(update={"data": data, "run": run, "init": init})


def _running() -> bool:
    """Whether this process is connected already."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _start(runtime: Runtime, folder: Path) -> None:
    import ray
    from ray.job_config import JobConfig

    # an actor that is given no GPU sees none: Ray announces that this will change
    warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
    # read when Ray starts its processes; workers at niceness 15 starve on a busy machine
    os.environ.update(RAY_worker_niceness="0", RAY_USAGE_STATS_ENABLED="0")
    paths = JobConfig(_py_driver_sys_path=[path for path in sys.path if Path(path).is_absolute()])
    if runtime.ray_address is not None:
        try:
            _answers(runtime.ray_address)
            ray.init(runtime.ray_address, job_config=paths, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            text = f"runtime.ray_address is {runtime.ray_address!r}; no cluster answers there: {error}"
            raise Stop(Exit.CONFIG, " ".join(text.split())) from None
        return
    ray.init(
        num_cpus=runtime.workers or os.cpu_count() or 1,
        include_dashboard=False,
        job_config=paths,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(folder) if len(str(folder)) <= _SOCKET else None,
    )


def _answers(address: str) -> None:
    """Ray itself would try for minutes.

    Raises:
        OSError, ValueError: nobody listens there.
    """
    host, separator, port = address.rpartition(":")
    if separator and "//" not in address:
        socket.create_connection((host, int(port)), timeout=10).close()


def _load(modules: tuple[str, ...]) -> None:
    for module in modules:
        import_module(module)
