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
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

Function = Callable[[], object]
Clock = Callable[[], float]
Name = TypeVar("Name", bound=Hashable)

# Where other processes want the same cores, wall time measures them. Processor time does not; but it
# adds up threads, and counts those that spin at a barrier, so use it with one thread.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "processor": time.process_time}

MIN_ROUNDS, MAX_ROUNDS = 5, 200
QUANTILES = (0.1, 0.9)
WARM_UPS = 3  # a compiled function, a CUDA graph and the allocator's cache settle within so many calls
GRAPH_BELOW_MS = 2.0  # launching the few dozen kernels of a published backward takes up to about this long
COPY_BYTES, MATMUL_SIZE = 2**30, 8192


@dataclass(frozen=True)
class Samples:
    """Milliseconds of one provider, or ratios of them, one per round; ``graph``: replayed as a CUDA graph."""

    ms: tuple[float, ...]
    graph: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def low(self) -> float:
        return _quantile(self.ms, QUANTILES[0])

    @property
    def high(self) -> float:
        return _quantile(self.ms, QUANTILES[1])

    @property
    def range(self) -> tuple[float, float]:
        return self.low, self.high

    def ratio(self, peer: "Samples") -> float:
        """Median over the rounds of own time over the peer's."""
        return self.over(peer).median

    def over(self, peer: "Samples") -> "Samples":
        """The ratios within the rounds."""
        return Samples(tuple(a / b for a, b in zip(self.ms, peer.ms, strict=True)))


class ProviderError(Exception):
    """One of several functions failed while it was timed; the cause is chained."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def time_interleaved(
    functions: Mapping[str, Function],
    *,
    device: str,
    seconds: float,
    clock: Clock = time.perf_counter,
    label: str = "",
) -> dict[str, Samples]:
    """Time every function once a round, for about ``seconds``, each round in another order.

    On CUDA the L2 cache holds none of the inputs before each sample, and small work is replayed as a CUDA
    graph; the graphs and their memory are gone on return. ``clock`` is for the CPU; see ``CLOCKS``.

    Raises:
        ProviderError: a function raised; it names which.
    """
    sample, graphs = sampler(functions, device, clock)
    times = take_turns(list(functions), sample, seconds, label)
    return {name: Samples(tuple(ms), name in graphs) for name, ms in times.items()}


def sampler(
    functions: Mapping[str, Function], device: str, clock: Clock = time.perf_counter
) -> tuple[Callable[[str], float], set[str]]:
    """What calls a function by its name, to milliseconds, and the names that are replayed as CUDA graphs."""
    graphs: set[str] = set()
    if device == "cuda":
        functions, graphs, sample = *_cuda_ready(functions), _cuda_sampler()
    else:
        sample = _cpu_sampler(clock)

    def one(name: str) -> float:
        try:
            return sample(functions[name])
        except Exception as error:
            raise ProviderError(name) from error

    return one, graphs


def take_turns(
    names: Sequence[Name], sample: Callable[[Name], float], seconds: float, label: str = ""
) -> dict[Name, list[float]]:
    """What ``sample`` says of each name once a round, for about ``seconds``, each round in another order."""
    for number in range(WARM_UPS):
        start = time.perf_counter()
        for name in names:
            sample(name)
        round_seconds = time.perf_counter() - start
        if number > 0 and round_seconds > seconds / MIN_ROUNDS:
            break  # long work has settled by now; the first round says nothing, it may have compiled
    rounds = min(max(round(seconds / round_seconds), MIN_ROUNDS), MAX_ROUNDS)

    times: dict[Name, list[float]] = {name: [] for name in names}
    for number in tqdm(range(rounds), desc=label or "timing", unit="round", leave=False, disable=None):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            times[name].append(sample(name))
    return times


def peak_allocated_bytes(fn: Function, device: str = "cpu") -> int:
    """The most memory that ``fn`` held at once above what was held before, in bytes, by one call.

    On CUDA as its caching allocator counts (in blocks of 512 bytes). On the CPU as torch.profiler does,
    from every allocation and free; so a fresh process, threads and other tensors do not matter. ``fn`` is
    called twice: the first call is not counted, because it also sets up what later calls find ready.
    """
    if device == "cuda":
        return _cuda_peak_bytes(fn)
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


def _cuda_peak_bytes(fn: Function) -> int:
    fn()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = fn()
    torch.cuda.synchronize()
    del result  # only now, so that the result counts
    return torch.cuda.max_memory_allocated() - before


def machine(device: str) -> dict[str, str | int | float]:
    """What a measurement depends on: processor, threads, versions, commit, date; what the GPU can do."""
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
        line["cudnn"] = torch.backends.cudnn.version() or 0
        line |= cuda_rates()
    return line


def cuda_rates() -> dict[str, float]:
    """What a GPU does at best: bytes per second of a copy (read and written), and a bf16 product's rate."""
    source, target = torch.zeros(2, COPY_BYTES, dtype=torch.uint8, device="cuda")
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device="cuda")
    functions = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    samples = time_interleaved(functions, device="cuda", seconds=0.3)
    return {
        "copy_gb_per_s": 2 * COPY_BYTES / samples["copy"].median / 1e6,
        "matmul_tflop_per_s": 2 * MATMUL_SIZE**3 / samples["matmul"].median / 1e9,
    }


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
    # Read, not written: lines left dirty would be written back during the call, at its cost. The reading
    # takes some 50 us, in which the host gets ahead of the device.
    other = torch.zeros(l2_bytes, dtype=torch.float32, device="cuda")

    def sample(fn: Function) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.sum()
        start.record()
        result = fn()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end)

    return sample


def _cuda_ready(functions: Mapping[str, Function]) -> tuple[dict[str, Function], set[str]]:
    """Every function, or its replay as a CUDA graph where launching could take longer; which are graphs."""
    ready, graphs = dict(functions), set()
    for name, fn in functions.items():
        try:
            graph = _captured(fn) if _is_small(fn) and not _synchronizes(fn) else None
        except Exception as error:
            raise ProviderError(name) from error
        if graph is not None:
            ready[name] = graph.replay
            graphs.add(name)
    return ready, graphs


def _is_small(fn: Function) -> bool:
    for _ in range(WARM_UPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        torch.cuda.synchronize()
        small = 1e3 * (time.perf_counter() - start) < GRAPH_BELOW_MS
    return small


def _synchronizes(fn: Function) -> bool:
    """Whether the host waits in ``fn``. Asked before a capture, because one that fails leaves traces."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fn()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False


def _captured(fn: Function) -> torch.cuda.CUDAGraph | None:
    """``fn`` as a CUDA graph with its own memory, or None where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what a first call on a side stream sets up must not be captured
        for _ in range(WARM_UPS):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            fn()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        torch.cuda.synchronize()  # raises again if the device is lost, not if it only refused
        return None
    return graph


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
