"""How fast a local step is on a GPU, beside what the device can do: the product's own loop on its own tasks.

    python bench/gpu.py [--device cuda|cpu] [--steps 30] [--small] [--precision auto|float32|bfloat16]

Times steps by the device's own events. Against them: bandwidth of a copy on the device and rate of a large
matrix product, both measured here. A step's operations are counted by torch; its traffic is the least it can
be: weights, gradients and moments once each way, what is saved for the backward pass once each way. Then the
exact sum on the device, checked against the CPU's bits. `--small` is for trying this script on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from row import row
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from client.policy import Policy
from client.train import Archive, Bench, Session
from conf.schema import Plan, Section
from conf.table import STRICT
from strategies.exact import Sum
from strategies.protocol import Instruction, Spec, Update
from tasks import TASKS
from tasks.base import Batch, Case, Phase, Prediction, Summed, Task
from tasks.data.cache import Entry
from tasks.metrics import Statistics

WIDE = {False: 4096, True: 64}


@dataclass(frozen=True)
class Classes(Task):
    """Ten classes from images (w1: a small CNN) or vectors (w3: 25 M parameters)."""

    __pydantic_config__: ClassVar = STRICT
    model: Section
    loss: Section
    work: str
    small: bool = False

    @property
    def phases(self) -> tuple[Phase, ...]:
        def loss(model: nn.Module, batch: Batch | None) -> Tensor:
            assert batch is not None
            return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

        return (Phase("train", loss),)

    def build_model(self) -> nn.Module:
        if self.work == "w1":
            first = nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
            second = nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
            return nn.Sequential(*first, *second, nn.Linear(512, 90), nn.ReLU(), nn.Linear(90, 10))
        wide = WIDE[self.small]
        layers = nn.Linear(256, wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU()
        return nn.Sequential(*layers, nn.Linear(wide, 1792), nn.ReLU(), nn.Linear(1792, 10))

    def prepare(self, case: Case) -> dict[str, Tensor]:
        image = case.images["image"]
        return {
            "x": image if self.work == "w1" else image.flatten()[:256],
            "y": torch.tensor(int(case.key) % 10),
        }

    def batch(self, examples: Sequence[Mapping[str, Tensor]], draw: torch.Generator) -> Batch:
        return {key: torch.stack([example[key] for example in examples]) for key in "xy"}

    def predict(self, model: nn.Module, case: Case) -> Prediction:
        raise NotImplementedError

    def score(self, cases: Sequence[Case], predictions: Sequence[Prediction]) -> Statistics:
        raise NotImplementedError

    def statistics(self) -> Statistics:
        raise NotImplementedError

    def trivial(self) -> Mapping[str, Summed]:
        return {}


TASKS._entries["bench_classes"] = "gpu:Classes"


def works(small: bool) -> dict[str, tuple[Section, Section, int, tuple[int, ...]]]:
    """Task, model, batch and sides of an image, by name."""

    def maps(*patch: int) -> Section:
        change = {"rotation": 10.0, "scaling": 0.1, "noise": 0.1, "gamma": 0.2}
        return Section(name="segmentation", classes=["nothing", "disc"], patch=list(patch), **change)

    def classes(work: str) -> Section:
        return Section(name="bench_classes", work=work, small=small)

    none, unet = Section(name="none"), Section(name="unet", channels=[16, 32, 64, 128])
    flat, deep = ((32, 32), (16, 16, 16)) if small else ((128, 128), (96, 96, 96))
    wide = Section(name="unet", channels=[8, 16] if small else [32, 64, 128, 256])
    return {
        "w1 small CNN, batch 16": (classes("w1"), none, 16, (28, 28)),
        "w2 2D U-Net, batch 8": (maps(*flat), unet, 8, flat),
        "w3 25 M parameters, batch 2": (classes("w3"), none, 2, (28, 28)),
        "3D U-Net, batch 2": (maps(*deep), wide, 2, deep),
    }


def case(number: int, sides: tuple[int, ...]) -> Case:
    draw = torch.Generator().manual_seed(number)
    image = torch.randn(1, *sides, generator=draw)
    masks = {"mask": (image[0] > 1).to(torch.uint8)}
    return Case(str(number), str(number), {"image": image}, torch.eye(4).double(), (1.0,) * len(sides), masks)


class Clock:
    """Moments on the device, or on the CPU's clock where it is the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moments: list[torch.cuda.Event | float] = []

    def __call__(self) -> None:
        if self.device.type == "cpu":
            self.moments.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.moments.append(event)

    def seconds(self) -> list[float]:
        """Between each two moments."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        pairs = zip(self.moments, self.moments[1:], strict=False)
        return [b - a if isinstance(b, float) else a.elapsed_time(b) / 1e3 for a, b in pairs]


def best(device: torch.device, step: Callable[[], object], times: int = 8) -> float:
    """Seconds of the fastest of a few."""
    clock = Clock(device)
    for _ in range(times):
        clock()
        step()
    clock()
    return min(clock.seconds()[2:])


def roofs(device: torch.device, small: bool) -> dict[str, float]:
    """What the device can do: bytes a second of a copy, there and back; operations a second of a product."""
    a, b = (torch.ones(2**20 if small else 2**28, device=device) for _ in range(2))
    found = {"copy": 2 * a.nbytes / best(device, lambda: a.copy_(b))}
    side = 256 if small else 8192
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(side, side, device=device).to(dtype)
        found[str(dtype).partition(".")[2]] = 2 * side**3 / best(device, lambda x=x: x @ x)
    row("device copy, read and written", found["copy"] / 1e9, "GB/s")
    row("matrix product, float32", found["float32"] / 1e12, "TFLOP/s")
    row("matrix product, bfloat16", found["bfloat16"] / 1e12, "TFLOP/s")
    return found


def work(name: str, device: torch.device, asked: argparse.Namespace, roof: Mapping[str, float]) -> None:
    """Steps of one workload through a session of the product's own."""
    task, model, batch, sides = works(asked.small)[name]

    def session(steps: int) -> Session:
        plan = Plan(
            task=task,
            model=model,
            loss=Section(name="dice_ce"),
            strategy=Section(name="fedavg"),
            local={"steps": steps, "batch_size": batch, "optimizer": "adamw", "precision": asked.precision},
        )
        said = Instruction("bench", 1, 0, "train", "a", None, plan.digest, "", "")
        return Session(bench, bench.study(plan)[0], archive, Policy(minimum_cell=1), said, {}, {})

    bench = Bench(str(device))
    cases = {str(n): case(n, sides) for n in range(2 * batch)}
    entries = tuple(Entry(k, k, "a", "train", k, (), {}, k) for k in cases)
    archive = Archive({"train": entries}, lambda entry: cases[entry.key])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(device)
    here = session(asked.steps)
    initial = here.study.initial
    bench.halt = clock
    here.fit(initial)
    clock()
    took = statistics.median(clock.seconds()[asked.steps // 3 :])
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0

    # counted apart: both counters cost time
    bench.halt = lambda: None
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    one = session(1)
    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        one.fit(initial)
    weights = 4 * sum(t.numel() for t in initial.values())
    # Adam: weights and two moments read and written, gradients written and read, weights read twice more
    traffic = (6 + 2 + 2) * weights + 2 * max(0, sum(kept.values()) - weights)
    flops, half = counter.get_total_flops(), asked.precision != "float32" and device.type == "cuda"
    rate = roof["bfloat16" if half or asked.precision == "bfloat16" else "float32"]
    row(f"{name}: step", 1e3 * took, "ms")
    row(
        f"{name}: arithmetic",
        flops / took / 1e12,
        "TFLOP/s",
        note=f"{flops / took / rate:.1%} of the product",
    )
    row(
        f"{name}: least traffic",
        traffic / took / 1e9,
        "GB/s",
        note=f"{traffic / took / roof['copy']:.1%} of a copy",
    )
    if peak:
        row(f"{name}: peak memory", peak, "GB")


def fold(device: torch.device, small: bool) -> bool:
    """The exact sum, on the device: same bits as on the CPU, and how fast."""
    size = 2**16 + 3 if small else 25_000_000
    spec = Spec({"delta/w": ((size,), torch.float32)}, max_weight=4096, max_value=64.0)
    draw = torch.Generator().manual_seed(1)
    values = [torch.randn(size, generator=draw) for _ in range(3)]
    rings = {}
    for where in (torch.device("cpu"), device):
        moved = [Update({"delta/w": v.to(where)}, weight=5 + i) for i, v in enumerate(values)]
        with where:
            partial = Sum().start(spec)
            for i, update in enumerate(moved):
                Sum().add(partial, spec, str(i), (1, 0), update)
            if where == device:
                more = Sum().start(spec)
                Sum().add(more, spec, "0", (1, 0), moved[0])
                took = best(where, lambda: Sum().add(more, spec, "1", (1, 0), moved[1]))  # noqa: B023
        rings[where.type] = Sum().finish(partial, spec).ring.cpu()
    row("exact sum on the device", 4 * size / took / 1e9, "GB/s", note="of updates, without the check")
    same = bool(rings["cpu"].equal(rings[device.type]))
    return row("exact sum: values that differ from the CPU's", float(not same), "", 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here (torch.cuda.is_available() is false): nothing measured")
        return
    device = torch.device(asked.device)
    print(torch.cuda.get_device_name() if device.type == "cuda" else "CPU", torch.__version__, flush=True)
    roof = roofs(device, asked.small)
    for name in works(asked.small):
        work(name, device, asked, roof)
    raise SystemExit(not fold(device, asked.small))


if __name__ == "__main__":
    main()
