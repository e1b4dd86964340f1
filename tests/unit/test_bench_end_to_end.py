"""The end-to-end bench on a tiny model and the simulated accelerator: its logic, and that all strategies agree."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.end_to_end import __main__ as program
from bench.end_to_end import command, measure, memory
from bench.end_to_end.algorithm1 import Algorithm1
from bench.end_to_end.configurations import Configuration, paper, select
from bench.end_to_end.models import Model, NoiseWeights, open_model
from bench.end_to_end.record import Record
from bench.end_to_end.replay import Replay
from bench.end_to_end.strategies import CONTENDERS, NAMES, Machine, usable
from bench.end_to_end.table import render
from runtime_samples import TINY_MIXTRAL, write_sample_plan

from fiddler_runtime.errors import FiddlerError, FiddlerWarning
from fiddler_runtime.lanes.expert import UnpackedExpert
from fiddler_runtime.loading import open_library
from fiddler_runtime.makespan import CPU, IDLE, RESIDENT, STREAMED
from fiddler_runtime.plan import Options, Plan
from fiddlerc.frontend import zoo

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_local_experts": 8,
    "tie_word_embeddings": False,
    "vocab_size": 256,
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 64,
    "num_local_experts": 8,
    "tie_word_embeddings": False,
    "vocab_size": 256,
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Built-in models that take milliseconds; returns the folder for results."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    for name, config in (("tiny", MIXTRAL), ("tiny-oss", GPT_OSS)):
        (folder / f"{name}.json").write_text(
            json.dumps({"name": f"{name}-whole", "source": "made up", "config": config})
        )
    monkeypatch.setattr(zoo, "_FOLDER", folder)
    return tmp_path / "out"


def open_all(model: Model, folder: Path) -> Plan:
    """A made-up plan for a model, whose latencies make every strategy's rule choose differently."""
    return write_sample_plan(folder / "plan", model.spec)


def add(record: Record, name: str, wanted: Configuration, tokens: int, step: float = 0.1) -> None:
    """A round of so many tokens."""
    seconds = [step * (index + 1) for index in range(tokens)]
    record.note(name, wanted, {"seconds": seconds, "tokens": [7] * (tokens - 1), "expert_calls": {"cpu": 3}})


# --only and the configurations


def test_the_papers_configurations_are_all_there():
    labels = [c.label for c in paper()]
    assert len(labels) == 16 + 4 + 4
    assert {"decode:32/64", "decode:256/512", "prefill:4096", "beam:16"} <= set(labels)


def test_only_names_strategies_scenarios_and_configurations_in_any_order():
    names, wanted = select(["decode:16/8", "cpu", "beam", "ours"], NAMES)
    assert names == ("ours", "cpu"), "in the order of the tables"
    assert [c.label for c in wanted] == ["decode:16/8", "beam:4", "beam:8", "beam:12", "beam:16"]
    assert select([], NAMES) == (NAMES, paper())


@pytest.mark.parametrize("item", ["theirs", "decode:0/8", "prefill:0", "beam:1", "decode:8"])
def test_only_refuses_what_is_not_measured(item: str):
    with pytest.raises(FiddlerError, match="decode:IN/OUT"):
        select([item], NAMES)


def test_strategies_that_need_an_accelerator_are_left_out_without_one():
    found, without = usable(NAMES, "none")
    assert [contender.name for contender in found] == ["ours", "cpu"]
    assert without == ["captured", "fiddler", "fiddler-code", "transformers", "streamed"]


# The record


def test_a_longer_answer_holds_the_shorter_ones(tmp_path: Path):
    record = Record(tmp_path / "results.json", {})
    add(record, "ours", Configuration("decode", 32, 128), 128)
    assert record.seconds("ours", Configuration("decode", 32, 64)) == pytest.approx(6.4)
    assert record.seconds("ours", Configuration("decode", 32, 256)) is None
    assert record.seconds("ours", Configuration("decode", 64, 64)) is None
    assert record.seconds("cpu", Configuration("decode", 32, 64)) is None


def test_a_round_that_was_cut_off_keeps_what_it_has_and_gives_way_to_a_whole_one(tmp_path: Path):
    record = Record(tmp_path / "results.json", {})
    wanted = Configuration("decode", 32, 128)
    add(record, "ours", wanted, 70)
    assert record.rounds("ours", Configuration("decode", 32, 64)) and not record.rounds("ours", wanted)
    add(record, "ours", wanted, 128)
    add(record, "ours", wanted, 128, 0.2)
    assert record.seconds("ours", wanted) == pytest.approx(1.5 * 12.8), "the median over rounds"
    assert len(record.runs["ours"]["decode:32"]) == 2


