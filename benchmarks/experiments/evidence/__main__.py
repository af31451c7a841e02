"""``python -m benchmarks.experiments.evidence default`` runs what of an experiment was not run yet."""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from tqdm import tqdm

from .experiments import EXPERIMENTS
from .runs import keep, perform, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "experiments", choices=EXPERIMENTS, nargs="*", default=list(EXPERIMENTS), metavar="NAME"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    options = parser.parse_args()
    for name in options.experiments:
        run_all(name, options.workers)


def run_all(name: str, workers: int) -> None:
    """Every run that the experiment's file does not have; each is kept as soon as it is done."""
    known = read(name)
    missing = [run for run in EXPERIMENTS[name]() if run not in known]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(perform, run): run for run in missing}
        bar = tqdm(as_completed(futures), desc=name, total=len(futures), unit="run")
        for future in bar:
            run, found = futures[future], future.result()
            keep(name, run, found)
            bar.set_postfix_str(f"{run.task}, {run.arm}, {run.labelled}: {found['accuracy']:.2f}")


if __name__ == "__main__":
    main()
