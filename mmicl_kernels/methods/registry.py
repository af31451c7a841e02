"""Methods by name: those of this package, and what others bring."""

import warnings
from collections.abc import Iterator, MutableMapping
from dataclasses import is_dataclass
from importlib.metadata import entry_points

from mmicl_kernels.methods.base import Adapter

ENTRY_POINTS = "mmicl_kernels.methods"


class Registry(MutableMapping[str, type[Adapter]]):
    """Adapter classes by their ``method``.

    A name that was not registered is looked for among the entry points of installed packages: those of the
    group ``mmicl_kernels.methods`` are called as the method and are adapter classes. None is loaded before
    somebody asks for it, by its name or with a config that no known method has.
    """

    def __init__(self, *known: type[Adapter]) -> None:
        self._known: dict[str, type[Adapter]] = {}
        for adapter_class in known:
            self.register(adapter_class)

    def register(self, adapter_class: type[Adapter]) -> type[Adapter]:
        """Make a method known; a decorator.

        Raises:
            TypeError: no adapter class with a ``method`` and a dataclass as ``config_class``. ValueError:
            another class has the name.
        """
        if not (isinstance(adapter_class, type) and issubclass(adapter_class, Adapter)):
            raise TypeError(f"adapter_class is {adapter_class!r}, expected a subclass of Adapter")
        name, config = (getattr(adapter_class, x, None) for x in ("method", "config_class"))
        if not isinstance(name, str) or not is_dataclass(config):
            raise TypeError(
                f"{adapter_class.__name__} has method {name!r} and config_class {config!r}, expected a name "
                "and a dataclass"
            )
        other = self._known.get(name, adapter_class)
        # A cell of a notebook may define its class anew.
        if (other.__module__, other.__qualname__) != (adapter_class.__module__, adapter_class.__qualname__):
            raise ValueError(f"method {name!r} is {other.__name__}'s, expected another name")
        self._known[name] = adapter_class
        return adapter_class

    @property
    def known(self) -> list[type[Adapter]]:
        """Those that are registered by now."""
        return list(self._known.values())

    def of_config(self, config: object) -> type[Adapter] | None:
        """The method whose config this is, by its own class before that of one it is made from."""
        for kind in type(config).__mro__:
            for adapter_class in self.known:
                if adapter_class.config_class is kind:
                    return adapter_class
        return None

    def load_all(self) -> None:
        """Load what installed packages bring; what fails is left out, with a warning that says why."""
        for name in entry_points(group=ENTRY_POINTS).names:
            try:
                self[name]
            except Exception as error:  # whatever a stranger's module does
                warnings.warn(f"method {name!r} cannot be loaded: {error!r}", stacklevel=3)

    def __getitem__(self, name: str) -> type[Adapter]:
        if name not in self._known:
            for point in entry_points(group=ENTRY_POINTS, name=name):
                loaded = point.load()
                if getattr(loaded, "method", None) != name:
                    raise TypeError(f"entry point {point.value} is no adapter class of method {name!r}")
                self.register(loaded)
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._known or name in entry_points(group=ENTRY_POINTS).names

    def __setitem__(self, name: str, adapter_class: type[Adapter]) -> None:
        self._known[name] = adapter_class

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._known, *entry_points(group=ENTRY_POINTS).names)))

    def __len__(self) -> int:
        return len(list(iter(self)))
