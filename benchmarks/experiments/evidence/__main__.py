"""``python -m benchmarks.experiments.evidence default`` runs what of an experiment was not run yet."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from tqdm import tqdm

from .experiments import EXPERIMENTS
from .runs import Run, keep, perform, read


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "experiments", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}; by default all"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    options = parser.parse_args(arguments)
    for name in options.experiments:
        if name not in EXPERIMENTS:
            parser.error(f"NAME is {name!r}, expected one of {', '.join(EXPERIMENTS)}")
    failed = [run for name in options.experiments or EXPERIMENTS for run in run_all(name, options.workers)]
    if failed:
        parser.exit(1, f"{len(failed)} runs failed\n")


def run_all(name: str, workers: int) -> list[Run]:
    """Every run that the experiment's file lacks, each kept as soon as it is done; returns what failed."""
    known, failed = read(name), []
    listed = [run for run in EXPERIMENTS[name]() if run not in known]
    elsewhere = {run: row for other in EXPERIMENTS for run, row in read(other).items()}
    for run in [x for x in listed if x in elsewhere]:
        keep(name, run, elsewhere[run])
    missing = [run for run in listed if run not in elsewhere]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(perform, run): run for run in missing}
        bar = tqdm(as_completed(futures), desc=name, total=len(futures), unit="run")
        for future in bar:
            run, error = futures[future], future.exception()
            if error is not None:  # the others go on
                tqdm.write(f"{run}: {error!r}")
                failed.append(run)
                continue
            keep(name, run, future.result())
            bar.set_postfix_str(f"{run.task}, {run.arm}: {future.result()['accuracy']:.2f}")
    return failed


if __name__ == "__main__":
    main()
