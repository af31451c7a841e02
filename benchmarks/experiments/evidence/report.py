"""The tables and plots of what was run: ``python -m benchmarks.experiments.evidence.report``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student_t

from benchmarks.experiments.smolvl.adapters import SHIPPED
from benchmarks.report import fill_tables
from mmicl_kernels.evaluation.metrics import exact_match

from .arms import ALIGNED, CONTROL, PROMPT
from .experiments import (
    ABLATED_TASKS,
    ABLATIONS,
    BESIDE,
    COUNTS,
    EFFICIENCY_ARMS,
    EFFICIENCY_TASKS,
    FEW,
    GRID,
    HELD_OUT,
    LIMITS,
    MANY,
    METHODS,
    METHODS_TASKS,
    STAVE_RATES,
    STEPS,
    SYNERGIES,
    TASKS,
    TAUGHT,
    TAUGHT_TASKS,
    TEACHERS,
    TUNED,
    TUNED_TASKS,
)
from .runs import ELSEWHERE, ICL, Run, read
from .shares import SHARES, SHOWN

PAGE = Path(__file__).parents[3] / "docs" / "evidence.md"
PLOT = Path(__file__).with_name("efficiency.png")
DEMO = Path(__file__).parents[2] / "results" / "cpu-amd-epyc" / "demo.json"
FEWEST_SEEDS = 3  # of an interval
# Whose row of the demo has another name.
SHOWN_AS: Mapping[str, str] = {
    ICL: "8-shot",
    CONTROL: "answers-only",
    "AIM": "AIM, 8 fused",
    PROMPT: "prompt-tuning",
}

# By seed, 1 where the answer to a query is right and 0 else.
Right = Mapping[int, np.ndarray]


def right(found: Mapping[Run, dict], **fields: Any) -> Right:
    """Of the runs whose fields are those."""
    return {
        run.seed: _bits(row["right"])
        for run, row in found.items()
        if all(getattr(run, name) == value for name, value in fields.items())
    }


def _bits(text: str) -> np.ndarray:
    return np.array([int(x) for x in text])


def accuracy(x: Right) -> str:
    """In percent: the mean over seeds, and the lowest and highest of several."""
    if not x:
        return ""
    each = [100 * own.mean() for own in x.values()]
    return f"{np.mean(each):.0f}" + (f" ({min(each):.0f} to {max(each):.0f})" if len(each) > 1 else "")


def minus(a: Right, b: Right) -> str:
    """In percentage points over the seeds of both, with a 95 % interval if they are enough for one."""
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return ""
    gaps = 100 * np.stack([a[seed] - b[seed] for seed in seeds])
    if len(seeds) < FEWEST_SEEDS:
        return f"{gaps.mean():+.0f}"
    half = half_width(gaps)
    return f"{gaps.mean():+.0f} ({gaps.mean() - half:+.0f} to {gaps.mean() + half:+.0f})"


def half_width(gaps: np.ndarray, level: float = 0.95) -> float:
    """Of the interval of the mean of ``gaps [seeds, questions]``, both of which are drawn from many.

    The variance is that of a two-way layout with random rows and columns, the degrees of freedom are
    Satterthwaite's, so that three seeds have the wide interval that three draws deserve.
    """
    S, Q = gaps.shape
    rows, columns = gaps.mean(1), gaps.mean(0)
    rest = gaps - rows[:, None] - columns + gaps.mean()
    of_rows, of_columns = rows.var(ddof=1) / S, columns.var(ddof=1) / Q
    both = (rest**2).sum() / ((S - 1) * (Q - 1)) / (S * Q)
    variance = max(of_rows + of_columns - both, of_rows, of_columns)
    if variance == 0:
        return 0.0
    freedom = (of_rows + of_columns) ** 2 / (of_rows**2 / (S - 1) + of_columns**2 / (Q - 1))
    return float(student_t.ppf((1 + level) / 2, freedom) * np.sqrt(variance))


def common(rows: Sequence[Right]) -> list[Right]:
    """What was run by the seeds that all those have that were run at all: only then rows compare."""
    known = [set(x) for x in rows if x]
    seeds = set.intersection(*known) if known else set()
    return [{seed: x[seed] for seed in x if seed in seeds} for x in rows]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of which nothing was run are left out."""
    run = [row for row in rows if any(cell and cell[0] != "`" for cell in row[1:])]
    lines = [columns, ["---"] + ["--:"] * (len(columns) - 1), *run]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shares_table() -> str:
    """The loss before training, and what its largest layer and token have of it."""
    found = json.loads(SHARES.read_text())
    rows = []
    for form in SHOWN:
        cells = [form]
        for own in found.values():
            x = own[form]
            cells += [f"{x['loss']:g}", f"{x['layer']:.0%}", f"{x['token']:.0%}"]
        rows.append(cells)
    heads = ("a first token of its own", "none")
    return markdown(["", *(f"{x}: {y}" for x in heads for y in ("loss", "layer", "token"))], rows)


