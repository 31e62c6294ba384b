"""References that keep nothing alive."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Weak(Generic[T]):
    """A reference that does not keep its object alive. A deep copy of it refers to the copy of the object.

    An optimizer and what belongs to it refer to each other. If both references were strong, ``del optimizer`` would
    leave the memory of all states to the garbage collector, which comes late.
    """

    def __init__(self, value: T) -> None:
        self._reference = weakref.ref(value)

    def __call__(self) -> T:
        """Return the object itself."""
        value = self._reference()
        if value is None:
            raise ReferenceError("the optimizer no longer exists; keep a reference to it as long as it is needed")
        return value

    @property
    def exists(self) -> bool:
        """Whether the object is still there."""
        return self._reference() is not None

    def __reduce__(self) -> tuple[Any, ...]:
        return Weak, (self(),)
