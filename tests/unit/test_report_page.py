"""The report: self-contained, the same every time, and frank about what nobody measured."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from plan_samples import sample_header, sample_machine, sample_model, sample_tables

from fiddler_runtime.machine import Accelerator
from fiddler_runtime.makespan import Latencies, choose
from fiddler_runtime.plan import HardwareSummary, Header, MemoryItem
from fiddler_runtime.text import format_bytes
from fiddlerc import report, trace
from fiddlerc.ir import (
    Calibration,
    LatencyModel,
    Limits,
    MemoryBudget,
    Placement,
    PolicyResult,
    Prediction,
    Sample,
)
from fiddlerc.report.page import crossover_tokens
from fiddlerc.report.text import format_rate, format_us
from fiddlerc.report.timeline import CPU_LANE, layer_timeline, step_timeline

FIGURES = ("latency", "residuals", "throughput", "placement", "decode-step", "prefill-layer", "memory")
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """The page's text, and what it refers to; fails on tags that do not nest."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.references: list[str] = []
        self.feed(page.decode())
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.references += [
            value or "" for name, value in attributes if name in ("src", "href", "xlink:href") and value is not None
        ]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def calibration(header: Header) -> Calibration:
    samples = tuple(
        Sample("cpu_expert", 64, 96, tokens, 36_864, 2, "avx2", 11.0 + 10.0 * tokens, 0.5, 9, "fast")
        for tokens in (1, 2, 4, 8)
    )
    hardware = header.hardware
    limits = Limits(2, 30.0, 0.0, 0.0, 400.0, 900.0, 9e4, 12.0, 12.0, 1.0, 2.0)
    return Calibration(
        "fiddlerc-hw/2", hardware.name, hardware.provenance, hardware.source, hardware.machine, limits, samples, ()
    )


def inputs(header: Header, *, slow: bool = False, unmeasured: tuple[str, ...] = ()) -> report.Inputs:
    """What a compiler would hand over; `slow`: on a machine whose memory has a second regime."""
    tables = sample_tables()
    if slow:
        both = np.concatenate([tables.cpu_us, 2 * tables.cpu_us])
        tables = sample_tables(cpu_us=both, regime_shares=np.array([0.6, 0.4], np.float32))
    curve = header.latency[0]
    curves = (curve, replace(curve, quantity="gpu_expert", samples=0))
    header = replace(header, latency=curves)
    latency = LatencyModel(
        tables.tokens,
        tables.cpu_us.astype(float),
        tables.regime_shares.astype(float),
        tables.gpu_us.astype(float),
        tables.rest_us.astype(float),
        0.01,
        1.0,
        2.0,
        25.0,
        0.1,
        curves,
    )
    placement = Placement(tables.resident.astype(bool), tables.popularity.astype(float), header.placement)
    none = header.hardware.machine.accelerator.kind == "none"
    budget = MemoryBudget(0, (), 0) if none else MemoryBudget(1 << 20, header.memory, 3)
    rows = (
        PolicyResult("ours", "ours", 12.5, 0.25, 128, 30.0, 4, 0.375),
        PolicyResult("another", "torch eager", 6.25, 0.5, 128, 10.0, 4, 0.25),
    )
    interval = None if unmeasured else (0.9, 1.1)
    prediction = Prediction(rows, (8.0, 12.5) if slow else None, interval, unmeasured)
    steps = trace.sample_steps(None, placement.popularity, header.model, header.options)
    return report.Inputs(header, calibration(header), latency, placement, budget, tables, steps, prediction)


def render(header: Header) -> bytes:
    return report.render(inputs(header))


