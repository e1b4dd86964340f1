"""The pure parts of the kernel bench: what becomes of times and probes, which shapes it knows, what it refuses."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from bench.kernels import check, command, shapes, table
from bench.kernels.__main__ import arguments, main
from bench.kernels.both import LOOPS, Both
from bench.kernels.contender import Contender, Ours, build_library, open_library, random_weights
from bench.kernels.limits import Limits
from bench.kernels.measure import Peaks
from bench.kernels.statistics import Sample, Work, least_seconds, paired, spread, steady
from bench.peers.registry import PEERS, load_peer

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.machine import KNOWN_ISAS, Machine, missing_flags
from fiddlerc.codegen.targets import TARGETS
from fiddlerc.hardware import load_hardware

QWEN = shapes.load_shape("qwen3")


def sample(
    seconds: float = 1.0,
    work: Work = Work(10**9, 0),  # noqa: B008  frozen
    read: tuple[float, float] = (1.0, 1.0),
    peak: tuple[float, float] = (100.0, 100.0),
    others: float = 0.0,
) -> Sample:
    return Sample(seconds, (work,), read, peak, others)


def test_roofline_takes_the_slower_of_memory_and_arithmetic() -> None:
    assert least_seconds(Work(bytes=2 * 10**9, flops=10**9), read_gbps=10, peak_gflops=100) == pytest.approx(0.2)
    assert least_seconds(Work(bytes=10**9, flops=10**11), read_gbps=10, peak_gflops=100) == pytest.approx(1.0)


def test_roofline_is_of_the_probes_around_the_calls_and_of_all_calls() -> None:
    works = (Work(10**9, 0), Work(3 * 10**9, 0))
    found = Sample(1.0, works, read_gbps=(4.0, 6.0), peak_gflops=(100.0, 100.0), others=0.0)
    assert found.roofline == pytest.approx(4 / 5)


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        (sample(), True),
        (sample(peak=(100, 89)), False),
        (sample(peak=(91, 100)), True),
        (sample(others=0.2), False),
        (sample(read=(33, 54)), False),
        (sample(read=(48, 54)), True),
        # Arithmetic is the limit whichever bandwidth it was: the regime does not matter.
        (sample(read=(33, 54), work=Work(10**6, 10**9)), True),
    ],
)
def test_disturbed_samples_are_told(found: Sample, kept: bool) -> None:
    assert steady(found, best_peak=100) is kept


def test_the_peak_is_the_best_of_many_probes_before_the_first_row() -> None:
    bursts = itertools.chain([40.0, 95.0], itertools.repeat(50.0))
    peaks = Peaks()
    peaks.search(cast(Limits, SimpleNamespace(peak_gflops=lambda: next(bursts))), seconds=0.01)
    assert peaks.best == 95.0


def test_a_sample_waits_for_the_best_peak_but_not_for_ever() -> None:
    peaks = Peaks(best=100.0)
    bursts = itertools.chain([40.0, 89.0, 95.0], itertools.repeat(50.0))
    limits = cast(Limits, SimpleNamespace(peak_gflops=lambda: next(bursts)))
    assert peaks.wait(limits, math.inf) == 95.0
    assert peaks.wait(limits, time.perf_counter() + 0.01) == 50.0
    assert Peaks().wait(limits, math.inf) == 50.0, "nothing is known yet"


def test_pairs_are_by_round_and_free_of_the_machines_state() -> None:
    # Twice as slow in a round where the memory was twice as slow: as fast as before.
    ours = [sample(seconds=1.0, read=(4, 4)), sample(seconds=2.0, read=(2, 2)), None]
    peer = [sample(seconds=2.0, read=(4, 4)), sample(seconds=4.0, read=(2, 2)), sample()]
    assert paired(ours, peer) == pytest.approx([2.0, 2.0])


def test_spread_has_median_and_quartiles() -> None:
    found = spread([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)
    assert spread([7.0]).low == 7.0
    with pytest.raises(ValueError, match="no values"):
        spread([])


def test_a_row_counts_what_it_leaves_out_and_says_when_nothing_is_left() -> None:
    good, bad = sample(seconds=2.0), sample(seconds=9.0, peak=(100.0, 50.0))
    peaks = Peaks()
    for s in (good, bad):
        peaks.see(s)
    figures = table.row({"ours": [good, bad, good], "torch": [bad, bad, bad]}, peaks)["figures"]
    assert (figures["ours"]["rounds"], figures["ours"]["rejected"]) == (3, 1)
    assert figures["ours"]["roofline"]["median"] == pytest.approx(0.5)
    assert figures["torch"]["rejected"] == 3 and figures["torch"]["us"] == pytest.approx(9e6)
    row = {"shape": vars(QWEN), "mode": "expert", "threads": 2, "isa": "avx2", "tokens": 4, "figures": figures}
    assert "DISTURBED" in table.line(row)
    printed = table.pivot([row])
    assert "qwen3 2048x768, expert, 2 threads, avx2" in printed
    assert "| ours | 50 |" in printed and "| torch | 11? |" in printed
    slower = row | {"figures": figures | {"slow": {"ours_times_faster": {"median": 9.0}}}}
    assert table.best_peers([row, slower | {"tokens": 8}]).endswith("avx2 | 4.50 torch | 4.50 torch |")


def test_who_uses_more_cpus_than_threads_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter((0.0, 1.0, 0.0, 2.0))  # begin and end of a call that takes a second: one CPU, then two
    monkeypatch.setattr(
        command, "time", SimpleNamespace(sleep=id, perf_counter=itertools.count().__next__, process_time=clock.__next__)
    )
    fair, greedy = (cast(Contender, SimpleNamespace(name=name, computes=True)) for name in ("fair", "greedy"))
    task = command._Task(call=None, work=[], first=[], errors=lambda _: [0.0])
    assert command._check([fair, greedy], task, tokens=4, threads=1) == {"fair": 0.0}
    assert "4 tokens without greedy: it used 2.0 CPUs, for 1 threads" in capsys.readouterr().err


def test_every_shape_file_is_read() -> None:
    names = sorted(path.stem for path in shapes.FOLDER.glob("*.json"))
    assert names == ["deepseek-v3", "gpt-oss", "mixtral", "olmoe", "phi", "qwen3"]
    assert all(shapes.load_shape(name).top_k >= 2 for name in names)
    assert (QWEN.expert_bytes, QWEN.row_flops) == (3 * 2048 * 768 * 2, 6 * 2048 * 768)
    assert shapes.load_shape("64x32").intermediate_size == 32


def test_wrong_shapes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FiddlerError, match="unknown shape: found 'qwen4', expected deepseek-v3"):
        shapes.load_shape("qwen4")
    monkeypatch.setattr(shapes, "FOLDER", tmp_path)
    fields = {k: v for k, v in vars(QWEN).items() if k != "name"}
    (tmp_path / "a.json").write_text(json.dumps(fields | {"layers": 3}))
    with pytest.raises(FiddlerError, match=r"wrong fields in a\.json"):
        shapes.load_shape("a")
    (tmp_path / "a.json").write_text(json.dumps(fields | {"top_k": 129}))
    with pytest.raises(FiddlerError, match=r"wrong sizes in a\.json"):
        shapes.load_shape("a")


def test_rotation_is_beyond_the_cache_or_refused() -> None:
    cache, large = 32 << 20, 352 << 20
    assert shapes.rotation(QWEN.expert_bytes, cache, 4 << 30, layouts=2) * QWEN.expert_bytes >= 4 * cache
    assert shapes.rotation(large, cache, 4 << 30, layouts=2) == 3
    assert shapes.rotation(large, cache, 4 << 30, layouts=6) == 1  # one is more than four caches already
    with pytest.raises(FiddlerError, match=r"do not fit: found 2\.1 GiB needed, expected at most 1\.0 GiB") as refused:
        shapes.rotation(large, cache, 1 << 30, layouts=6)
    assert refused.value.hint is not None and refused.value.hint.startswith("--memory 3")


@pytest.mark.parametrize("tokens", [1, 4, 64])
def test_routings_are_distinct_per_token_and_new_while_few_experts_are_active(tokens: int) -> None:
    drawn = shapes.draw_routings(QWEN, tokens, 8, torch.Generator().manual_seed(1))
    assert len(drawn) == 8
    for ids in drawn:
        assert ids.shape == (tokens, QWEN.top_k) and ids.dtype is torch.int64
        assert int(ids.min()) >= 0 and int(ids.max()) < QWEN.num_experts
        assert all(len(row.unique()) == QWEN.top_k for row in ids)
    if tokens <= 4:
        pairs = itertools.pairwise(drawn)
        assert all(not set(a.flatten().tolist()) & set(b.flatten().tolist()) for a, b in pairs)


def test_a_layer_of_fewer_experts_than_a_token_takes_is_refused() -> None:
    with pytest.raises(FiddlerError, match="too few experts for a layer of qwen3: found 4, expected at least 8"):
        command.run(arguments().parse_args(["--shapes", "qwen3", "--layer", "--experts", "4", "--tokens", "1"]))


def test_files_that_cannot_be_written_are_refused_before_measuring(tmp_path: Path) -> None:
    for option in ("--json", "--plot"):
        with pytest.raises(FiddlerError, match="cannot write"):
            command.run(arguments().parse_args([option, str(tmp_path / "nowhere" / "x.png"), "--tokens", "1"]))


def test_peers_are_checked_against_fp32() -> None:
    shape = shapes.load_shape("48x40")
    weights = random_weights(shape, 3, torch.Generator().manual_seed(1))
    x = torch.randn(5, 48).bfloat16()
    ids = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 0], [2, 1]])
    gates = torch.rand(5, 2)
    peer = load_peer("torch")
    peer.prepare(weights, shape, True)
    expected = check.layer_reference(weights, x, ids, gates)
    found = peer.layer(x, ids, gates)
    assert check.require("torch", 5, [check.error(found, expected)]) <= check.TOLERANCE
    with pytest.raises(FiddlerError, match="torch computes something else at 5 tokens"):
        check.require("torch", 5, [check.error(found.roll(1, 0), expected)])
    assert check.error(torch.full((5, 48), torch.nan), expected) == torch.inf


def test_unknown_and_missing_peers_are_named() -> None:
    with pytest.raises(FiddlerError, match="unknown peer: found 'mkl', expected torch, onednn"):
        load_peer("mkl")
    assert {"zentorch", "sglang", "vllm", "ggml", "transformers"} < set(PEERS)


def test_builds_for_another_machine_are_cut_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def build(shape: shapes.Shape, there: Machine | None) -> SimpleNamespace:
        asked.append(there)
        return SimpleNamespace(path=Path(__file__), spec=SimpleNamespace(name=shape.name))

    monkeypatch.setattr(command, "build_library", build)
    for options in ([], ["--hw", "a100"]):
        command.run(arguments().parse_args(["--shapes", "qwen3", "--build", str(tmp_path / "out"), *options]))
    assert asked == [None, load_hardware("a100").machine]
    monkeypatch.setattr("sys.argv", ["bench", "--hw", "a100"])
    with pytest.raises(SystemExit):
        main()
    assert "--hw says for which machine to --build" in capsys.readouterr().err


def test_libraries_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FiddlerError, match="no kernel library there") as refused:
        open_library(tmp_path, QWEN)
    assert refused.value.hint == f"python -m tests.bench.kernels --shapes qwen3 --build {tmp_path}"
    broken = tmp_path / "x.so"
    broken.write_bytes(b"no library")
    with pytest.raises(FiddlerError, match=r"cannot load the kernel library x\.so"):
        open_library(broken, QWEN)


def test_earlier_runs_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    args = arguments().parse_args(["--read", str(path)])
    for text in (None, "{}", "[1"):
        if text is not None:
            path.write_text(text)
        with pytest.raises(FiddlerError, match=r"cannot read .*x\.json"):
            command.run(args)


@pytest.mark.parametrize("wrong", [["--tokens", "0"], ["--threads", "two"], ["--isa", "sse"]])
def test_wrong_arguments_end_in_a_usage_message(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments().parse_args(wrong)
    assert f"argument {wrong[0]}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("isa", [isa for isa in KNOWN_ISAS if not TARGETS[isa].tiles_from])
def test_a_loop_of_reads_and_multiplies_stands_in_the_kernels_place(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing := missing_flags(isa):
        pytest.skip(f"{isa} needs CPU flags that are missing here: {' '.join(missing)}")
    monkeypatch.setattr("bench.kernels.both.LOOPS", dict(list(LOOPS.items())[::4]))
    shape = shapes.load_shape("128x72")
    weights = random_weights(shape, 3, torch.Generator().manual_seed(0))
    ours = Ours(build_library(shape), isa)
    both = Both(ours, shape, isa)
    task = command._Task(call=None, work=[], first=[], errors=lambda contender: [float("nan")])
    with torch.inference_mode():
        for contender in (ours, both):
            contender.prepare(weights, shape, layer=False)
            contender.set_threads(2)
        for tokens in (1, 5, 17, 40):
            assert both.expert(1, torch.ones(tokens, 128, dtype=torch.bfloat16)).shape == (tokens, 128)
            ids, gates = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
            assert both.layer(torch.ones(tokens, 128, dtype=torch.bfloat16), ids, gates).shape == (tokens, 128)
            assert command._check([both], task, tokens, threads=2) == {"both": 0.0}
    assert len(both._loops) == 2 and both.regions(1)[0].data_ptr() == ours.regions(1)[0].data_ptr()
    ours.close()
    both.close()


def test_no_loop_stands_for_tiles() -> None:
    with pytest.raises(FiddlerError, match="no loop for tiles: found amx_bf16, expected vectors"):
        Both(cast(Ours, None), QWEN, "amx_bf16")