def test_the_record_is_read_back_and_refuses_another_setup(tmp_path: Path):
    path = tmp_path / "deep" / "results.json"
    record = Record.open(path, {"device": "simulated"})
    add(record, "ours", Configuration("prefill", 16, 1), 1)
    record.write()
    again = Record.open(path, {"device": "simulated"})
    assert again.runs == record.runs
    with pytest.raises(FiddlerError, match=r"other options: found device simulated, expected device cuda"):
        Record.open(path, {"device": "cuda"})
    path.write_text("{}")
    with pytest.raises(FiddlerError, match="cannot read the results"):
        Record.open(path, {})


def test_of_each_generation_the_longest_answer_is_run_the_quickest_first(tmp_path: Path):
    record = Record(tmp_path / "results.json", {})
    wanted = [Configuration("decode", 32, 64), Configuration("decode", 32, 128), Configuration("prefill", 16, 1)]
    record.predicted = {"ours": {c.label: float(c.new) for c in wanted}}
    todo = command._missing(record, "ours", wanted, rounds=2)
    assert [c.label for c in todo] == ["prefill:16", "prefill:16", "decode:32/128", "decode:32/128"]
    add(record, "ours", wanted[1], 128)
    add(record, "ours", wanted[1], 64)
    assert [c.label for c in command._missing(record, "ours", wanted, rounds=2)][2:] == ["decode:32/128"]
    assert [c.label for c in command._missing(record, "ours", wanted[:1], rounds=2)] == []


def test_tables_have_measured_predicted_and_ratios(tmp_path: Path):
    record = Record(tmp_path / "results.json", {}, {"lines": ["a machine"]})
    wanted = Configuration("decode", 32, 64)
    add(record, "ours", wanted, 64)
    add(record, "cpu", wanted, 64, 0.2)
    record.predicted = {"ours": {wanted.label: 3.2}, "cpu": {}}
    text = render(record)
    assert "| 32/64 | 10 (20) | 5 | 2.00 |" in text
    assert "| decode | – | – | – | – | – | 2.00 (1) | 1.26 |" in text
    assert "- a machine" in text
    assert "Not measured yet" in text and "prefill:512" in text


# Strategies


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "tiny-oss"])
def test_every_strategy_computes_the_same_model(tiny: Path, name: str):
    model = open_model(name, tiny, random=True, layers=2)
    plan = open_all(model, tiny)
    whole = model.without_experts()
    ids = command._prompt(model, 40)
    found, texts = {}, {}
    for contender in CONTENDERS:
        experts = contender.open(model, plan, Machine("simulated", 1), None)
        try:
            found[contender.name] = measure.logits(whole, experts, ids, model.spec)
            measure.compare(contender.name, found[contender.name], found, model.spec)
            replay = Replay(np.tile([[[0, 1], [2, 3]]], (50, 1, 1)), model.spec)
            replay.begin(40, 1)
            experts.reset_counters()
            windows = contender.capture and name == "tiny-oss"  # whose static cache counts in Python
            expected = pytest.warns(FiddlerWarning, match="counts in Python") if windows else nullcontext()
            with measure.attached(whole, experts, replay, capture=contender.capture), expected:
                texts[contender.name] = measure.generate(whole, ids, Configuration("decode", 40, 6), lambda *_: None)
                assert not contender.capture or command._captures(whole.captured) != windows
            calls = experts.counters()["expert_calls"]
            assert sum(calls.values()) == (6 * 2 * 8 if contender.name == "transformers" else 6 * 2 * 2)
        finally:
            experts.close()
    assert found["ours"] != found["transformers"], "computed by something else"
    # What stands beside them all is transformers' own code.
    worst = max(measure.distance(values, found["transformers"]) for values in found.values())
    assert 0 < worst <= measure.tolerance(model.spec)
    assert all(text.shape == (1, 46) for text in texts.values())
    assert texts["captured"].tolist() == texts["ours"].tolist()


def test_a_strategy_that_computes_something_else_is_found_out(tiny: Path):
    spec = open_model("tiny", tiny, random=True, layers=1).spec
    with pytest.raises(FiddlerError, match="cpu computes something else than ours"):
        measure.compare("cpu", [1.0, 2.0], {"ours": [1.0, 2.1]}, spec)


