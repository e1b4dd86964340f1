"""Packed caches that were damaged, interrupted or have no room: told, packed again, or refused; never served."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import runtime_samples
import torch
from runtime_samples import checkpoint_tensors, write_checkpoint

from fiddler_runtime import packed_cache
from fiddler_runtime.errors import FiddlerError, FiddlerWarning
from fiddler_runtime.kernels import Kernels
from fiddler_runtime.loading import open_library
from fiddler_runtime.packed_cache import PackedCache
from fiddler_runtime.plan import Plan
from fiddler_runtime.weights import ExpertWeights

SPEC = runtime_samples.small_spec()


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernels]:
    plan: Plan = runtime_samples.write_sample_plan(tmp_path_factory.mktemp("plans") / "small", SPEC)
    with open_library(plan).open(threads=1) as opened:
        yield opened


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", SPEC, checkpoint_tensors(SPEC), shards=2)


@pytest.fixture
def cache(model: Path, tmp_path: Path) -> PackedCache:
    """Not filled yet."""
    return cache_of(ExpertWeights.load(model), tmp_path)


def cache_of(weights: ExpertWeights, tmp_path: Path) -> PackedCache:
    weights.check(SPEC)
    cache = PackedCache.open(tmp_path / "cache", SPEC, weights)
    assert cache is not None
    return cache


def files(cache: PackedCache) -> list[Path]:
    return sorted(cache.path.glob("layer-*"))


def leftovers(cache: PackedCache) -> list[str]:
    return [path.name for path in cache.path.iterdir() if path not in files(cache) and path.name != ".lock"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), "is truncated"),
        (lambda path: os.truncate(path, 5000), "is truncated"),
        (lambda path: os.truncate(path, 0), "is truncated"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "is longer than its header says"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"packed/1", b"packed/9")), "format fiddler-packed/9"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"layer": "2"', b'"layer": "1"')), "layer 1"),
        (lambda path: path.write_bytes(b"\xff" * 9000), "is not a safetensors file"),
    ],
    ids=["a byte", "most", "all", "more", "another format", "another layer", "not safetensors"],
)  # fmt: skip
def test_a_damaged_file_is_packed_again(cache: PackedCache, kernels: Kernels, damage: object, said: str) -> None:
    cache.fill(kernels)
    assert [path.name for path in files(cache)] == ["layer-00001.safetensors", "layer-00002.safetensors"]
    good = [path.read_bytes() for path in files(cache)]
    untouched = files(cache)[0].stat().st_mtime_ns
    damage(files(cache)[1])  # type: ignore[operator]
    assert cache.missing_bytes() == cache.nbytes // 2
    with pytest.raises(FiddlerError, match=said) as refused:
        cache.map()
    assert str(refused.value.hint).startswith(f"rm {files(cache)[1]}")
    with pytest.warns(FiddlerWarning, match=f"{said}.*it is packed again"):
        assert cache.fill(kernels) == cache.nbytes // 2
    assert [path.read_bytes() for path in files(cache)] == good
    assert files(cache)[0].stat().st_mtime_ns == untouched


def test_a_file_of_another_cache_is_not_taken(
    cache: PackedCache, kernels: Kernels, model: Path, tmp_path: Path
) -> None:
    cache.fill(kernels)
    other_model = write_checkpoint(
        tmp_path / "other", SPEC, {name: tensor * 2 for name, tensor in checkpoint_tensors(SPEC).items()}, shards=2
    )
    other = cache_of(ExpertWeights.load(other_model), tmp_path)
    assert other.path != cache.path
    other.path.mkdir()
    for path in files(cache):
        shutil.copy(path, other.path)
    assert other.missing_bytes() == other.nbytes
    with pytest.raises(FiddlerError, match="is not of this cache: found format fiddler-packed/1, key "):
        other.map()


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_flipped_bit_is_found_by_verify(cache: PackedCache, kernels: Kernels, where: str) -> None:
    cache.fill(kernels)
    cache.verify(threads=2)
    path = files(cache)[0]
    data = bytearray(path.read_bytes())
    data[-1 if where == "last" else len(data) - cache.nbytes // 2] ^= 1
    path.write_bytes(data)
    assert cache.missing_bytes() == 0, "only reading everything can tell"
    with pytest.raises(FiddlerError, match=f"{path} is damaged: found other bytes for expert") as told:
        cache.verify(threads=2)
    assert told.value.found is not None
    assert f"expert {0 if where == 'first' else SPEC.num_experts - 1}:" in told.value.found
    assert str(told.value.hint).startswith(f"rm {path}")
    path.unlink()
    cache.fill(kernels)
    cache.verify(threads=1)


class Interrupted(type(ExpertWeights.random())):  # type: ignore[misc]
    """Random weights whose reading is interrupted at one expert."""

    at: tuple[int, int] | None = None

    def read(self, layer: int, expert: int, *out: torch.Tensor) -> None:
        if (layer, expert) == self.at:
            raise KeyboardInterrupt
        super().read(layer, expert, *out)


def test_an_interrupted_packing_goes_on_where_it_stopped(kernels: Kernels, tmp_path: Path) -> None:
    weights = Interrupted(1)
    weights.at = (2, 3)
    cache = cache_of(weights, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cache.fill(kernels)
    assert [path.name for path in files(cache)] == ["layer-00001.safetensors"]
    assert leftovers(cache) == []
    (cache.path / ".layer-00002.safetensors.partial").write_bytes(b"left by a process that was killed")
    first = files(cache)[0].stat().st_mtime_ns
    weights.at = None
    assert cache.fill(kernels) == cache.nbytes // 2
    assert files(cache)[0].stat().st_mtime_ns == first
    assert leftovers(cache) == []
    cache.verify(threads=1)


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Files beyond that size cannot be written: EFBIG, as a full disk's ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_leaves_finished_layers(
    cache: PackedCache, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = packed_cache.LayerWriter.write

    def write_until_full(self: packed_cache.LayerWriter, expert: int, packed: torch.Tensor) -> None:
        # The second layer's third expert does not fit.
        limit = 4096 + 2 * packed.nbytes + 100 if self._target.layer == 2 else 1 << 30
        with largest_file(limit):
            write(self, expert, packed)

    monkeypatch.setattr(packed_cache.LayerWriter, "write", write_until_full)
    with pytest.raises(FiddlerError, match=r"cannot use the packed cache .*: found File too large, .* free") as told:
        cache.fill(kernels)
    assert "--packed-cache OTHER_FOLDER" in str(told.value.hint)
    assert [path.name for path in files(cache)] == ["layer-00001.safetensors"]
    assert leftovers(cache) == []
    monkeypatch.undo()
    assert cache.fill(kernels) == cache.nbytes // 2
    cache.verify(threads=1)


def test_too_little_disk_is_told_before_any_work(
    cache: PackedCache, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fiddler_runtime import preflight

    monkeypatch.setattr(PackedCache, "free_bytes", lambda self: 1000)
    needs = preflight.survey_packing(SPEC, cache)
    with pytest.raises(FiddlerError, match="not enough disk for small: found 1000 B free, expected ") as told:
        needs.check()
    assert told.value.hint == "--packed-cache OTHER_FOLDER, on a disk with more room"
    assert not cache.path.exists()


@pytest.mark.parametrize("where", ["a file", "below a file"])
def test_a_folder_that_cannot_be(kernels: Kernels, model: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    weights = ExpertWeights.load(model)
    weights.check(SPEC)
    folder = tmp_path / "file" if where == "a file" else tmp_path / "file" / "deeper"
    cache = PackedCache.open(folder, SPEC, weights)
    assert cache is not None
    with pytest.raises(FiddlerError, match=r"cannot use the packed cache .*: found Not a directory") as told:
        cache.fill(kernels)
    assert told.value.expected == "a writable folder with room for it"
