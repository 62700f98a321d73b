"""Abstract base classes: a subclass that lacks a method is refused with one sentence."""

import inspect
from abc import ABC
from typing import Any, Self

from layerwise.errors import LayerwiseError


class Abstract(ABC):  # noqa: B024  its subclasses have the methods
    """Base of classes with `abc.abstractmethod`s, which a subclass has to define before it can be instantiated.

    Raises:
        LayerwiseError: an incomplete class is instantiated; the sentence names class and method.

    >>> from abc import abstractmethod
    >>> class Shape(Abstract):
    ...     @abstractmethod
    ...     def area(self, scale): ...
    >>> class Square(Shape): ...
    >>> Square()
    Traceback (most recent call last):
    layerwise.errors.LayerwiseError: class Square has no area; define area(self, scale) in it.
    """

    def __new__(cls, *given: Any, **options: Any) -> Self:
        missing = min(cls.__abstractmethods__, default=None)
        if missing is not None:
            words = ", ".join(inspect.signature(getattr(cls, missing)).parameters)
            raise LayerwiseError(f"class {cls.__name__} has no {missing}; define {missing}({words}) in it.")
        return super().__new__(cls)
