"""Forward hooks that come first, that compiled models see, and that leave nothing behind."""

import inspect
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class ForwardHook:
    """The forward hook of one module.

    Subclasses are called as ``hook(module, args, output)``, or if they come ``before`` it as
    ``hook(module, args, kwargs)``.
    """

    always_call = False  # also when the module raised an error

    def __init__(self, module: nn.Module, *, before: bool = False) -> None:
        self.module, self._comes_before = module, before
        self._hook: RemovableHandle | None = None
        self._mark: object = None

    def __call__(self, module: nn.Module, args: tuple, output: Any, /) -> Any:
        raise NotImplementedError

    def install(self) -> None:
        """Hook the module, before hooks that are there: what they see is changed already."""
        if self._hook is not None:
            return
        if self._comes_before:
            self._hook = self.module.register_forward_pre_hook(self, prepend=True, with_kwargs=True)
        else:
            self._hook = self.module.register_forward_hook(self, prepend=True, always_call=self.always_call)
        # A graph compiled before would run on without the hook: torch.compile does not look for new
        # hooks, but it does look for a `forward` of the instance's own.
        if "forward" not in vars(self.module):
            self._mark = self.module.forward
            self.module.forward = self._mark

    def remove(self) -> None:
        """Take the hook away; nothing of it remains."""
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        if self._mark is not None and vars(self.module).get("forward") is self._mark:
            del self.module.forward
        self._mark = None


def argument_names(module: nn.Module) -> list[str]:
    """Of ``module.forward``, for what a hook gets by position."""
    return list(inspect.signature(type(module).forward).parameters)[1:]
