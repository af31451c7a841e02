"""Every op that is measured, by name: the SPECs of ``benchmarks/ops``, those with most of the time first."""

import pkgutil
from importlib import import_module

from benchmarks import ops
from benchmarks.harness.spec import Spec


def _specs() -> list[Spec]:
    names = sorted(module.name for module in pkgutil.iter_modules(ops.__path__))
    specs = [import_module(f"{ops.__name__}.{name}").SPEC for name in names]
    return sorted(specs, key=lambda spec: -spec.share)


OPS: dict[str, Spec] = {spec.name: spec for spec in _specs()}
