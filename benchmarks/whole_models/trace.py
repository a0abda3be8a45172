"""The trace of MeshLM's decode steps: which kernels take the time, and where the device waits for the host."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measuring import format_table

from .engines import MeshLM
from .tasks import Task, random_tokens


@dataclass(frozen=True)
class Span:
    """Something that ran, in microseconds of the trace."""

    name: str
    start: float
    end: float


def profile(task: Task, ours: MeshLM) -> dict[str, Any]:
    """Traces decode steps and prints what they are made of."""
    num_in, num_steps = task.workloads.profile
    engine, activities = ours.engine, [torch.profiler.ProfilerActivity.CPU]
    if task.device != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for index in range(task.profile_seqs):
        engine.add_request(random_tokens(task, num_in, f"profile {index}"), ours.params(2 * num_steps + 16))
    started: set[str] = set()
    while len(started) < task.profile_seqs:  # prompts
        started |= {output.request_id for output in engine.step()}
    for _ in range(4):
        engine.step()
    with torch.profiler.profile(activities=activities) as trace:
        begin = time.perf_counter()
        for _ in range(num_steps):
            engine.step()
        step_us = (time.perf_counter() - begin) / num_steps * 1e6
    for request_id in started:
        engine.abort(request_id)

    events = [event for event in trace.events() if not getattr(event, "is_user_annotation", False)]
    of_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    what = "device" if of_device else "host"  # on a CPU, torch's own operators; C++ ops are gaps there
    chosen = of_device or [event for event in events if event.cpu_parent is None]
    spans = [Span(event.name, event.time_range.start, event.time_range.end) for event in chosen]
    found = summary(spans, num_steps) | {"step_us": step_us, "what": what, "num_seqs": task.profile_seqs}
    found |= {"model": task.shape.label, "host_operators_us": operators(events, num_steps)}
    print("\n".join(told(found)), flush=True)
    return found


def summary(spans: Sequence[Span], num_steps: int) -> dict[str, Any]:
    """Of each step: the kernels that take the most time, and the gaps between kernels, by the two around them."""
    by_name, counts, gaps, gap_counts = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    ordered = sorted(spans, key=lambda span: span.start)
    busy = 0.0
    last: Span | None = None  # that ends the latest so far
    for span in ordered:
        by_name[span.name] += span.end - span.start  # type: ignore[assignment]
        counts[span.name] += 1
        if last is not None and span.start > last.end:
            pair = f"{last.name[:44]} -> {span.name[:44]}"
            gaps[pair] += span.start - last.end  # type: ignore[assignment]
            gap_counts[pair] += 1
        busy += max(0.0, span.end - max(span.start, last.end if last else span.start))
        if last is None or span.end > last.end:
            last = span
    whole = last.end - ordered[0].start if last is not None else 0.0
    return {
        "launches": len(spans) / num_steps,
        "busy_us": busy / num_steps,
        "idle_us": (whole - busy) / num_steps,
        "kernels": [(name, us / num_steps, counts[name] / num_steps) for name, us in by_name.most_common(15)],
        "gaps": [(pair, us / num_steps, gap_counts[pair] / num_steps) for pair, us in gaps.most_common(10)],
    }


def operators(events: Sequence[Any], num_steps: int) -> list[tuple[str, float, float]]:
    """The host's time in each operator itself, a step."""
    times, counts = Counter[str](), Counter[str]()
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CPU:
            times[event.name] += event.self_cpu_time_total
            counts[event.name] += 1
    return [(name, us / num_steps, counts[name] / num_steps) for name, us in times.most_common(10)]


def told(found: dict[str, Any]) -> list[str]:
    lines = [
        f"decode step of {found['model']}, {found['num_seqs']} sequences, while traced (the trace itself takes time): "
        f"{found['step_us']:.0f} us; {found['what']} busy {found['busy_us']:.0f} us, idle {found['idle_us']:.0f} us; "
        f"{found['launches']:.0f} launches"
    ]
    for title, key in (
        (f"{found['what']}: time by kernel", "kernels"),
        (f"{found['what']}: gaps between kernels", "gaps"),
        ("host: own time by operator", "host_operators_us"),
    ):
        rows = [[name[:92], f"{us:.1f}", f"{count:.1f}", ""] for name, us, count in found[key]]
        lines += ["", *format_table([title, "us a step", "times", ""], rows, 1)]
    return lines
