"""Puts classes in the place of another library's."""

from __future__ import annotations

import sys


class Replacement:
    """Our classes and those of another library that they stand for, by the same names.

    Args:
        packages: whose modules are looked through, by the first part of their names.
        theirs: the module that defines the other library's classes, or that has imported them.
        ours: our classes.
    """

    def __init__(self, packages: tuple[str, ...], theirs, ours: tuple[type, ...]):
        self.packages = packages
        self.ours = {cls.__name__: cls for cls in ours}
        self.theirs = {name: getattr(theirs, name) for name in self.ours}

    def apply(self) -> None:
        """Ours, in every module that has imported theirs; as often as one likes."""
        self._replace(self.theirs, self.ours)

    def undo(self) -> None:
        """Theirs again."""
        self._replace(self.ours, self.theirs)

    def _replace(self, present: dict[str, type], other: dict[str, type]) -> None:
        modules = [module for name, module in sys.modules.items() if name.split(".")[0] in self.packages]
        for module in modules:
            for name, cls in other.items():
                if vars(module).get(name) is present[name]:
                    setattr(module, name, cls)
