"""Adapters on, off and away."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from mmicl_kernels.patch.patches import Patches

Self = TypeVar("Self", bound="Switch")


class Switch:
    """What a handle does with all that is in its model at once."""

    _patches: Patches

    @property
    def enabled(self) -> bool:
        return self._patches.is_attached and self._patches.enabled

    def enable(self) -> None:
        """Switch the adapters on, as they are after :func:`attach`."""
        self._check_attached()
        self._patches.enabled = True
        self._patches.sync()

    def disable(self) -> None:
        """Switch the adapters off: the plain model, bit for bit, until :meth:`enable`."""
        self._check_attached()
        self._patches.enabled = False
        self._patches.remove()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The plain model within a ``with`` block, for all threads."""
        enabled = self.enabled
        self.disable()
        try:
            yield
        finally:
            if enabled and self._patches.is_attached:
                self.enable()

    def detach(self) -> None:
        """Restore the model exactly. Detaching again does nothing."""
        if self._patches.is_attached:
            self._patches.detach()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _check_attached(self) -> None:
        if not self._patches.is_attached:
            raise RuntimeError("the handle is detached, expected an attached one")