@cache
def sample_page() -> bytes:
    """Drawn once: figures take half a second."""
    return render(sample_header())


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the words alone."""
    monkeypatch.setattr("fiddlerc.report.page._figures", lambda inputs: dict.fromkeys(FIGURES))
    monkeypatch.setattr("fiddlerc.report.figures.svg", lambda figure: "<svg></svg>")


def test_the_same_bytes_and_nothing_from_elsewhere() -> None:
    page = sample_page()
    assert page == render(sample_header())
    parsed = Page(page)
    assert parsed.references
    for reference in parsed.references:
        assert reference.startswith(("#", "data:image/png;base64,")), reference[:80]
    assert b"<script" not in page
    assert b"@import" not in page
    assert not re.search(rb"\burl\((?!#)", page)
    assert not re.search(rb"20\d\d-\d\d-\d\d", page), "a date"


def test_everything_a_reader_looks_for() -> None:
    text = Page(sample_page()).text
    for words in (
        "sample on made-up",
        "made up",
        "linear",
        "held-out error",
        "3 of 8 experts",
        "Expected hit rate 37.5 %",
        "copying its weights beats the CPU from 4 tokens",
        "non-expert weights",
        "resident experts",
        "Made-up CPU",
        "fdl_bf16_moe_h64_i96__avx512bf16",
        "fdl_bf16_moe_h64_i96__avx2",
        "fiddlerc",
        "measured",
        "12.5 tokens/s decoding one sequence",
        "250 ms to the first token of a prompt of 128",
        "torch eager",
        "90 % of times are expected between 0.90 and 1.10",
        "one expert a layer parted between the lanes",
        "They are the most popular ones.",
        "the least popular",
        "0.90–1.10 ×",
    ):
        assert words in text.replace("\n", " "), words


@pytest.mark.usefixtures("no_figures")
def test_two_regimes_are_both_told() -> None:
    text = Page(report.render(inputs(sample_header(), slow=True))).text.replace("\n", " ")
    assert "two regimes" in text
    assert "8 tokens/s while memory is slow and 12.5 while it is fast" in text


@pytest.mark.usefixtures("no_figures")
def test_no_interval_is_claimed_for_what_nobody_measured() -> None:
    text = Page(report.render(inputs(sample_header(), unmeasured=("rest_of_step",)))).text.replace("\n", " ")
    assert "No interval is claimed" in text and "shapes: rest_of_step." in text
    assert "90 % of times are expected" not in text


@pytest.mark.slow
def test_figures_as_pictures() -> None:
    pictures = report.plots(inputs(sample_header()))
    assert set(pictures) == {f"{name}.png" for name in FIGURES}
    assert all(data.startswith(b"\x89PNG") for data in pictures.values())
    assert pictures == report.plots(inputs(sample_header()))


@pytest.mark.parametrize("rows", [0, 96, 200])
def test_a_timeline_ends_when_the_decision_says(rows: int) -> None:
    """Lanes do one thing at a time, nothing starts before its copy is there, and the ends are the predicted ones."""
    rng = np.random.default_rng(rows)
    for _ in range(200):
        tokens = np.arange(400)
        latencies = Latencies(
            (tokens * rng.uniform(1, 20)).astype(np.float32), (tokens * rng.uniform(0.1, 20)).astype(np.float32),
            *rng.uniform(0, 50, 2), rng.uniform(1, 2000), rng.uniform(0, 1), rows,
        )  # fmt: skip
        experts = int(rng.integers(1, 14))
        counts = rng.integers(0, 60, experts).astype(np.int32)
        resident = rng.random(experts) < 0.3
        line, decision = layer_timeline(counts, resident, latencies), choose(counts, resident, latencies)
        lanes = [[bar for bar in line.bars if bar.lane == lane] for lane in range(3)]
        for bars in lanes:
            assert all(a.end_us <= b.start_us + 1e-9 for a, b in pairwise(bars))
        arrivals = {bar.label: bar.end_us for bar in lanes[0]}
        assert all(bar.start_us >= arrivals[bar.label] - 1e-9 for bar in lanes[1] if bar.kind == "streamed")
        ends = [max((bar.end_us for bar in bars), default=0.0) for bars in lanes]
        assert ends[1] == pytest.approx(decision.accelerator_us)
        assert ends[2] == pytest.approx(decision.cpu_us)
        assert line.end_us == pytest.approx(max(ends))


def test_a_step_is_all_layers_one_after_another() -> None:
    """Every decoder layer has its part of the rest, those with experts their decision; layers do not overlap."""
    rng = np.random.default_rng(3)
    tokens = np.arange(100, dtype=np.float32)
    latencies = Latencies(10 * tokens, tokens, 2.0, 3.0, 25.0, 0.1)
    counts, resident = rng.integers(0, 3, (3, 6)).astype(np.int32), rng.random((3, 6)) < 0.4
    step = step_timeline(counts, resident, latencies, [False, True, True, True], 400.0, CPU_LANE)
    rest = [bar for bar in step.bars if bar.kind == "rest"]
    assert [(bar.lane, bar.label) for bar in rest] == [(CPU_LANE, str(layer)) for layer in range(4)]
    assert all(bar.end_us - bar.start_us == pytest.approx(100) for bar in rest)
    spans = [choose(n, home, latencies).makespan_us for n, home in zip(counts, resident, strict=True)]
    assert [bar.start_us for bar in rest[1:]] == pytest.approx([100, 200 + spans[0], 300 + spans[0] + spans[1]])
    assert step.end_us == pytest.approx(400 + sum(spans)) == max(bar.end_us for bar in step.bars)
    for lane in range(3):
        bars = [bar for bar in step.bars if bar.lane == lane]
        assert bars and all(a.end_us <= b.start_us + 1e-9 for a, b in pairwise(bars))


@pytest.mark.usefixtures("no_figures")
def test_what_nobody_measured_is_said_at_the_top() -> None:
    header = sample_header()
    sheet = replace(header, hardware=replace(header.hardware, provenance="data sheet", source="a brochure"))
    text = Page(render(sheet)).text
    assert text.index("data sheet") < text.index("Latency of one expert")
    assert "a brochure" in text


@pytest.mark.usefixtures("no_figures")
def test_without_an_accelerator() -> None:
    machine = sample_machine(accelerator=Accelerator("none", "none", 0, ""))
    text = Page(render(sample_header(hardware=HardwareSummary("cpu-only", "measured", "tests", machine)))).text
    assert "Accelerator memory" not in text
    assert "copying" not in text


def test_names_are_text_and_not_markup() -> None:
    text = '<script>alert(1)</script>" {{ 7 * 7 }} ]]> &amp; $x_1$'
    header = sample_header(
        model=sample_model(name=text), assumptions=(text,), memory=(MemoryItem(text, 1), MemoryItem("KV cache", 2))
    )
    page = render(header)
    assert b"<script" not in page
    assert text in Page(page).text


def test_crossover() -> None:
    tokens = np.array([0, 1, 2, 4], np.int32)
    model = LatencyModel(
        tokens, 10.0 * tokens[None], np.ones(1), 1.0 * tokens, 0.0 * tokens, 0.0, 0.0, 0.0, 25.0, 0.0, ()
    )
    assert crossover_tokens(model) == 4
    assert crossover_tokens(replace(model, stream_us=1e12)) is None


def test_amounts() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 5 << 20, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "3.0 TiB",
    ]
    assert [format_rate(n) for n in (0.27104, 42.13, 5662.1, 12664.0)] == ["0.271", "42.1", "5660", "12700"]
    assert [format_us(n) for n in (0, 1.25, 12.0, 1234.0, 2.5e6)] == ["0 µs", "1.2 µs", "12 µs", "1.23 ms", "2.5 s"]
