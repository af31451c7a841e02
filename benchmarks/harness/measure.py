"""One case of one op: every provider's values, memory and time, whatever happens to any of them."""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict

import torch

from benchmarks.harness.case import Case
from benchmarks.harness.spec import Spec
from benchmarks.harness.timing import CLOCKS, Function, ProviderError, peak_allocated_bytes, time_interleaved
from benchmarks.harness.values import Part, find_fault

LONGEST_REASON = 160  # characters
STAGES = {"inputs", "timing"}  # what all providers need


class DeviceLost(Exception):
    """A kernel left the device unusable for this process."""


def measure_case(
    spec: Spec,
    case: Case,
    device: str,
    seconds: float,
    clock: str = "wall",
    *,
    check: bool = False,
    lost: dict[str, str] | None = None,
    started: Callable[[str], None] = lambda provider: None,
) -> list[dict]:
    """One row per provider: time in milliseconds, ratios to the peers, rates, peak bytes; or an error.

    Args:
        seconds: for timing all providers together. check: whether the values are compared with fp64
            first; a row then has ``fault``, None where they are right. lost: providers, or ``STAGES``,
            that are not to be called, and why. started: is told of each before it is called.

    Raises:
        DeviceLost: a provider made the device unusable.
    """
    measurement = Measurement(spec, case, device, dict(lost or {}), started)
    with _compiling_for_good():
        if measurement.prepare(check):
            measurement.time(seconds, clock)
    rows = measurement.rows()
    del measurement
    _free(device)
    return rows


class Measurement:
    """Functions and what is known of them, by provider."""

    def __init__(self, spec: Spec, case: Case, device: str, errors: dict[str, str], started) -> None:
        self.spec, self.case, self.device, self.errors, self.started = spec, case, device, errors, started
        self.lineup = spec.lineups[device]
        self.functions: dict[str, Function] = {}
        self.peak_bytes: dict[str, int] = {}
        self.faults: dict[str, str | None] = {}
        self.samples = {}

    def prepare(self, check: bool) -> bool:
        """Inputs, the first calls, values and memory; whether anything is left to be timed."""
        self.started("inputs")
        if not self.errors.keys() & STAGES:
            inputs = self._try("inputs", lambda: self.spec.make_inputs(self.case, self.device))
        for stage in self.errors.keys() & STAGES:
            self.errors = {name: f"{stage}: {self.errors[stage]}" for name in self.lineup.providers}
            return False
        parts = self._try("values", lambda: self.spec.parts(self.case, inputs)) if check else []
        for name, bind in self.lineup.providers.items():
            if name not in self.errors:
                self.started(name)
                self._try(
                    name, lambda name=name, bind=bind: self._first_calls(name, bind, inputs, parts, check)
                )
        return bool(self.functions)

    def _first_calls(self, name: str, bind, inputs, parts: list[Part] | None, check: bool) -> None:
        fn = bind(self.case, inputs)
        if fn is None:
            return
        if check and name in self.lineup.checked:
            self.faults[name] = (
                "not checked: " + self.errors["values"] if parts is None else find_fault(parts, fn())
            )
        self.peak_bytes[name] = peak_allocated_bytes(fn, self.device)
        self.functions[name] = fn

    def time(self, seconds: float, clock: str) -> None:
        """Those that fail are left out, and the rest are timed again."""
        self.started("timing")
        while self.functions:
            try:
                self.samples = time_interleaved(
                    self.functions,
                    device=self.device,
                    seconds=seconds,
                    clock=CLOCKS[clock],
                    label=self.case.label,
                )
                return
            except ProviderError as error:
                failed = error.name
                self.errors[failed] = one_line(error.__cause__)
                del self.functions[failed]
            self.started(failed)
            _free(self.device)
            self.started("timing")

    def rows(self) -> list[dict]:
        return [row for name in self.lineup.providers if (row := self._row(name)) is not None]

    def _row(self, name: str) -> dict | None:
        row = {**asdict(self.case), "provider": name}
        if name in self.errors:
            return {**row, "error": self.errors[name]}
        if name not in self.samples:
            return None
        own = self.samples[name]
        peers = [peer for peer in self.lineup.peers if peer in self.samples]
        row |= {
            "rounds": len(own.ms),
            "median_ms": own.median,
            "q10_ms": own.low,
            "q90_ms": own.high,
            "ratio": {peer: own.ratio(self.samples[peer]) for peer in peers},
            "ratio_range": {peer: own.over(self.samples[peer]).range for peer in peers},
            "gb_per_s": self.spec.bytes(self.case) / own.median / 1e6,
            "gflop_per_s": self.spec.flops(self.case) / own.median / 1e6,
            "peak_bytes": self.peak_bytes[name],
        }
        if self.device == "cuda":
            row["graph"] = own.graph
        if name in self.faults:
            row["fault"] = self.faults[name]
        return row

    def _try(self, name: str, call: Callable[[], object]) -> object:
        """What ``call`` returns, or None and an entry in ``errors``."""
        try:
            return call()
        except Exception as error:
            self.errors[name] = one_line(error)
        _free(self.device)  # here, where the traceback no longer holds any tensor
        return None


def one_line(error: BaseException | None) -> str:
    """An error's kind and its first line."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."


def _compiling_for_good() -> AbstractContextManager:
    """Inside, torch.compile compiles as often as shapes differ, and never falls back to eager in silence."""
    if not hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit"):
        return nullcontext()
    return torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)


def _free(device: str) -> None:
    """Give back what is not in use.

    Raises:
        DeviceLost: it cannot be used any more.
    """
    if device != "cuda":
        return
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceLost(one_line(error)) from error
