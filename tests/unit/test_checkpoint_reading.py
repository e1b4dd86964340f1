"""Reading checkpoints: the same tensors as safetensors' own reader gives, sharded or not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import TINY_MIXTRAL, save_family

from fiddler_runtime.checkpoint import Checkpoint, TensorInfo, check_identity, has_weights, read_config
from fiddler_runtime.errors import FiddlerError
from fiddlerc.frontend import load_model

EXPERT = "model.layers.3.block_sparse_moe.experts.5.w2.weight"


def read(checkpoint: Checkpoint, info: TensorInfo) -> torch.Tensor:
    out = torch.full(info.shape, torch.nan, dtype=info.torch_dtype)
    checkpoint.read_part(info.name, 0, out)
    return out


def test_every_tensor_of_the_demo_model() -> None:
    checkpoint = Checkpoint.open(TINY_MIXTRAL)
    expected = load_file(TINY_MIXTRAL / "model.safetensors")
    assert set(checkpoint.tensors) == set(expected)
    for name, info in checkpoint.tensors.items():
        assert info.dtype == "BF16"
        assert info.elements == expected[name].numel()
        assert torch.equal(read(checkpoint, info), expected[name]), name


def test_shards(tmp_path: Path) -> None:
    folder = save_family("qwen3_moe", tmp_path / "m", shards="100KB")
    expected = {k: v for shard in folder.glob("model-*.safetensors") for k, v in load_file(shard).items()}
    checkpoint = Checkpoint.open(folder)
    assert len({info.file for info in checkpoint.tensors.values()}) > 3
    assert set(checkpoint.tensors) == set(expected)
    for name, info in checkpoint.tensors.items():
        assert torch.equal(read(checkpoint, info), expected[name]), name


def test_a_read_that_comes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call gives at most 2 GiB, and may give less."""
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:1000]], offset))
    checkpoint = Checkpoint.open(TINY_MIXTRAL)
    expected = load_file(TINY_MIXTRAL / "model.safetensors")[EXPERT]
    assert torch.equal(read(checkpoint, checkpoint.tensors[EXPERT]), expected)


def test_reading_into_a_part_of_a_larger_tensor() -> None:
    arena = torch.zeros(3, 128, 256, dtype=torch.bfloat16)
    Checkpoint.open(TINY_MIXTRAL).read_part(EXPERT, 0, arena[1])
    assert torch.equal(arena[1], load_file(TINY_MIXTRAL / "model.safetensors")[EXPERT])
    assert not arena[0].any()
    assert not arena[2].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_float_types(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "a": torch.randn(3, 5).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "scalar": torch.ones((), dtype=dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for name, info in checkpoint.tensors.items():
        assert torch.equal(read(checkpoint, info), tensors[name])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_tensors_are_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"w": torch.zeros(4, 4).to(dtype)}, tmp_path / "model.safetensors")
    info = Checkpoint.open(tmp_path).tensors["w"]
    with pytest.raises(FiddlerError, match=r"the tensor w in model\.safetensors cannot be used") as caught:
        _ = info.torch_dtype
    assert caught.value.hint is not None


def test_wrong_requests() -> None:
    checkpoint = Checkpoint.open(TINY_MIXTRAL)
    with pytest.raises(ValueError, match=r"has 32768 elements, not 1 \+ 32768"):
        checkpoint.read_part(EXPERT, 1, torch.empty(128, 256, dtype=torch.bfloat16))
    with pytest.raises(FiddlerError, match=r"another dtype: found torch.bfloat16, expected torch.float32"):
        checkpoint.read_part(EXPERT, 0, torch.empty(128, 256))
    with pytest.raises(ValueError, match="contiguous"):
        checkpoint.read_part(EXPERT, 0, torch.empty(256, 128, dtype=torch.bfloat16).T)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.randn(64, 64)}, path)
    checkpoint = Checkpoint.open(tmp_path)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(FiddlerError, match="truncated while it was read"):
        checkpoint.read_part("w", 0, torch.empty(64, 64))
    path.unlink()
    with pytest.raises(FiddlerError, match="cannot read"):
        checkpoint.read_part("w", 0, torch.empty(64, 64))


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    """A sparse 64 GB shard opens at once."""
    header = b'{"w":{"dtype":"BF16","shape":[32000000000],"data_offsets":[0,64000000000]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 64_000_000_000)
    assert Checkpoint.open(tmp_path).tensors["w"].elements == 32_000_000_000


def test_the_identity_tells_one_matrix_of_a_large_file(tmp_path: Path) -> None:
    elements, matrix = 261 << 20, 4 << 20  # of 2 bytes; all holes but what is written
    header = json.dumps({"a": {"dtype": "BF16", "shape": [elements], "data_offsets": [0, 2 * elements]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * elements)
    before = Checkpoint.open(tmp_path).identity()
    assert Checkpoint.open(tmp_path).identity() == before
    for place in (0, 3, 64):
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.seek(8 + len(header) + place * 2 * matrix + 5000)
            file.write(bytes([1 + place]) * 2 * matrix)
        after = Checkpoint.open(tmp_path).identity()
        assert after != before
        before = after


def test_identity_of_another_model(tmp_path: Path) -> None:
    spec = load_model("mixtral")
    with pytest.raises(FiddlerError) as caught:
        check_identity(spec, TINY_MIXTRAL)
    error = caught.value
    assert error.what == f"{TINY_MIXTRAL} is not the plan's model (mixtral-8x7b)"
    assert (error.found, error.expected) == ("hidden_size = 128", "hidden_size = 4096")
    assert error.hint is not None
    assert "mixtral-8x7b's directory" in error.hint
    (tmp_path / "config.json").write_text('{"hidden_size": 4096}')
    with pytest.raises(FiddlerError, match="found no hidden_act"):
        check_identity(spec, tmp_path)
    check_identity(load_model(str(TINY_MIXTRAL)), TINY_MIXTRAL)


def test_config_and_weights_of_a_directory(tmp_path: Path) -> None:
    assert read_config(TINY_MIXTRAL)["model_type"] == "mixtral"
    assert has_weights(TINY_MIXTRAL)
    assert not has_weights(tmp_path)
    with pytest.raises(FiddlerError, match=r"no such model directory: .*nowhere"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(FiddlerError, match="no such model directory"):
        Checkpoint.open(TINY_MIXTRAL / "config.json")


def test_an_expert_that_is_not_there(tmp_path: Path) -> None:
    folder = save_family("olmoe", tmp_path / "m")
    spec = load_model(str(folder))
    tensors = load_file(folder / "model.safetensors")
    gone = spec.expert_tensors.up.format(layer=1, expert=4)
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FiddlerError, match=f"found no tensor {gone}, expected all 54"):
        Checkpoint.open(folder).check_experts(spec)
