"""Recorded routing against transformers' own routers, and what must not change it: batches, pads, beams, ends."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runtime_samples
import torch
import transformers
from tiny_families import FAMILIES, TINY_MIXTRAL, save_family

from fiddler_runtime.errors import FiddlerError
from fiddlerc.frontend import load_model
from fiddlerc.ir import Trace
from fiddlerc.trace import record

pytestmark = pytest.mark.slow

TEXT = (TINY_MIXTRAL / "heldout-docs.txt").read_text()[:1900]
CHAT = (TINY_MIXTRAL / "heldout-chat.txt").read_text()[:900]
SHORT: dict[str, Any] = {"sequence_tokens": 64, "prompt_tokens": 16}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """One thread: for products this small, two cost more than they bring, and far more on a busy machine."""
    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo() -> Any:
    """The demo model as transformers loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(TINY_MIXTRAL, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(TINY_MIXTRAL)


@pytest.fixture(scope="module")
def traced() -> Trace:
    return trace_of(TINY_MIXTRAL, [TEXT, CHAT])


def trace_of(folder: Path, texts: list[str], **options: Any) -> Trace:
    return record(folder, load_model(str(folder)), texts, **{**SHORT, **options})


def rows(trace: Trace, sequence: int) -> np.ndarray[Any, Any]:
    assert trace.experts is not None
    chosen: np.ndarray[Any, Any] = np.sort(trace.experts[trace.sequence == sequence], axis=2)
    return chosen


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    """The routers' logits, fp32 [tokens, layers, experts]: transformers' own output, not our hooks."""
    with torch.inference_mode():
        layers = model(torch.tensor([ids]), output_router_logits=True).router_logits
    return torch.stack([layer.float() for layer in layers], dim=1)


def misrouted(chosen: np.ndarray[Any, Any], logits: torch.Tensor) -> int:
    """Of the choices [tokens, layers, top_k], how many rows are not the largest logits. Ties may go either way."""
    found = logits.gather(2, torch.from_numpy(chosen.astype(np.int64))).sort(descending=True).values
    return int((found != logits.topk(chosen.shape[2]).values).any(dim=2).sum())


def pieces(tokenizer: Any, text: str) -> list[list[int]]:
    ids = tokenizer(text)["input_ids"]
    return [ids[at : at + 64] for at in range(0, len(ids), 64) if len(ids) - at > 16]


def test_demo_model_against_its_routers(demo: Any, tokenizer: Any, traced: Trace) -> None:
    # Texts take turns, so the first two sequences are the beginnings of both.
    texts, chats = pieces(tokenizer, TEXT), pieces(tokenizer, CHAT)
    order = [texts[0], chats[0], texts[1], chats[1]]
    for sequence, ids in enumerate(order):
        assert misrouted(rows(traced, sequence), logits_of(demo, ids)) == 0
    assert traced.sequence is not None
    assert traced.sequence.max() + 1 == len(texts) + len(chats)


# DeepSeek-V3 chooses within groups of experts, which its router's logits alone do not tell.
@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"deepseek_v3"}))
def test_every_family_against_its_routers(tmp_path: Path, tokenizer: Any, family: str) -> None:
    folder = save_family(family, tmp_path / family)
    trace = trace_of(folder, [TEXT], max_tokens=150, batch=1)  # as below: another order tips what is nearly equal
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = tokenizer(TEXT)["input_ids"]
    assert trace.experts is not None
    assert trace.experts.shape == (150, len(load_model(str(folder)).moe_layers), 2)
    for sequence, length in enumerate((64, 64, 22)):
        logits = logits_of(model, ids[sequence * 64 : sequence * 64 + length])
        assert misrouted(rows(trace, sequence), logits) == 0


def test_batches_and_their_pads_change_nothing(traced: Trace) -> None:
    """Sequences of other lengths run beside each other: both texts end in a shorter one."""
    assert len({int(n) for n in np.unique(traced.sequence, return_counts=True)[1]}) > 1
    for batch in (1, 3):
        other = trace_of(TINY_MIXTRAL, [TEXT, CHAT], batch=batch)
        assert np.array_equal(traced.counts, other.counts)
        for name in ("experts", "sequence", "position", "phase"):
            assert np.array_equal(getattr(traced, name), getattr(other, name)), (batch, name)


