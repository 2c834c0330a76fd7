"""Where a step's time goes on this rank's GPU, by the start and end times of kernels."""

import re

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from twofold.contract import Breakdown

KINDS = (  # the first that matches a kernel's name
    (
        "exchange",
        re.compile(
            r"nccl|AllGather|_scatter_kernel|index_copy|indexFunc|Memcpy PtoP|barrier|_all_reduce|_sum_(norm_)?kernel",
            re.I,
        ),
    ),
    ("attention", re.compile(r"flash|fmha|paged|attention|_attend_run|_merge_r(un|ow)s|_gather_kernel", re.I)),
    ("projections", re.compile(r"gemm|nvjet|cutlass|cublas|xmma|splitK|gemv|group_mm|grouped|_linear_kernel", re.I)),
)
Interval = tuple[float, float]


class StepProfiler:
    """Times kernels between `start` and `stop`."""

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CUDA], acc_events=True)

    def start(self) -> None:
        torch.cuda.synchronize()
        self._profile.start()

    def stop(self) -> Breakdown:
        torch.cuda.synchronize()
        self._profile.stop()
        intervals: dict[str, list[Interval]] = {name: [] for name in [*(name for name, _ in KINDS), "rest"]}
        totals: dict[str, tuple[float, int]] = {}
        for event in self._profile.events() or ():
            if event.device_type != DeviceType.CUDA:
                continue
            kind = next((name for name, pattern in KINDS if pattern.search(event.name)), "rest")
            span = event.time_range
            intervals[kind].append((span.start, span.end))
            time, count = totals.get(event.name, (0.0, 0))
            totals[event.name] = (time + span.end - span.start, count + 1)
        union = {kind: _union(spans) for kind, spans in intervals.items()}
        busy = _length(_union([span for spans in union.values() for span in spans]))
        hidden = _length(_union([span for kind, spans in union.items() if kind != "exchange" for span in spans]))
        longest = sorted(((n, t / 1e3, c) for n, (t, c) in totals.items()), key=lambda entry: -entry[1])
        return Breakdown(
            kinds={kind: _length(spans) / 1e3 for kind, spans in union.items()},
            exposed_exchange=(busy - hidden) / 1e3,
            busy=busy / 1e3,
            kernels=longest[:24],
        )


def _union(intervals: list[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _length(intervals: list[Interval]) -> float:
    return sum(end - start for start, end in intervals)
