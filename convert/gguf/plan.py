"""A GGUF artifact laid out once per run: tensors in writing order with their types, sizes, parts and metadata."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..fitting.weights import Weights, by_kind
from ..models.geometry import Geometry
from ..source import Source
from .metadata import Importance, Metadata, model_metadata, provenance_keys
from .mixes import tensor_types
from .names import step_shapes
from .variant import GgufVariant
from .writer import Part, TensorInfo, plan_parts

Step = tuple[TensorInfo, ...]


@dataclass(frozen=True)
class GgufPlan:
    """Everything about the files of one run except the tensors' values.

    label  name of the artifact in tables and manifests
    steps  tensors in writing order: embeddings, each layer, final norm and head; one step is written at a time
    parts  the files with their headers
    """

    label: str
    steps: tuple[Step, ...]
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """Of all files, headers and padding included."""
        return sum(part.bytes for part in self.parts)

    @cached_property
    def types(self) -> dict[str, str]:
        """Name of the type of every tensor."""
        return {tensor.name: tensor.type for step in self.steps for tensor in step}

    def layer(self, step: int) -> int | None:
        """The layer that a step writes; None for the first and the last step."""
        return step - 1 if 0 < step < len(self.steps) - 1 else None

    def first_step(self, done: int) -> int | None:
        """The step behind the first `done` tensors, which may be the end; None when they end inside a step."""
        for index, step in enumerate(self.steps):
            if done <= 0:
                return index if done == 0 else None
            done -= len(step)
        return len(self.steps) if done == 0 else None

    def weights(self) -> Weights:
        """Bytes by kind, for the manifest."""
        sizes = {tensor.name: tensor.bytes for step in self.steps for tensor in step}
        return by_kind(len(self.steps) - 2, sizes)


def make_plan(source: Source, variant: GgufVariant, importance: Importance | None) -> GgufPlan:
    """Lay out `variant` of `source`; `importance`: what the metadata say of the calibration.

    InputError for a tensor name that the model does not have, and for a part size that a tensor does not fit.
    """
    steps = plan_steps(variant, source.geometry)
    tensors = tuple(tensor for step in steps for tensor in step)
    parts = plan_parts(variant.stem, plan_metadata(source, variant, importance), tensors, variant.part_bytes)
    return GgufPlan(variant.label, steps, tuple(parts))


def plan_steps(variant: GgufVariant, geometry: Geometry) -> tuple[Step, ...]:
    """The tensors of every step, with the types of the mix, the overrides and the plan file."""
    types = tensor_types(
        variant.mix, geometry, importance=variant.importance, overrides=variant.overrides, plan=variant.plan
    )
    return tuple(tuple(TensorInfo(n, s, types[n]) for n, s in step.items()) for step in step_shapes(geometry))


def plan_metadata(source: Source, variant: GgufVariant, importance: Importance | None) -> Metadata:
    """All keys of the first file."""
    name = variant.stem.removesuffix(f"-{variant.mix.name}").removesuffix("-planned")
    keys = model_metadata(source, name, variant.mix.file_type, importance)
    return keys | provenance_keys(source, variant.settings)
