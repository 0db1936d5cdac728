from collections.abc import Callable
from typing import Any, TypeVar, overload

from llvmlite.ir import IRBuilder, Value

from .types import Type

C = TypeVar("C", bound=type)

class _Array:
    data: Value

class Context:
    def make_array(self, kind: Type) -> Callable[[Context, IRBuilder, Value], _Array]: ...
    def get_dummy_value(self) -> Value: ...

class models:
    class PrimitiveModel:
        def __init__(self, manager: object, kind: Type, representation: object) -> None: ...

def register_model(kind: type[Type]) -> Callable[[C], C]: ...
def lower_builtin(symbol: object, *kinds: type[Type]) -> Callable[[Callable[..., object]], object]: ...
@overload
def intrinsic(function: Callable[..., object], /) -> Callable[..., Any]: ...
@overload
def intrinsic(*, prefer_literal: bool = ...) -> Callable[[Callable[..., object]], Callable[..., Any]]: ...
