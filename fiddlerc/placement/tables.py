"""The dispatch tables of a plan: the latency curves as the runtime looks them up, and the ready decode decisions."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from fiddler_runtime.makespan import Latencies, choose, dense, dense_curve

from ..ir import LatencyModel, ModelSpec, Placement, Tables


def make_tables(
    spec: ModelSpec, latency: LatencyModel, placement: Placement, prefetch: npt.NDArray[np.int16] | None = None
) -> Tables:
    """A plan's tables, float32. Rounding keeps curves non-decreasing, since it keeps order.

    prefetch  int16 [layers, experts, 2], see Tables; None where nothing is known of what follows what
    """
    nothing = np.full((*placement.resident.shape, 2), -1, np.int16)
    tables = Tables(
        tokens=latency.tokens.astype(np.int32),
        cpu_us=latency.cpu_us.astype(np.float32),
        regime_shares=latency.regime_shares.astype(np.float32),
        gpu_us=latency.gpu_us.astype(np.float32),
        rest_us=latency.rest_us.astype(np.float32),
        rest_kv_us=np.array([latency.rest_kv_us], np.float32),
        scalars_us=np.array([latency.cpu_overhead_us, latency.gpu_overhead_us, latency.stream_us], np.float32),
        contention=np.array([latency.contention], np.float32),
        decode_streams=np.zeros(spec.top_k + 1, np.int32),
        prefetch=nothing if prefetch is None else prefetch,
        resident=placement.resident.astype(np.uint8),
        popularity=placement.popularity.astype(np.float32),
    )
    # Decided with the rounded tables, as the runtime decides.
    return dataclasses.replace(tables, decode_streams=decode_streams(spec.top_k, dense(tables)))


def latencies(latency: LatencyModel) -> Latencies:
    """What decisions depend on, as the runtime will see it in the plan's float32 tables; no expert is split."""
    return Latencies(
        cpu_us=dense_curve(latency.tokens, latency.prevailing_us.astype(np.float32)),
        gpu_us=dense_curve(latency.tokens, latency.gpu_us.astype(np.float32)),
        cpu_overhead_us=float(np.float32(latency.cpu_overhead_us)),
        gpu_overhead_us=float(np.float32(latency.gpu_overhead_us)),
        stream_us=float(np.float32(latency.stream_us)),
        contention=float(np.float32(latency.contention)),
    )


def decode_streams(top_k: int, latencies: Latencies) -> npt.NDArray[np.int32]:
    """For a step of one token with 0 .. top_k misses, the others being resident: how many misses to stream."""
    counts = np.ones(top_k, np.int32)
    decisions = [choose(counts, np.arange(top_k) >= misses, latencies) for misses in range(top_k + 1)]
    return np.array([decision.streamed for decision in decisions], np.int32)