def forms_table() -> str:
    found = read("forms")
    rows = [[arm, *(accuracy(right(found, arm=arm, head=x)) for x in (True, False))] for arm in ALIGNED]
    return markdown(["alignment", "`kind`", "`kind`, no first token"], rows)


def tuning_table() -> str:
    found = read("tuning")
    rows = []
    for arm in TUNED:
        for steps in STEPS:
            cells = [
                accuracy(right(found, task=task, arm=arm, steps=steps, rate=rate))
                for task in TUNED_TASKS
                for rate in GRID
            ]
            rows.append([arm, str(steps), *cells])
    columns = [f"`{task}`, {rate:g}" for task in TUNED_TASKS for rate in GRID]
    return markdown(["", "updates", *columns], rows)


def synergies_table() -> str:
    found = read("synergies")
    tasks = ("feeling", "past", "kind")
    rows = [[arm, *(accuracy(right(found, task=task, arm=arm)) for task in tasks)] for arm in SYNERGIES]
    return markdown(["", *(f"`{task}`" for task in tasks)], rows)


def default_table() -> str:
    found = read("default")
    columns = (
        "", "8-shot", "16-shot", CONTROL, "MimIC", "MimIC minus control", "M2IV", "M2IV minus 8-shot",
        "AIM, 8 fused", "AIM minus 8-shot",
    )  # fmt: skip
    rows = []
    for task in TASKS:
        few, many = (right(found, task=task, arm=ICL, shots=k) for k in (8, 16))
        control, mimic, m2iv, aim = (
            right(found, task=task, arm=x) for x in (CONTROL, "MimIC", "M2IV", "AIM")
        )
        shown = [*map(accuracy, (few, many, control, mimic)), minus(mimic, control)]
        rows.append([f"`{task}`", *shown, accuracy(m2iv), minus(m2iv, few), accuracy(aim), minus(aim, few)])
    return markdown(columns, rows)


def stave_table() -> str:
    found = read("stave")
    rows = [
        [f"{rate:g}", *(accuracy(right(found, task=task, rate=rate)) for task in TUNED_TASKS)]
        for rate in STAVE_RATES
    ]
    return markdown(["rate", *(f"`{task}`" for task in TUNED_TASKS)], rows)


def methods_table() -> str:
    """What each method is, costs and knows; a token's time beside that of the plain model in the same run."""
    found, costs = read("methods"), {row["name"]: row for row in json.loads(DEMO.read_text())["rows"]}
    rows = []
    for arm in (ICL, *METHODS):
        name = SHOWN_AS.get(arm, arm)
        own, weights = costs[name], SHIPPED / name.partition(",")[0] / "mmicl_adapter.safetensors"
        times = own["further_token_ms"] / costs["zero-shot"]["further_token_ms"]
        stored = f"{weights.stat().st_size:,}" if weights.exists() else ""
        cells = [f"{own['parameters']:,}", stored, f"{own['prompt_tokens']:.0f}", f"{times:.2f}"]
        rows.append([arm, *cells, *(accuracy(right(found, task=task, arm=arm)) for task in METHODS_TASKS)])
    columns = ("", "parameters", "stored bytes", "prompt tokens", "time of a token, plain is 1")
    return markdown([*columns, *(f"`{task}`" for task in METHODS_TASKS)], rows)