def test_through_the_kernels_routers_choose_as_bf16_lets_them(tokenizer: Any, traced: Trace, tmp_path: Path) -> None:
    """Held against fp32: 31 of 5520 rows were seen to be routed otherwise, and as many by transformers in bf16."""
    spec = load_model(str(TINY_MIXTRAL))
    plan = runtime_samples.write_sample_plan(tmp_path / "plan", spec)
    ours = trace_of(TINY_MIXTRAL, [TEXT, CHAT], plan=plan, packed_cache=tmp_path)
    again = trace_of(TINY_MIXTRAL, [TEXT, CHAT], plan=plan, packed_cache=tmp_path)
    assert np.array_equal(ours.counts, again.counts)
    for name in ("sequence", "position", "phase"):
        assert np.array_equal(getattr(ours, name), getattr(traced, name))
    exact = transformers.AutoModelForCausalLM.from_pretrained(TINY_MIXTRAL, dtype=torch.float32).eval()
    wrong = {"ours": 0, "theirs": 0}
    total = 0
    order = [ids for pair in itertools.zip_longest(pieces(tokenizer, TEXT), pieces(tokenizer, CHAT)) for ids in pair]
    for sequence, ids in enumerate(filter(None, order)):
        logits = logits_of(exact, ids)
        total += logits.shape[0] * logits.shape[1]
        wrong["ours"] += misrouted(rows(ours, sequence), logits)
        wrong["theirs"] += misrouted(rows(traced, sequence), logits)
    print(f"of {total} rows: {wrong}")  # pytest -rP
    assert wrong["ours"] <= 1.5 * wrong["theirs"] + 2


def test_rows_say_where_they_come_from(traced: Trace) -> None:
    assert traced.experts is not None
    assert traced.sequence is not None
    assert traced.position is not None
    assert traced.phase is not None
    for sequence in range(traced.sequence.max() + 1):
        here = traced.sequence == sequence
        assert np.array_equal(traced.position[here], np.arange(here.sum()))
    assert np.array_equal(traced.phase, traced.position >= 16)
    assert traced.counts.sum() == traced.experts.size
    assert traced.model_fingerprint == load_model(str(TINY_MIXTRAL)).fingerprint
    assert "2 texts (sha256 " in traced.source
    assert "prompts of 16" in traced.source


