"""Strategies that keep a cache of experts in each layer or split misses by rate: state goes from step to step."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from ..ir import Steps
from .policy import Ints, StepTimes, Strategy, hits, overlapped_us
from .setting import Setting

GUESSED_RIGHT = 0.8
"""How often a guess of the next layer's experts from this layer's state is taken to be right: the share that Mixtral-
Offloading's report (arXiv 2312.17238) gives for two experts fetched one layer ahead, as read off its figure."""

_GOLDEN = 0.6180339887498949


class _Guesser:
    """Says right or wrong evenly spread at a stated rate, the same every time (a low-discrepancy sequence)."""

    def __init__(self) -> None:
        self._at = 0.0

    def right(self) -> bool:
        self._at = (self._at + _GOLDEN) % 1.0
        return self._at < GUESSED_RIGHT


@dataclass(frozen=True)
class MixtralOffloading(Strategy):
    """Mixtral-Offloading (arXiv 2312.17238): an LRU cache of experts in each layer, misses fetched, guesses fetched
    ahead.

    After a layer's own copies the link fetches the top_k guessed experts of the next one, GUESSED_RIGHT of them right;
    the layer's computing and the next attention hide what they can. Weights stay 16 bit.
    `swaps` is its published code instead: no guesses, and each copy in also copies the evicted expert back out, on the
    same stream (ExpertCache._swap).
    """

    name: str = "mixtral-offloading"
    kernels: str = "none on the CPU"
    swaps: bool = False

    def replay(self, steps: Steps, setting: Setting) -> StepTimes:
        """See StepTimes."""
        lat, layers = setting.latencies, setting.layers
        copy_us = lat.stream_us * (2 if self.swaps else 1)
        caches = [OrderedDict.fromkeys(setting.cached(layer)) for layer in range(layers)]
        slots = setting.slots.tolist()
        gpu = setting.gpu_us(steps.counts)
        rest = setting.rest_us(steps.tokens, steps.kv)
        guesser, us, found = _Guesser(), rest.copy(), np.zeros(len(rest), np.int64)
        for step, counts in enumerate(steps.counts):
            now, link, ready = 0.0, 0.0, dict[int, float]()
            for layer in range(layers):
                cache = caches[layer]
                active = np.flatnonzero(counts[layer]).tolist()
                took = dict(zip(active, gpu[step, layer, active].tolist(), strict=True))
                found[step] += sum(int(counts[layer, e]) for e in active if e in cache)
                misses = [e for e in active if e not in cache and e not in ready]
                for expert in misses:
                    link = max(link, now) + copy_us
                    ready[expert] = link
                now += lat.gpu_overhead_us
                for expert in sorted(active, key=lambda e: (ready.get(e, 0.0), e)):
                    now = max(now, ready.get(expert, 0.0)) + took[expert]
                for expert in active:
                    _touch(cache, expert, slots[layer])
                ready = {}
                if not self.swaps and layer + 1 < layers:
                    likely = np.argsort(-counts[layer + 1], kind="stable")[: setting.spec.top_k]
                    for guess in likely:
                        right = guesser.right()
                        if guess not in caches[layer + 1]:
                            link = max(link, now - sum(took.values())) + copy_us
                            if right:
                                ready[int(guess)] = link
                now += rest[step] / layers
            us[step] = now
        return StepTimes(us, found)


def _touch(cache: OrderedDict[int, None], expert: int, slots: int) -> None:
    """Makes an expert the last to be evicted, and evicts."""
    cache[expert] = None
    cache.move_to_end(expert)
    while len(cache) > slots:
        cache.popitem(last=False)


SCORE_WEIGHT = 0.5
"""Of the present step in HybriMoE's recent score; the paper leaves the value open."""


