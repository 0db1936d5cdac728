class Type:
    dtype: Type
    bitwidth: int
    count: int
    literal_value: str
    def __init__(self, name: str) -> None: ...
    def __call__(self, *arguments: Type) -> Type: ...

class Float(Type): ...

float32: Type
int64: Type
intp: Type
void: Type
