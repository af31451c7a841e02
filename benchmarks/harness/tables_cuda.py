"""The tables of a GPU's results: one per section, "forward", "training", "decode"."""

import statistics

from benchmarks.harness.verify import why_not

SECTIONS = ("forward", "training", "decode")
KEY = ("model", "dtype", "B", "T", "S")  # what a line is named by
MIB = 2**20
NAMES_SHOWN = 4  # of the cases that share a reason
DASH = "-"

Case = tuple


def section_of(row: dict) -> str:
    if row["T"] < row["S"]:
        return "decode"
    return "training" if row["backward"] else "forward"


def sections(result: dict) -> list[str]:
    """Those that have rows, in a fixed order."""
    found = {section_of(row) for row in result["rows"]}
    return [section for section in SECTIONS if section in found]


class Section:
    """The rows of one section; of several runs the median."""

    def __init__(self, result: dict, section: str) -> None:
        self.result, self.section = result, section
        self.rows = [row for row in result["rows"] if section_of(row) == section]
        self.cases: list[Case] = list(dict.fromkeys(tuple(row[key] for key in KEY) for row in self.rows))
        self.providers = list(dict.fromkeys(row["provider"] for row in self.rows if "median_ms" in row))
        self.ours = [name for name in result["ours"] if name in self.providers]

    def of(self, case: Case, provider: str) -> list[dict]:
        """Rows with a time and right values, one per run."""
        return [
            row
            for row in self.rows
            if row["provider"] == provider and tuple(row[key] for key in KEY) == case and not why_not(row)
        ]

    def median(self, case: Case, provider: str | None, key: str) -> float | None:
        values = [row[key] for row in self.of(case, provider)] if provider else []
        return statistics.median(values) if values else None

    def fastest(self, case: Case, providers: list[str]) -> str | None:
        times = {name: self.median(case, name, "median_ms") for name in providers}
        times = {name: ms for name, ms in times.items() if ms is not None}
        return min(times, key=times.get) if times else None

    def ratio(self, case: Case, provider: str, peer: str | None) -> float | None:
        if peer is None or not self.of(case, peer):
            return None
        ratios = [row["ratio"][peer] for row in self.of(case, provider) if peer in row["ratio"]]
        return statistics.median(ratios) if ratios else None


def cuda_tables(result: dict) -> dict[str, tuple[list[str], list[list[str]], list[str]]]:
    """By name, "shifted_attention-cuda-forward" say: header, lines, and what is to be said below."""
    return {
        f"{result['op']}-{result['device']}-{name}": _table(Section(result, name))
        for name in sections(result)
    }


def _table(section: Section) -> tuple[list[str], list[list[str]], list[str]]:
    result, floor = section.result, section.result["floors"][0]
    auto = "auto" if "auto" in section.ours else None
    decode = section.section == "decode"
    # A ratio to the best of several is a column of its own only where there are several.
    peers = [(f"{provider} / {floor}", provider, [floor]) for provider in section.ours]
    if auto:
        peers += [
            (f"{auto} / best of {kind}", auto, names)
            for kind, names in (("plain", result["floors"]), ("stock + epilogue", result["stock"]))
            if len(names) > 1 and any(name in section.providers for name in names)
        ]
    header = ["model", "dtype", "B", "S" if decode else "T", *(f"{name} ms" for name in section.providers)]
    header += [title for title, _, _ in peers]
    header.append("share of copy" if decode or floor == "memcpy" else "TFLOP/s")
    memory = [name for name in (floor, "published", auto) if name in section.providers]
    header += [f"{name} MiB" for name in memory]
    lines = []
    for case in section.cases:
        model, dtype, B, T, S = case
        line = [model, dtype, str(B), str(S if decode else T)]
        line += [_number(section.median(case, name, "median_ms"), ".3g") for name in section.providers]
        line += [
            _number(section.ratio(case, name, section.fastest(case, names)), ".2f")
            for _, name, names in peers
        ]
        line.append(_rate(section, case, auto, share=decode or floor == "memcpy"))
        line += [_number(_mib(section.median(case, name, "peak_bytes")), ".1f") for name in memory]
        lines.append(line)
    return header, lines, [*_reasons(section), *_left_out(section), cuda_machine_line(result)]


def _rate(section: Section, case: Case, provider: str | None, share: bool) -> str:
    if share:
        rate = section.median(case, provider, "gb_per_s")
        copy = section.result["machine"]["copy_gb_per_s"]
        return DASH if rate is None else f"{100 * rate / copy:.0f} %"
    rate = section.median(case, provider, "gflop_per_s")
    return DASH if rate is None else f"{rate / 1e3:.0f}"


def _reasons(section: Section) -> list[str]:
    """Why there is a dash, each reason once."""
    cases: dict[tuple[str, str], list[str]] = {}
    for row in section.rows:
        if why_not(row):
            names = cases.setdefault((row["provider"], why_not(row)), [])
            if (name := _case_name(row)) not in names:
                names.append(name)
    return [f"{provider}: {reason} ({_some(names)})" for (provider, reason), names in cases.items()]


def _left_out(section: Section) -> list[str]:
    names = [_case_name(row) for row in section.result["left_out"] if section_of(row) == section.section]
    names = list(dict.fromkeys(names))
    return [f"Left out for lack of time: {'; '.join(names)}"] if names else []


def _case_name(row: dict) -> str:
    return f"{row['model']} B={row['B']} T={row['T']} S={row['S']}"


def _some(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return "; ".join(names[:NAMES_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def cuda_machine_line(result: dict) -> str:
    """The machine, what it does at best, and how it was measured, in one line."""
    machine, runs = result["machine"], len({row["run"] for row in result["rows"]})
    return (
        f"{machine['gpu']}, torch {machine['torch']}, CUDA {machine['cuda']}, cuDNN {machine['cudnn']}, "
        f"commit {machine['commit']}, {machine['date']}; in the same run a copy at "
        f"{machine['copy_gb_per_s'] / 1e3:.2f} TB/s and a bf16 product at "
        f"{machine['matmul_tflop_per_s']:.0f} TFLOP/s; device events, cold L2, CUDA graphs for small work, "
        f"medians of interleaved rounds, {runs} run{'s' if runs > 1 else ''}; values checked against fp64; "
        f"`{result['command']}`"
    )


def _mib(value: float | None) -> float | None:
    return None if value is None else value / MIB


def _number(value: float | None, form: str) -> str:
    return DASH if value is None else f"{value:{form}}"