def efficiency_table() -> str:
    found = read("efficiency")
    rows = []
    for task in EFFICIENCY_TASKS:
        control = [right(found, task=task, arm=CONTROL, labelled=count) for count in COUNTS]
        for arm in (ICL, *EFFICIENCY_ARMS):
            own = [right(found, task=task, arm=arm, labelled=count) for count in COUNTS]
            gaps = [minus(*pair) if arm != CONTROL else "" for pair in zip(own, control, strict=True)]
            cells = [f"{accuracy(x)}{gap and f'; {gap}'}" for x, gap in zip(own, gaps, strict=True)]
            rows.append([f"`{task}`", arm, *cells])
    return markdown(["", "", *(f"{count} items" for count in COUNTS)], rows)


def unlabelled_table() -> str:
    found = read("unlabelled")
    rows = []
    for task in FEW:
        each = common([right(found, task=task, **fields) for fields in MANY.values()])
        best = dict(zip(MANY, each, strict=True))[TAUGHT]
        for name, own in zip(MANY, each, strict=True):
            rows.append([f"`{task}`", name, accuracy(own), "" if name == TAUGHT else minus(best, own)])
    return markdown(["", "learnt from", "right", "taught minus this"], rows)


def ablations_table() -> str:
    found = read("ablations")
    rows = []
    for whole, parts in ABLATIONS.items():
        for arm in (whole, *parts):
            cells = []
            for task in ABLATED_TASKS:
                x, y = common([right(found, task=task, arm=name) for name in (whole, arm)])
                cells += [accuracy(y), minus(y, x) if arm != whole else ""]
            rows.append([arm, *cells])
    return markdown(["", *(x for task in ABLATED_TASKS for x in (f"`{task}`", "minus the whole"))], rows)


def teachers_table() -> str:
    found = read("teachers")
    rows = []
    for task in TAUGHT_TASKS:
        for k in TEACHERS:
            arms = (ICL, CONTROL, "MimIC")
            icl, alone, taught = common([right(found, task=task, arm=x, shots=k) for x in arms])
            shown = [
                accuracy(icl),
                accuracy(taught),
                minus(taught, icl),
                accuracy(alone),
                minus(taught, alone),
            ]
            rows.append([f"`{task}`", str(k), *shown])
    columns = (
        "",
        "shots",
        "teacher",
        "taught",
        "minus teacher",
        "as many items, answers alone",
        "taught minus",
    )
    return markdown(columns, rows)


def limits_table() -> str:
    found = read("limits")
    rows = []
    for task in LIMITS:
        arms = (ICL, CONTROL, "MimIC")
        icl, control, mimic = common([right(found, task=task, arm=x) for x in arms])
        rows.append([task, accuracy(icl), accuracy(control), accuracy(mimic), minus(mimic, control)])
    return markdown(["", "16-shot", CONTROL, "MimIC", "MimIC minus control"], rows)


def held_out_table() -> str:
    found = read("held_out")
    rows = []
    for task, others in HELD_OUT.items():
        named = {
            "plain demonstrations": right(found, task=task, arm=ICL),
            "projection of the others": right(found, task=others, asked=task),
            "projection of this task": right(found, task=task, arm="AIM", steps=100),
            "identity": right(found, task=task, arm="AIM", steps=0),
            "noise": right(found, task=task, arm="AIM, random projection"),
        }
        each = dict(zip(named, common(list(named.values())), strict=True))
        held = each["projection of the others"]
        for name, x in each.items():
            own = name == "projection of the others"
            rows.append([f"`{task}`", name, accuracy(x), "" if own else minus(held, x)])
    return markdown(["", "8 demonstrations", "right", "held out minus this"], rows)


