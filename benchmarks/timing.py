"""Time and memory of functions of no arguments, side by side, and the machine they ran on.

Machines drift: clocks change and other processes come and go. So providers take turns, round by round,
and a ratio is the median of the ratios within the rounds.
"""

import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

Function = Callable[[], object]
Clock = Callable[[], float]

# Where other processes want the same cores, wall time measures them. Processor time does not; but it
# adds up threads, and counts those that spin at a barrier, so use it with one thread.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "processor": time.process_time}

MIN_ROUNDS, MAX_ROUNDS = 5, 200
QUANTILES = (0.1, 0.9)
WARM_UPS = 3  # a compiled function, a CUDA graph and the allocator's cache settle within so many calls
GRAPH_BELOW_MS = 0.5  # launching Python's dozen kernels takes up to about this long


@dataclass(frozen=True)
class Samples:
    """Milliseconds of one provider, one per round."""

    ms: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def low(self) -> float:
        return _quantile(self.ms, QUANTILES[0])

    @property
    def high(self) -> float:
        return _quantile(self.ms, QUANTILES[1])

    def ratio(self, peer: "Samples") -> float:
        """Median over the rounds of own time over the peer's."""
        return statistics.median(a / b for a, b in zip(self.ms, peer.ms, strict=True))


def time_interleaved(
    functions: Mapping[str, Function],
    *,
    device: str,
    seconds: float,
    clock: Clock = time.perf_counter,
    label: str = "",
) -> dict[str, Samples]:
    """Time every function once a round, for about ``seconds``, each round in another order.

    On CUDA the L2 cache is emptied before each sample, and small work is replayed as a CUDA graph.
    ``clock`` is for the CPU; see ``CLOCKS``.
    """
    if device == "cuda":
        functions, sample = {name: _cuda_ready(fn) for name, fn in functions.items()}, _cuda_sampler()
    else:
        sample = _cpu_sampler(clock)
    for number in range(WARM_UPS):
        start = time.perf_counter()
        for fn in functions.values():
            sample(fn)
        round_seconds = time.perf_counter() - start
        if number > 0 and round_seconds > seconds / MIN_ROUNDS:
            break  # long work has settled by now; the first round says nothing, it may have compiled
    rounds = min(max(round(seconds / round_seconds), MIN_ROUNDS), MAX_ROUNDS)

    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in tqdm(range(rounds), desc=label or "timing", unit="round", leave=False):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(sample(functions[name]))
    return {name: Samples(tuple(ms)) for name, ms in times.items()}


def peak_allocated_bytes(fn: Function) -> int:
    """The most memory that ``fn`` held at once above what was held before, in bytes, by one call.

    Counted as torch.profiler does, from every allocation and free of torch's allocators, on all
    devices; so a fresh process, threads and other tensors do not matter. ``fn`` is called twice: the
    first call is not counted, because it also sets up what later calls find ready.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its start and stop on stderr
    fn()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = fn()
    del result  # only now, so that the result counts
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def machine(device: str) -> dict[str, str | int]:
    """What a measurement depends on: processor, threads, versions, commit, date."""
    line = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device == "cuda":
        line["gpu"] = torch.cuda.get_device_name()
        line["cuda"] = torch.version.cuda or ""
    return line


def _cpu_sampler(clock: Clock) -> Callable[[Function], float]:
    def sample(fn: Function) -> float:
        start = clock()
        result = fn()
        elapsed = clock() - start
        del result  # after the clock is read: freeing is the caller's matter
        return 1e3 * elapsed

    return sample


def _cuda_sampler() -> Callable[[Function], float]:
    """Milliseconds between two events around a call that finds none of its inputs in L2."""
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(4 * l2_bytes, dtype=torch.int8, device="cuda")

    def sample(fn: Function) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return sample


def _cuda_ready(fn: Function) -> Function:
    """``fn``, or where launching could take longer than running its replay as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capture must not see first-call work, and needs a side stream
        for _ in range(WARM_UPS):
            fn()
        stream.synchronize()
        start = time.perf_counter()
        fn()
        stream.synchronize()
        small = 1e3 * (time.perf_counter() - start) < GRAPH_BELOW_MS
    torch.cuda.current_stream().wait_stream(stream)
    if not small:
        return fn
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def _quantile(values: tuple[float, ...], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Short hash of the checkout, "+" appended where files differ from it; "unknown" outside of git."""
    root = Path(__file__).parent
    commands = (["git", "rev-parse", "--short", "HEAD"], ["git", "status", "--porcelain", "-uno"])
    try:
        head, changes = (
            subprocess.run(c, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for c in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changes else "")
