"""Shards are announced in their order of use and released after the last use."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmquant.convert.checkpoints.schedule import Schedule, joined, step_of
from mmquant.convert.checkpoints.store import LocalFolder, ShardStore, TensorInfo
from mmquant.convert.models.minimax_m2 import Geometry

LAYERS = 4
GEOMETRY = Geometry(LAYERS, 64, 4, 2, 16, 4, 2, 64, 64, 16, 1e4, 1e-6, 64)
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class Recorder:
    """A store that only listens."""

    is_local = False

    def __init__(self) -> None:
        self.plans: list[list[str]] = []
        self.released: list[str] = []

    def plan(self, shards: list[str]) -> None:
        self.plans.append(shards)

    def release(self, shard: str) -> None:
        self.released.append(shard)


def layer(index: int, part: str = "self_attn.q_proj.weight") -> str:
    return f"model.layers.{index}.{part}"


def make(places: dict[str, str]) -> tuple[Schedule, Recorder]:
    store = Recorder()
    tensors = {name: TensorInfo(name, shard, "F32", (1,), 0, 4) for name, shard in places.items()}
    listening: ShardStore = store  # type: ignore[assignment]
    return Schedule(listening, tensors, GEOMETRY), store


# Every layer begins in the shard in which the one before it ends; embeddings and head share one.
PLACES = {EMBED: "a", HEAD: "a", NORM: "z"}
PLACES |= {layer(i): f"s{i}" for i in range(LAYERS)} | {layer(i, "mlp.weight"): f"s{i + 1}" for i in range(LAYERS)}


def test_steps() -> None:
    found = [step_of(n, GEOMETRY) for n in (EMBED, layer(0), layer(3), "model.layers.3.mlp", NORM, HEAD)]
    assert found == [0, 1, 4, 4, 5, 5]


def test_a_pass_plans_once_and_releases_each_shard_after_its_last_use() -> None:
    schedule, store = make(PLACES)
    schedule.reading(EMBED)
    assert store.plans == [["a", "s0", "s1", "s2", "s3", "s4", "z"]]
    for index in range(LAYERS):
        for part in ("self_attn.q_proj.weight", "mlp"):
            schedule.reading(layer(index, part))
            assert store.released == [f"s{i}" for i in range(index)]
    for name in (NORM, HEAD):
        schedule.reading(name)
        assert store.released == ["s0", "s1", "s2", "s3", "s4"]  # the head's shard is in use still
    assert len(store.plans) == 1


@pytest.mark.parametrize("start", range(LAYERS))
def test_a_continued_pass_plans_from_its_layer(start: int) -> None:
    schedule, store = make(PLACES)
    schedule.reading(layer(start))
    assert store.plans == [[f"s{i}" for i in range(start, LAYERS + 1)] + ["a", "z"]]


def test_a_second_pass_and_replayed_layers_plan_anew() -> None:
    schedule, store = make(PLACES)
    for name in (EMBED, layer(2), layer(1)):
        schedule.reading(name)
    assert len(store.plans) == 2
    assert store.plans[1][0] == "s1"
    schedule.reading(layer(2))
    assert store.released == ["s0", "s1", "s1"]


def test_a_tied_head_fetches_nothing_ahead() -> None:
    schedule, store = make(PLACES)
    for name in (EMBED, layer(0), NORM, EMBED):
        schedule.reading(name)
    assert len(store.plans) == 1


def test_a_reader_that_looks_back_keeps_what_it_needs() -> None:
    schedule, store = make(PLACES)
    with schedule.kept(1), schedule.kept(0):
        for index in range(1, LAYERS):
            schedule.reading(layer(index))
            schedule.reading(layer(index - 1))
            assert f"s{index - 1}" not in store.released
    assert len(store.plans) == 1
    assert store.released == ["s1"]


def test_a_local_folder_is_read_one_step_ahead(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(bytes(100))
    (tmp_path / "t").write_bytes(bytes(10))
    infos = [TensorInfo(EMBED, "s", "U8", (20,), 0, 20), TensorInfo(layer(0), "s", "U8", (30,), 20, 30)]
    infos += [TensorInfo(layer(0, "b"), "s", "U8", (7,), 50, 7), TensorInfo(layer(1), "t", "U8", (10,), 0, 10)]
    infos += [TensorInfo(layer(2), "missing", "U8", (9,), 0, 9)]
    schedule = Schedule(LocalFolder(tmp_path), {i.name: i for i in infos}, GEOMETRY)
    for name, size in ((EMBED, 37), (layer(0), 47), (layer(1), 47), (layer(3), 47)):
        schedule.reading(name)
        schedule.reading(name)
        schedule.ahead.join()
        assert schedule.ahead.bytes == size


def test_neighbouring_ranges_are_one() -> None:
    a, b = Path("a"), Path("b")
    assert joined([(b, 0, 4), (a, 5, 7), (a, 0, 5), (a, 9, 10)]) == [(a, 0, 7), (a, 9, 10), (b, 0, 4)]
