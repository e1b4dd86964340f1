"""The report: self-contained, the same every time, and frank about what nobody measured."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from plan_samples import sample_header, sample_machine, sample_model, sample_tables

from fiddler_runtime.machine import Accelerator
from fiddler_runtime.plan import HardwareSummary, Header, MemoryItem
from fiddlerc import report
from fiddlerc.ir import Calibration, LatencyModel, Limits, MemoryBudget, Placement, Sample
from fiddlerc.report.page import crossover_tokens, format_bytes, format_us

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
        Sample("cpu_expert", 64, 96, tokens, 36_864, 2, "avx2", 11.0 + 10.0 * tokens, 0.5, 9) for tokens in (1, 2, 4, 8)
    )
    hardware = header.hardware
    limits = Limits(2, 30.0, 400.0, 900.0, 9e4, 12.0, 12.0, 1.0, 2.0)
    return Calibration(
        "fiddlerc-hw/1", hardware.name, hardware.provenance, hardware.source, hardware.machine, limits, samples
    )


def render(header: Header) -> bytes:
    tables = sample_tables()
    latency = LatencyModel(
        tables.tokens, tables.cpu_us.astype(float), tables.gpu_us.astype(float), 1.0, 2.0, 25.0, 0.1, header.latency
    )
    placement = Placement(tables.resident.astype(bool), tables.popularity.astype(float), header.placement)
    none = header.hardware.machine.accelerator.kind == "none"
    budget = MemoryBudget(0, (), 0) if none else MemoryBudget(1 << 20, header.memory, 3)
    return report.render(header, calibration(header), latency, placement, budget, tables)


def test_the_same_bytes_and_nothing_from_elsewhere() -> None:
    page = render(sample_header())
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
    header = sample_header()
    text = Page(render(header)).text
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
    ):
        assert words in text.replace("\n", " "), words


def test_what_nobody_measured_is_said_at_the_top() -> None:
    header = sample_header()
    sheet = replace(header, hardware=replace(header.hardware, provenance="data sheet", source="a brochure"))
    text = Page(render(sheet)).text
    assert text.index("data sheet") < text.index("Latency of one expert")
    assert "a brochure" in text


def test_without_an_accelerator() -> None:
    machine = sample_machine(accelerator=Accelerator("none", "none", 0, ""))
    text = Page(render(sample_header(hardware=HardwareSummary("cpu-only", "measured", "tests", machine)))).text
    assert "Accelerator memory" not in text
    assert "copying" not in text


@pytest.mark.parametrize("text", ['<script>alert(1)</script>"', "{{ 7 * 7 }}", "]]> &amp; $x_1$"])
def test_names_are_text_and_not_markup(text: str) -> None:
    header = sample_header(
        model=sample_model(name=text), assumptions=(text,), memory=(MemoryItem(text, 1), MemoryItem("KV cache", 2))
    )
    page = render(header)
    assert b"<script" not in page
    assert text in Page(page).text


def test_crossover() -> None:
    tokens = np.array([0, 1, 2, 4], np.int32)
    model = LatencyModel(tokens, 10.0 * tokens, 1.0 * tokens, 0.0, 0.0, 25.0, 0.0, ())
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
    assert [format_us(n) for n in (0, 1.25, 12.0, 1234.0, 2.5e6)] == ["0 µs", "1.2 µs", "12 µs", "1.23 ms", "2.5 s"]
