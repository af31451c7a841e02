"""A stored run has the machine that its times depend on; its commit and date stand beside."""

from benchmarks.harness.timing import machine

KEPT = ("cpu", "cores", "threads", "torch", "python")


def pytest_benchmark_update_machine_info(machine_info):
    line = machine("cpu")
    machine_info.clear()
    machine_info.update({key: line[key] for key in KEPT})
