"""Timing of encoders for `bench_encoder.py`: rounds in which all take turns, and a step part by part."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

Forward = Callable[[], Tensor]
Name = TypeVar("Name")
FORWARD, STEP = "forward", "forward + backward"
# Ranges of a forward pass, from the innermost out, in the order of the picture.
EMBED, MERGE, BLOCKS, SCATTER = "embedding, encodings", "merging", "blocks", "scatter"
PRODUCTS, ATTENTION, REST = "matrix products", "attention", "other"
PARTS = (
    EMBED,
    MERGE,
    *(f"{BLOCKS}: {what}" for what in (PRODUCTS, ATTENTION, REST)),
    SCATTER,
)


def seconds(call: Callable[[], object], device: str) -> float:
    """CPU seconds of one thread, which other work on the machine hardly changes; else wall time."""
    clock = (
        time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    )
    _wait(device)
    begin = clock()
    call()
    _wait(device)
    return clock() - begin


def numbers(device: str) -> torch.autocast:
    """bf16 on a GPU, float32 on a CPU."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def step(forward: Forward, device: str) -> None:
    """Forward, a loss of all outputs, backward."""
    with numbers(device):
        loss = forward().float().square().mean()
    loss.backward()


def taking_turns(
    contenders: Mapping[Name, tuple[nn.Module, Forward]], rounds: int, device: str
) -> dict[Name, dict[str, list[float]]]:
    """Seconds of every round, by contender and `FORWARD` or `STEP`; a first round does not count.

    The order turns round from one round to the next.
    """
    found: dict[Name, dict[str, list[float]]] = {
        name: {FORWARD: [], STEP: []} for name in contenders
    }
    for number in range(rounds + 1):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            module, forward = contenders[name]
            with torch.no_grad(), numbers(device):
                taken = {FORWARD: seconds(forward, device)}
            module.zero_grad(set_to_none=True)
            taken[STEP] = seconds(partial(step, forward, device), device)
            module.zero_grad(set_to_none=True)
            for what, time_taken in taken.items() if number else ():
                found[name][what].append(time_taken)
    return found


def median_ratio(one: list[float], other: list[float]) -> float:
    """Of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


@contextmanager
def ranges(methods: Mapping[str, tuple[object, str]]) -> Iterator[None]:
    """Name what is done in methods (object, its name), so that a profile shows it."""
    saved = {name: getattr(owner, method) for name, (owner, method) in methods.items()}
    for name, (owner, method) in methods.items():
        object.__setattr__(owner, method, _in_range(name, saved[name]))
    try:
        yield
    finally:
        for owner, method in methods.values():
            object.__delattr__(owner, method)


def _in_range(name: str, call: Callable[..., object]) -> Callable[..., object]:
    def ranged(*args: object, **kwargs: object) -> object:
        with record_function(name):
            return call(*args, **kwargs)

    return ranged


def parts_of(
    run: Callable[[], object], methods: Mapping[str, tuple[object, str]], repeats: int
) -> dict[str, float]:
    """Share of every part in a step, forward and backward: ranges, blocks by kind of operator.

    Backward operators count for the range of the forward operator that they belong to, which torch tells
    by its number. Only for the CPU.
    """
    run()
    with ranges(methods), profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(repeats):
            run()
    times = _by_part(list(profiled.events()), set(methods))
    total = sum(times.values())
    return {part: times[part] / total for part in (*PARTS, REST)}


def _by_part(events: list[FunctionEvent], names: set[str]) -> dict[str, float]:
    part_of_number: dict[int, str] = {}
    times: dict[str, float] = defaultdict(float)
    for event in sorted(events, key=lambda e: e.time_range.start):
        forward = _range_of(event, names)
        if forward is not None and event.sequence_nr >= 0:
            part_of_number.setdefault(event.sequence_nr, forward)
    for event in events:
        part = _range_of(event, names) or _backward_range(event, part_of_number)
        if part == BLOCKS:
            part = f"{BLOCKS}: {_kind(event)}"
        times[part or REST] += event.self_cpu_time_total
    return times


def _range_of(event: FunctionEvent, names: set[str]) -> str | None:
    """The innermost range that an event lies in, or is."""
    at: FunctionEvent | None = event
    while at is not None:
        if at.name in names:
            return at.name
        at = at.cpu_parent
    return None


def _backward_range(event: FunctionEvent, part_of_number: Mapping[int, str]) -> str | None:
    at: FunctionEvent | None = event
    while at is not None:
        if at.name.startswith("autograd::engine") and at.sequence_nr in part_of_number:
            return part_of_number[at.sequence_nr]
        at = at.cpu_parent
    return None


def _kind(event: FunctionEvent) -> str:
    name = event.name.lower()
    if "attention" in name or "attn" in name:
        return ATTENTION
    if name.endswith(("::mm", "::addmm", "::bmm")):
        return PRODUCTS
    return REST


def operators(run: Callable[[], object]) -> int:
    """How many operators a call runs, those inside others not counted, or kernels on a GPU."""
    run()
    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as profiled:
        run()
    events = profiled.events()
    kernels = sum(event.name == "cudaLaunchKernel" for event in events)
    return kernels or sum(_is_operator(e) and not _is_operator(e.cpu_parent) for e in events)


def _is_operator(event: FunctionEvent | None) -> bool:
    return event is not None and event.name.startswith("aten::")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