def elsewhere_table() -> str:
    """Beside the plain model: other tasks after demonstrations, and prose."""
    found = read("elsewhere")
    rows = []
    for arm in (ICL, *BESIDE):
        own = {run.seed: row for run, row in found.items() if run.arm == arm}
        plain = {run.seed: row for run, row in found.items() if run.arm == ICL}
        cells = []
        for task in ELSEWHERE[1:]:
            x, y = ({seed: _bits(row["elsewhere"][task]) for seed, row in z.items()} for z in (own, plain))
            cells += [accuracy(x), minus(x, y) if arm != ICL else ""]
        nats = [np.mean(row["nats"]) for row in own.values()]
        cells.append(f"{np.exp(np.mean(nats)):.1f}" if nats else "")
        rows.append(["the plain model" if arm == ICL else arm, *cells])
    columns = [x for task in ELSEWHERE[1:] for x in (f"`{task}`", "minus plain")]
    return markdown(["", *columns, "perplexity of prose"], rows)


def mimicry_table() -> str:
    """How often an answer is the teacher's, and how often where that is wrong."""
    found = read("default")
    rows = []
    for task in TASKS:
        arms = (CONTROL, "MimIC", "M2IV")
        teacher = said(found, task=task, arm=ICL, shots=8)
        correct = right(found, task=task, arm=ICL, shots=8)
        same = common([agreement(said(found, task=task, arm=arm), teacher) for arm in arms])
        cells = [accuracy(x) for x in same] + [minus(same[1], same[0])]
        for x in same:
            copied = [x[seed][correct[seed] == 0] for seed in x]
            cells.append(f"{sum(map(sum, copied))} of {sum(map(len, copied))}" if copied else "")
        rows.append([f"`{task}`", *cells])
    columns = [CONTROL, "MimIC", "M2IV", "MimIC minus control"] + [
        f"{x}: its wrong ones" for x in (CONTROL, "MimIC", "M2IV")
    ]
    return markdown(["", *columns], rows)


def said(found: Mapping[Run, dict], **fields: Any) -> dict[int, list[str]]:
    """By seed, the texts of the runs whose fields are those."""
    own = {run: row for run, row in found.items() if all(getattr(run, k) == x for k, x in fields.items())}
    return {run.seed: row["texts"] for run, row in own.items()}


def agreement(texts: Mapping[int, list[str]], others: Mapping[int, list[str]]) -> Right:
    """By seed of both, 1 where the answers are the same."""
    return {
        seed: np.array([int(x) for x in exact_match(texts[seed], others[seed]).samples])
        for seed in sorted(texts.keys() & others.keys())
    }


def plot() -> None:
    """Accuracy against the number of labelled items, of what was run."""
    found = read("efficiency")
    tasks = [task for task in EFFICIENCY_TASKS if right(found, task=task)]
    figure = Figure(figsize=(1 + 4 * len(tasks), 4), layout="constrained")
    axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=True):
        for arm in (ICL, *EFFICIENCY_ARMS):
            each = {count: right(found, task=task, arm=arm, labelled=count) for count in COUNTS}
            known = {k: 100 * np.mean([x.mean() for x in own.values()]) for k, own in each.items() if own}
            if known:
                line = "s--" if arm == ICL else "o-"
                axis.plot(list(known), list(known.values()), line, label=arm, linewidth=1)
        axis.set(title=task, xlabel="labelled items", xscale="log", ylim=(0, 101))
        axis.set(xticks=COUNTS, xticklabels=COUNTS)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right, %")
    axes[-1].legend(fontsize=7)
    figure.savefig(PLOT, dpi=120)


def tables() -> dict[str, str]:
    """Markdown by the name of its marker."""
    makers = {
        "shares": shares_table,
        "forms": forms_table,
        "tuning": tuning_table,
        "synergies": synergies_table,
        "default": default_table,
        "stave": stave_table,
        "methods": methods_table,
        "efficiency": efficiency_table,
        "unlabelled": unlabelled_table,
        "mimicry": mimicry_table,
        "teachers": teachers_table,
        "ablations": ablations_table,
        "held-out": held_out_table,
        "elsewhere": elsewhere_table,
        "limits": limits_table,
    }
    return {f"evidence-{name}": make() for name, make in makers.items()}


def main() -> None:
    PAGE.write_text(fill_tables(PAGE.read_text(), tables()))
    plot()


if __name__ == "__main__":
    main()
