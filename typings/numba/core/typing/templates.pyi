from collections.abc import Callable

from numba.types import Type

class AbstractTemplate: ...

def infer_global(symbol: object) -> Callable[[type], object]: ...

class Signature:
    return_type: Type

def signature(result: Type, *arguments: Type) -> Signature: ...
