"""Puts a mistake into the product's own source, so that a test can show that it would notice."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any, NamedTuple


class Mutation(NamedTuple):
    """``old``, which the source of ``owner.function`` holds once, becomes ``new``."""

    owner: Any
    function: str
    old: str
    new: str

    def written(self) -> Any:
        """The function with the mistake, decorated as the original is."""
        original = getattr(self.owner, self.function)
        source = textwrap.dedent(inspect.getsource(original))
        assert source.count(self.old) == 1, f"{self.old!r} is not there once"
        namespace = dict(vars(inspect.getmodule(original)))  # type: ignore[arg-type]
        exec("from __future__ import annotations\n" + source.replace(self.old, self.new), namespace)
        return namespace[self.function]