def test_decoding_step_by_step_takes_the_same_routes(demo: Any, tokenizer: Any, traced: Trace) -> None:
    """In bf16, products of one row are rounded otherwise than those of 64: 2 of 1536 choices were seen to differ."""
    steps: list[Any] = []
    modules = [m for m in demo.modules() if hasattr(m, "is_concatenated")]
    handles = [m.register_forward_pre_hook(lambda _, args: steps.append(args[1])) for m in modules]
    cache = transformers.DynamicCache()
    with torch.inference_mode():
        for token in pieces(tokenizer, TEXT)[0]:
            demo(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    for handle in handles:
        handle.remove()
    stepwise = np.sort(torch.cat(steps).reshape(64, 6, 2).numpy(), axis=2)
    assert (stepwise != rows(traced, 0)).any(axis=2).mean() <= 0.005


def test_written_tokens_are_routed_as_the_written_text_is(demo: Any, tokenizer: Any) -> None:
    trace = trace_of(TINY_MIXTRAL, [TEXT], max_tokens=128, generate_tokens=12)
    plain = trace_of(TINY_MIXTRAL, [TEXT], max_tokens=128)
    assert trace.position is not None
    assert trace.phase is not None
    assert plain.experts is not None
    assert np.array_equal(trace.counts[0], plain.counts[0]), "prompts are not counted again"
    for number, ids in enumerate(pieces(tokenizer, TEXT)[:2]):
        prompt = torch.tensor([ids[:16]])
        text = demo.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()
        assert len(text) == 28, "no end within the twelve tokens, or the test says nothing"
        logits = logits_of(demo, text[:-1])[16:]
        here = trace.sequence == 2 + number
        assert np.array_equal(trace.position[here], np.arange(16, 27))
        assert (trace.phase[here] == 1).all()
        # One row at a time, as above; at most one of the 66 choices was seen to differ.
        assert misrouted(rows(trace, 2 + number), logits) <= 1


def test_beams_count_once() -> None:
    prefill = trace_of(TINY_MIXTRAL, [TEXT], max_tokens=128)
    trace = trace_of(TINY_MIXTRAL, [TEXT], max_tokens=128, generate_tokens=12, num_beams=4)
    assert np.array_equal(trace.counts[0], prefill.counts[0])
    written = trace.sequence is not None and np.bincount(trace.sequence)[2:]
    assert list(np.atleast_1d(written)) == [11, 11]


def test_nothing_is_counted_after_the_end(tmp_path: Path, demo: Any, tokenizer: Any) -> None:
    """With the first prompt's second written token as end of text, its sequence has one row; the other goes on."""
    prompts = [torch.tensor([ids[:16]]) for ids in pieces(tokenizer, TEXT)[:2]]
    texts = [demo.generate(p, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 16:].tolist() for p in prompts]
    end = texts[0][1]
    expected = [text.index(end) if end in text else 11 for text in texts]
    folder = Path(shutil.copytree(TINY_MIXTRAL, tmp_path / "m"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    trace = trace_of(folder, [TEXT], max_tokens=128, generate_tokens=12)
    assert trace.sequence is not None
    assert list(np.bincount(trace.sequence, minlength=4)[2:]) == expected


def test_a_sampling_model_is_traced_greedily(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY_MIXTRAL, tmp_path / "m"))
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": 0})
    )
    sampled, plain = (trace_of(f, [TEXT], max_tokens=64, generate_tokens=8) for f in (folder, TINY_MIXTRAL))
    assert np.array_equal(sampled.counts, plain.counts)


def test_max_tokens_takes_of_every_text(traced: Trace) -> None:
    trace = trace_of(TINY_MIXTRAL, [TEXT, CHAT], max_tokens=150)
    assert trace.experts is not None
    assert len(trace.experts) == 150
    assert np.array_equal(rows(trace, 1), rows(traced, 1))


def test_progress() -> None:
    seen: list[tuple[str, int, int]] = []
    trace_of(TINY_MIXTRAL, [TEXT], max_tokens=192, generate_tokens=2, progress=lambda *call: seen.append(call))
    assert ("loading the model", 1, 1) in seen
    assert [call for call in seen if call[0] == "tracing"][-1] == ("tracing", 192, 192)
    assert seen[-1][0] == "writing"
    assert seen[-1][1] == seen[-1][2]


def error_of(folder: Path, texts: list[str], **options: Any) -> FiddlerError:
    with pytest.raises(FiddlerError) as caught:
        trace_of(folder, texts, **options)
    return caught.value


@pytest.mark.parametrize("texts", [[], [""], [" \n", ""]])
def test_no_text(texts: list[str]) -> None:
    error = error_of(TINY_MIXTRAL, texts)
    assert error.what == "there is no text to trace"
    assert error.hint is not None
    assert "--text" in error.hint


def test_text_that_is_too_short() -> None:
    error = error_of(TINY_MIXTRAL, [TEXT, "Hello."])
    assert error.what == "text 2 of 2 is too short to trace"
    assert error.expected == "more than the 16 of a prompt"


def test_too_few_tokens() -> None:
    assert "--max-tokens above 16" in str(error_of(TINY_MIXTRAL, [TEXT], max_tokens=16).hint)


def test_prompt_as_long_as_the_sequence() -> None:
    error = error_of(TINY_MIXTRAL, [TEXT], prompt_tokens=64)
    assert error.found == "a prompt of 64 in sequences of 64 tokens"


@pytest.mark.parametrize("options", [{"sequence_tokens": 1025}, {"generate_tokens": 1024}])
def test_longer_than_the_context(options: dict[str, int]) -> None:
    error = error_of(TINY_MIXTRAL, [TEXT], **options)
    assert error.expected == "at most 1024"


def test_a_directory_without_weights(tmp_path: Path) -> None:
    shutil.copy(TINY_MIXTRAL / "config.json", tmp_path)
    assert error_of(tmp_path, [TEXT]).what == f"no weights in {tmp_path}"


def test_another_model_than_the_spec() -> None:
    with pytest.raises(FiddlerError, match="is not the plan's model"):
        record(TINY_MIXTRAL, load_model("mixtral"), [TEXT])