@dataclass(frozen=True)
class HybriMoE(Strategy):
    """HybriMoE (DAC 2025): CPU, GPU and link simulated greedily in each layer, a cache by score, prefetch where it
    fits.

    Cached experts go to the GPU. Of the others the link takes the one with most tokens or the CPU the one with fewest,
    whichever is done first, until none is left. A score is the running mean of an expert's share of its layer's tokens;
    what was copied replaces the lowest. When the link has time for a whole copy before the next layer starts, it
    fetches the guessed expert with most tokens there, right GUESSED_RIGHT of the time. Simplified: the CPU does not
    take cached experts, and only the next layer is looked at.
    """

    name: str = "hybrimoe"

    def replay(self, steps: Steps, setting: Setting) -> StepTimes:
        """See StepTimes."""
        lat, layers = setting.latencies, setting.layers
        cached = np.zeros(setting.resident.shape, np.bool_)
        for layer in range(layers):
            cached[layer, setting.cached(layer)] = True
        scores = setting.popularity.copy()
        cpu, gpu = setting.cpu_us(steps.counts), setting.gpu_us(steps.counts)
        rest = setting.rest_us(steps.tokens, steps.kv)
        guesser, us, found = _Guesser(), rest.copy(), np.zeros(len(rest), np.int64)
        for step, counts in enumerate(steps.counts):
            for layer in range(layers):
                found[step] += int(counts[layer, cached[layer]].sum())
                span, copied = self._layer(counts[layer], cached[layer], cpu[step, layer], gpu[step, layer], setting)
                us[step] += span
                scores[layer] += SCORE_WEIGHT * (counts[layer] / counts[layer].sum() - scores[layer])
                for expert in copied:
                    _admit(cached[layer], scores[layer], expert)
                ahead = layer + 1
                idle = span - len(copied) * lat.stream_us + rest[step] / layers
                if ahead < layers and idle >= lat.stream_us:
                    wanted = np.where(cached[ahead], 0, counts[ahead])
                    if wanted.any() and guesser.right():
                        _admit(cached[ahead], scores[ahead], int(wanted.argmax()))
        return StepTimes(us, found)

    def _layer(
        self, counts: Ints, cached: np.ndarray, cpu: np.ndarray, gpu: np.ndarray, setting: Setting
    ) -> tuple[float, list[int]]:
        """The layer's time, and which experts the link brought. All arrays [experts]."""
        lat = setting.latencies
        at_home = (counts > 0) & cached
        waiting = np.flatnonzero((counts > 0) & ~cached)
        waiting = waiting[np.argsort(counts[waiting], kind="stable")].tolist()
        on_gpu = float(gpu[at_home].sum())
        on_cpu, link, copied = 0.0, 0.0, list[int]()
        while waiting:
            few, many = waiting[0], waiting[-1]
            by_cpu = lat.cpu_overhead_us + on_cpu + cpu[few]
            by_gpu = lat.gpu_overhead_us + max(on_gpu, link + lat.stream_us) + gpu[many]
            if setting.has_accelerator and by_gpu < by_cpu:
                link += lat.stream_us
                on_gpu = max(on_gpu, link) + float(gpu[many])
                copied.append(waiting.pop())
            else:
                on_cpu += float(cpu[few])
                waiting.pop(0)
        cpu_span = lat.cpu_overhead_us + on_cpu * (1 + lat.contention if copied else 1) if on_cpu else 0.0
        gpu_span = lat.gpu_overhead_us + on_gpu if copied or at_home.any() else 0.0
        return max(cpu_span, gpu_span), copied


def _admit(cached: np.ndarray, scores: np.ndarray, expert: int) -> None:
    """Puts an expert into a layer's cache in place of the one with the lowest score, if that is lower than its own."""
    held = np.flatnonzero(cached)
    if len(held) and not cached[expert]:
        lowest = held[scores[held].argmin()]
        if scores[lowest] < scores[expert]:
            cached[lowest], cached[expert] = False, True


@dataclass(frozen=True)
class FreeToken(Strategy):
    """FreeToken (arXiv 2608.16157): of m misses q* = m * B_link / (B_link + B_host) are copied, the others run on the
    CPU.

    B are experts per second of a copy and of the CPU's reading; q* is rounded; the experts with most tokens are copied.
    Residents by frequency. Prompts: every miss is copied, double-buffered, while the one before is computed.
    """

    name: str = "freetoken"

    def replay(self, steps: Steps, setting: Setting) -> StepTimes:
        """See StepTimes."""
        resident, total = setting.popular, setting.rest_us(steps.tokens, steps.kv)
        link = 1.0 / setting.latencies.stream_us
        host = 1.0 / float(setting.cpu_us(np.ones(1, np.int64))[0])
        for layer in range(setting.layers):
            counts = steps.counts[:, layer].astype(np.int64)
            missing = (counts > 0) & ~resident[layer]
            most = np.argsort(np.argsort(-np.where(missing, counts, 0), axis=1, kind="stable"), axis=1, kind="stable")
            quota = np.rint(missing.sum(axis=1) * link / (link + host))
            copied = missing if steps.scenario == "prefill" else missing & (most < quota[:, None])
            total = total + overlapped_us(counts, resident[layer], copied, setting)
        return StepTimes(total, hits(steps.counts, resident))
