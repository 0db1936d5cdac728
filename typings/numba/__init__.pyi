"""What mmquant uses of numba, which has no types of its own."""

from collections.abc import Callable
from typing import TypeVar, overload

from . import types as types

F = TypeVar("F", bound=Callable[..., object])

@overload
def njit(function: F, /) -> F: ...
@overload
def njit(
    signature: str = ...,
    /,
    *,
    cache: bool = ...,
    fastmath: bool | set[str] = ...,
    nogil: bool = ...,
    error_model: str = ...,
    forceinline: bool = ...,
) -> Callable[[F], F]: ...