def test_a_generation_that_was_cut_off_goes_on_with_its_tokens(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    model = open_model("tiny", tiny, random=True, layers=2)
    plan = open_all(model, tiny)
    whole, ids = model.without_experts(), command._prompt(model, 8)
    record, wanted = Record(tiny / "results.json", {}), Configuration("decode", 8, 30)
    replay = Replay(np.tile([[[0, 1], [2, 3]]], (50, 1, 1)), model.spec)
    speak = command._Speaker.__call__

    def interrupted(self: command._Speaker, done: int, total: int, seconds: float) -> None:
        if done == 20:
            raise KeyboardInterrupt
        speak(self, done, total, seconds)

    cpu = next(contender for contender in CONTENDERS if contender.name == "cpu")
    with cpu.open(model, plan, Machine("none", 1), None) as experts:
        with monkeypatch.context() as patch, measure.attached(whole, experts, replay):
            patch.setattr(command._Speaker, "__call__", interrupted)
            with pytest.raises(KeyboardInterrupt):
                command._one(whole, experts, ids, wanted, "cpu", record, replay)
        (first,) = Record.read(record.path).runs["cpu"]["decode:8"]
        assert len(first["seconds"]) == 20 and len(first["tokens"]) == 19
        assert record.seconds("cpu", wanted) is None
        with measure.attached(whole, experts, replay):
            command._one(whole, experts, ids, wanted, "cpu", record, replay)
    (whole_round,) = Record.read(record.path).runs["cpu"]["decode:8"]
    assert len(whole_round["seconds"]) == 30 and whole_round["tokens"][:19] == first["tokens"]
    assert whole_round["seconds"][:20] == first["seconds"] and sorted(whole_round["seconds"]) == whole_round["seconds"]
    # 2 layers of 2 experts for each token; the prompt's once more, with the tokens that were there.
    assert whole_round["expert_calls"]["cpu"] == 4 * (20 + 11)
    assert replay._at == 8 + 29


def test_algorithm_1_decides_each_expert_by_itself(tiny: Path):
    model = open_model("tiny", tiny, random=True, layers=1)
    plan = open_all(model, tiny)  # a token costs 1 on both sides, a copy 25
    resident = np.zeros((1, 8), np.uint8)
    resident[0, 0] = 1
    tables = dataclasses.replace(plan.tables, resident=resident, gpu_us=plan.tables.gpu_us * np.float32(0.5))
    decided = Algorithm1(open_library(plan), tables, 8)
    # 50 tokens: 50 on the CPU, 25 + 25 elsewhere; 51 are 51 and 50.5.
    counts = [3, 0, 50, 51, 1, 200, 0, 0]
    ids = torch.repeat_interleave(torch.arange(8), torch.tensor(counts))[:, None]
    strategy = decided.decide(0, ids.contiguous())
    assert strategy.tolist() == [RESIDENT, IDLE, CPU, STREAMED, CPU, STREAMED, IDLE, IDLE]
    assert decided.counts.tolist() == counts
    assert decided.split.tolist() == [-1, 0]


def test_fiddlers_code_copies_from_ten_tokens_on(tiny: Path):
    model = open_model("tiny", tiny, random=True, layers=1)
    plan = open_all(model, tiny)
    contender = next(c for c in CONTENDERS if c.name == "fiddler-code")
    experts = contender.open(model, plan, Machine("simulated", 1), None)
    try:
        at_home, *elsewhere = sorted(range(8), key=lambda e: not experts._resident[0, e])
        first, second = elsewhere[-2:]
        ids = torch.tensor([[first, at_home]] * 9 + [[second, at_home]] * 10)
        experts.moe(0, torch.randn(19, 64).bfloat16(), ids, torch.full((19, 2), 0.5))
        assert experts.counters()["expert_calls"] == {"resident": 1, "streamed": 1, "cpu": 1}
    finally:
        experts.close()


def test_routing_is_replayed_in_the_order_of_the_text(tiny: Path):
    spec = open_model("tiny", tiny, random=True, layers=2).spec
    choices = np.arange(20)[:, None, None] + np.array([0, 100])[None, :, None] + np.zeros((1, 1, 2), int)
    replay = Replay(choices, spec)

    def chosen(tokens: int) -> list[list[int]]:
        replay.step(tokens)
        return [replay.ids(layer)[:, 0].tolist() for layer in range(2)]

    replay.begin(3, 2)
    assert chosen(6) == [[0, 1, 2, 0, 1, 2], [100, 101, 102, 100, 101, 102]], "a prompt is computed once for each beam"
    assert chosen(2) == [[3, 4], [103, 104]], "beams choose like neighbours"
    lies = replay.ids(0).data_ptr()
    assert chosen(2) == [[5, 6], [105, 106]] and replay.ids(0).data_ptr() == lies, "a captured step reads there"
    replay.begin(19, 1)
    assert chosen(19)[0] == list(range(19))
    assert [chosen(1)[0] for _ in range(3)] == [[19], [0], [1]], "around again"


# Models and memory


def test_a_model_of_fewer_layers_gets_the_same_share_of_the_accelerator(tiny: Path):
    whole = open_model("tiny", tiny, random=True, layers=None)
    options = Options("balanced", 128, 1, 1_400_000)
    _, residents = memory.budget(whole, options, "simulated")
    assert 0 < residents < 24
    cut = open_model("tiny", tiny, random=True, layers=1)
    scaled, fewer = memory.budget(cut, options, "simulated")
    assert fewer == round(residents / 3)
    assert scaled.gpu_memory_bytes < options.gpu_memory_bytes
    assert memory.budget(cut, options, "none")[1] == 0


def test_too_little_memory_is_refused_with_what_would_fit(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    model = open_model("tiny", tiny, random=True, layers=None)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1_200_000)
    with pytest.raises(FiddlerError, match=r"(?s)not enough host memory .*hint: --layers 2; or --only cpu"):
        memory.check(model, 4, Options("balanced", 128, 1, 0), CONTENDERS, "simulated")


def test_a_checkpoints_own_weights_are_ready_to_be_read():
    """By strategies that are no engine, too, which would check them."""
    model = open_model(str(TINY_MIXTRAL), Path(), random=False, layers=None)
    read = UnpackedExpert.empty(model.spec.expert)
    model.weights().read(0, 0, *read.matrices, read.biases)
    assert bool(read.down.isfinite().all())


def test_random_weights_have_the_right_scale_and_are_the_same_every_time(tiny: Path):
    spec = open_model("tiny", tiny, random=True, layers=1).spec
    reads = []
    for _ in range(2):
        parts = [torch.empty(shape, dtype=torch.bfloat16) for shape in ((96, 64), (96, 64), (64, 96))]
        NoiseWeights().read(0, 1, *parts)
        reads.append(parts)
    for part, again in zip(*reads, strict=True):
        assert torch.equal(part, again)
        assert float(part.float().std()) == pytest.approx(part.shape[1] ** -0.5, rel=0.05)
    assert not torch.equal(reads[0][0], reads[0][1])
    assert spec.num_layers == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model tiny", "its own weights, or with random ones"),
        ("--model nothing --random-weights", "random weights are for built-in models"),
        ("--model tiny --random-weights --layers 4", "--layers is out of range: found 4, expected 1 to 3"),
        ("--model tiny --random-weights --only prefill:4096", "longer than the context"),
        ("--model tiny --random-weights --device none --only fiddler", "nothing is left to measure"),
        ("--model tiny --random-weights --only decode:8/8 --gpu-memory 1KiB", "below the non-expert"),
        ("--show", "cannot read the results"),
    ],
)
def test_mistakes_are_told(tiny: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str):
    assert program.main([*arguments.split(), "--output", str(tiny)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tiny / "results.json").exists()


@pytest.mark.slow
def test_a_run_that_is_cut_off_goes_on_where_it_was(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    arguments = [
        "--model",
        "tiny",
        "--random-weights",
        "--layers",
        "1",
        "--gpu-memory",
        "2600KB",
        "--hw",
        "epyc-zen5-2c",
    ]
    arguments += ["--device", "simulated", "--output", str(tiny), "--only", "ours,cpu,decode:8/4,decode:8/70"]
    one, ran = command._one, []

    def interrupted(*rest: object) -> None:
        ran.append(rest[4])
        if len(ran) == 2:
            raise KeyboardInterrupt
        one(*rest)  # type: ignore[arg-type]

    monkeypatch.setattr(command, "_one", interrupted)
    assert program.main(arguments) == 130
    assert "results.json has what was measured" in capsys.readouterr().err
    assert program.main(arguments) == 0
    assert ran == ["ours", "cpu", "cpu"], "what was measured is not measured again"
    out = capsys.readouterr().out
    assert "SCALED DOWN: 1 of 3 layers" in out and "No figure here says anything about a GPU" in out
    rows = [line for line in out.splitlines() if line.startswith(("| 8/4 |", "| 8/70 |"))]
    assert len(rows) == 2 and all(row.count("(") == 2 for row in rows), "measured beside predicted"
    results = json.loads((tiny / "results.json").read_text())
    assert [len(results["runs"][name]["decode:8"][0]["seconds"]) for name in ("ours", "cpu")] == [70, 70]
    assert all(math.isfinite(value) for value in results["checks"]["cpu"])
    assert (tiny / "results.svg").stat().st_size and (tiny / "results.md").read_text() == out
    assert program.main([*arguments[:-1], "ours,decode:8/4"]) == 0
    assert "measured already" in capsys.readouterr().err
    assert program.main([*arguments, "--layers", "2"]) == 1
    assert "other options" in capsys.readouterr().err
    assert program.main(["--show", "--output", str(tiny)]) == 0
    assert capsys.readouterr().out == out
