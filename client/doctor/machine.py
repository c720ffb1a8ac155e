"""The machine: versions, GPU, disk, memory, limits."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from client.doctor.finding import Finding, ok, problem, warning

if TYPE_CHECKING:
    from client.sitefile import SiteFile

_GIB = 2**30
_FLOWER = "1.41.0"  # client.fleet works with this version alone
_LOOK = """
import json, torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"torch": torch.__version__, "gpus": [[g.name, g.total_memory] for g in gpus]}))
"""


def python(_: SiteFile) -> Finding:
    """The interpreter and the packages whose version matters."""
    found = f"Python {sys.version.split()[0]}"
    install = "install into an environment of its own: pip install -c constraints.txt wardround"
    try:
        flower, torch = version("flwr"), version("torch")
    except PackageNotFoundError as error:
        return problem(f"{found}, but no {error.name}", install)
    if flower != _FLOWER:
        return problem(f"{found}, flwr {flower}; need {_FLOWER}", install)
    return ok(f"{found}, flwr {flower}, torch {torch}")


def gpu(site: SiteFile) -> Finding:
    """The device that site.yaml names, in a process of its own: torch takes seconds and memory."""
    try:
        done = subprocess.run(  # noqa: S603  this interpreter, and a constant
            [sys.executable, "-c", _LOOK], capture_output=True, text=True, timeout=180, check=True
        )
        seen = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return problem(
            f"torch does not start ({type(error).__name__})", "install it again, for this GPU's driver"
        )
    gpus = [f"{name} with {memory / _GIB:.0f} GiB" for name, memory in seen["gpus"]]
    kind, _, number = site.device.partition(":")
    if kind == "cpu":
        return ok("device: cpu, as site.yaml says")
    if kind not in ("auto", "cuda"):
        return problem(f"device {site.device!r} in site.yaml", "accepted is auto, cpu, cuda, cuda:0, …")
    if not gpus and kind == "auto":
        return warning(
            "no GPU: training runs on the processor", "install the GPU's driver and torch for CUDA"
        )
    if len(gpus) <= int(number or 0):
        remedy = "install the GPU's driver and torch for CUDA, or set device: auto"
        return problem(f"device {site.device} in site.yaml, but {len(gpus)} GPUs are seen", remedy)
    return ok(", ".join(gpus))


def disk(site: SiteFile) -> Finding:
    """Room for cache and state."""
    free = {path: shutil.disk_usage(_standing(path)).free for path in (site.cache, site.state)}
    path, least = min(free.items(), key=lambda item: item[1])
    seen = f"{least / _GIB:.1f} GiB free for {path}"
    if least < _GIB:
        return problem(
            seen, "free space, or move cache and state in site.yaml: an update alone can take 1 GiB"
        )
    if least < 10 * _GIB:
        return warning(seen, "free space: a cache is about as large as its images")
    return ok(seen)


def memory(_: SiteFile) -> Finding:
    """What this process could take: of the machine, its control group, its limit."""
    room = _room()
    seen = f"{room / _GIB:.1f} GiB of memory available"
    if room < 2 * _GIB:
        return problem(
            seen, "stop other programs, or raise the service's limit: training needs 2 GiB and more"
        )
    if room < 8 * _GIB:
        return warning(seen, "8 GiB and more are better: large volumes will not fit")
    return ok(seen)


def files(_: SiteFile) -> Finding:
    """Files that a process may hold open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    seen = f"{soft} files may be open at a time"
    remedy = f"LimitNOFILE=4096 in the service, or ulimit -n 4096 (hard limit {hard})"
    if soft < 256:
        return problem(seen, remedy)
    return warning(seen, remedy) if soft < 1024 else ok(seen)


def _standing(path: Path) -> Path:
    """The nearest folder above that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


def _room() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    facts = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    rooms = [facts["MemAvailable"]]
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            rooms.append(int(most) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no control group of the second version
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    if soft != resource.RLIM_INFINITY:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
        rooms.append(soft - taken)
    return max(min(rooms), 0)
