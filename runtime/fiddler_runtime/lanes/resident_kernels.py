"""How experts on an accelerator are computed: the kernels there are, and the seam through which the lanes use them.

Which of them run is measured on the device concerned (`kernel_choice.py`); nothing here prefers one.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..plan import ExpertForm
from .expert import (
    PackedExpert,
    UnpackedExpert,
    activate,
    expert_result,
    pack_expert_into,
    run_expert,
    unpack_expert_into,
)
from .routing import Share
from .transfers import send_numbers

Layout = Literal["matrix", "packed"]
Expert = UnpackedExpert | PackedExpert
Work = Sequence[Share]
TRITON = "triton-"


@dataclass
class Held:
    """Experts of one shape on the accelerator, as the chosen kernels read them.

    experts  by expert, all of one layout: the caller's own, so that one which is taken out of it is not held any more
    stacked  the same matrices as one tensor each, [places, ...], where a kernel wants that; places: expert -> its place
    """

    form: ExpertForm
    experts: MutableMapping[int, Expert]
    stacked: UnpackedExpert | None = None
    places: Mapping[int, int] | None = None
    _tables: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def matrices(self, expert: int) -> UnpackedExpert:
        """One of the matrix layout."""
        found = self.experts[expert]
        assert isinstance(found, UnpackedExpert)
        return found

    def packed(self, expert: int) -> PackedExpert:
        """One of the packed layout."""
        found = self.experts[expert]
        assert isinstance(found, PackedExpert)
        return found


@dataclass(frozen=True)
class Kernel:
    """One way to compute experts.

    run      (hidden bf16 [T, H], rows int64 [n], weights fp32 [n], held, shares of the rows, out fp32 [T, H]):
             out[rows] += weights * expert(hidden[rows]). Shares may be empty; experts without a share are not computed
    missing  (form, device) -> why it cannot run there, or None
    stacks   it reads Held.stacked; where there is none, torch's linears run in its place
    """

    name: str
    layout: Layout
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Held, Work, torch.Tensor], None]
    missing: Callable[[ExpertForm, torch.device], str | None]
    stacks: bool = False


def _linear(
    hidden: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, held: Held, shares: Work, out: torch.Tensor
) -> None:
    """Two linears of torch, one expert after another."""
    for share in shares:
        part = slice(share.start, share.stop)
        run_expert(hidden, rows[part], weights[part], held.matrices(share.expert), out)


def _grouped(
    hidden: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, held: Held, shares: Work, out: torch.Tensor
) -> None:
    """torch's grouped matrix product over all experts that are held, those without tokens included."""
    stacked, places = held.stacked, held.places
    if stacked is None or places is None:
        _linear(hidden, rows, weights, held, shares, out)
        return
    counts = [0] * len(places)
    parts: list[slice] = []
    for share in sorted(shares, key=lambda share: places[share.expert]):
        counts[places[share.expert]] = share.stop - share.start
        parts.append(slice(share.start, share.stop))
    tokens = torch.cat([rows[part] for part in parts])
    scale = torch.cat([weights[part] for part in parts])
    if not tokens.numel():
        return
    sizes = send_numbers(counts, hidden.device)
    ends = sizes.cumsum(0).to(torch.int32)

    def product(left: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        found: torch.Tensor = F.grouped_mm(left, matrices.transpose(-2, -1), offs=ends)
        if bias is None:
            return found
        return found + bias.repeat_interleave(sizes, dim=0, output_size=tokens.numel())

    gate, up = product(hidden.index_select(0, tokens), stacked.gate_up, stacked.gate_up_bias).chunk(2, dim=-1)
    inner = activate(held.form.activation, gate, up)
    out.index_add_(0, tokens, product(inner, stacked.down, stacked.down_bias) * scale.unsqueeze(1))


def _unpacked(
    hidden: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, held: Held, shares: Work, out: torch.Tensor
) -> None:
    """Unpacks an expert and computes it by torch's linears: for so many tokens that unpacking is the lesser part."""
    for share in shares:
        part = slice(share.start, share.stop)
        matrices = held.packed(share.expert).to(hidden.device)
        run_expert(hidden, rows[part], weights[part], matrices, out)


def _triton(
    tiles: str,
    hidden: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    held: Held,
    shares: Work,
    out: torch.Tensor,
) -> None:
    """From the packed bytes: triton_experts.py."""
    kernels: Any = importlib.import_module(".triton_experts", __package__)
    # Of the layer's rows those from the first share's to the last's: kernels take memory for each. From a multiple of 4
    # on, or Triton would compile them again for addresses that are less aligned.
    first, last = min(share.start for share in shares) // 4 * 4, max(share.stop for share in shares)
    work = [(held.packed(share.expert), share.start - first, share.stop - first) for share in shares]
    cut = kernels.TILES[tiles]
    table = kernels.table(work, cut, hidden.device)
    kernels.run(hidden, rows[first:last], weights[first:last], held.form, table, out, cut)


def _nothing_missing(form: ExpertForm, device: torch.device) -> str | None:
    return None


def _grouped_missing(form: ExpertForm, device: torch.device) -> str | None:
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if form.hidden_size % 8 or form.intermediate_size % 8:
        return f"grouped_mm takes sizes that are multiples of 8, not {form.hidden_size} x {form.intermediate_size}"
    return None


def _triton_missing(form: ExpertForm, device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if form.hidden_size % 2 or form.intermediate_size % 2:
        return f"an odd size, {form.hidden_size} x {form.intermediate_size}"
    return None


KERNELS: Mapping[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel("linear", "matrix", _linear, _nothing_missing),
        Kernel("grouped_mm", "matrix", _grouped, _grouped_missing, stacks=True),
        *(Kernel(TRITON + t, "packed", partial(_triton, t), _triton_missing) for t in ("few", "some", "many")),
        Kernel("unpacked", "packed", _unpacked, _nothing_missing),
    )
}


@dataclass(frozen=True)
class Choice:
    """Which layout experts have on a device, and which kernel runs from how many tokens an expert on.

    kernels  (tokens, kernel), ascending, the first from 0 on; all of that layout
    reason   in words: what it rests on
    """

    layout: Layout
    kernels: tuple[tuple[int, str], ...]
    reason: str

    def at(self, tokens: float) -> Kernel:
        """The kernel for experts of so many tokens."""
        *_, name = (name for least, name in self.kernels if least <= tokens)
        return KERNELS[name]

    @property
    def stacks(self) -> bool:
        """Whether one of them reads stacked matrices."""
        return any(KERNELS[name].stacks for _, name in self.kernels)

    def __str__(self) -> str:
        steps = ", ".join(f"{name} from {least} tokens" if least else name for least, name in self.kernels)
        return f"{steps} ({self.layout} layout; {self.reason})"


class ExpertKernels:
    """The lanes' way to compute experts on one device, in the layout that was chosen for it."""

    isa = "torch"

    def __init__(self, form: ExpertForm, device: torch.device, choice: Choice) -> None:
        self.form, self.device, self.choice = form, device, choice
        # What a packed expert is copied to before it is unpacked.
        self._landing: torch.Tensor | None = None

    def __str__(self) -> str:
        return str(self.choice)

    def close(self) -> None:
        """Ends what was opened for it."""

    def hold(self, experts: MutableMapping[int, Any]) -> Held:
        """Takes over a layer's residents, matrices so far, in the chosen layout. What they become replaces them in
        `experts`, one after another: no more than one is there twice, or a layer's where kernels want them stacked."""
        if self.choice.layout == "packed":
            for expert, matrices in experts.items():
                packed = PackedExpert.empty(self.form, self.device)
                pack_expert_into(matrices, packed.numbers)
                experts[expert] = packed
        if not self.choice.stacks or not experts:
            return Held(self.form, experts)
        try:
            stacked = _stack_of(self.form, len(experts), self.device)
        except torch.OutOfMemoryError:
            return Held(self.form, experts)  # as after give_back(): the kernels that want none compute them
        for place, (expert, matrices) in enumerate(experts.items()):
            view = _place_of(stacked, place)
            _fill(view, matrices)
            experts[expert] = view
        return Held(self.form, experts, stacked, {expert: place for place, expert in enumerate(experts)})

    def give_back(self, held: Held) -> None:
        """Lets go of the memory of experts that were taken out of held.experts: a stack is given up for that, by way
        of the host, since there is no room for two."""
        if held.places is None or len(held.experts) == len(held.places):
            return
        for expert in held.experts:
            on_host = UnpackedExpert.empty(self.form)
            _fill(on_host, held.matrices(expert))
            held.experts[expert] = on_host
        held.stacked = held.places = None
        for expert in held.experts:
            held.experts[expert] = held.matrices(expert).to(self.device)

    def slot(self) -> Held:
        """Room for one expert that is copied here, as expert 0."""
        if self.choice.layout == "packed":
            return Held(self.form, {0: PackedExpert.empty(self.form, self.device)})
        if self._landing is None:
            self._landing = torch.empty(self.form.packed_bytes // 2, dtype=torch.bfloat16, device=self.device)
        return _alone(self.form, UnpackedExpert.empty(self.form, self.device))

    def first_rows(self, slot: Held, rows: int) -> Held:
        """The same room for an expert of its first intermediate rows alone."""
        form = replace(self.form, intermediate_size=rows)
        return _alone(form, slot.experts[0].rows(rows))

    def landing(self, slot: Held) -> torch.Tensor:
        """Where the bytes of a packed expert are to be copied: bf16 [packed_bytes / 2]."""
        room = slot.experts[0]
        if isinstance(room, PackedExpert):
            return room.numbers
        assert self._landing is not None
        return self._landing

    def landed(self, landing: torch.Tensor, slot: Held) -> None:
        """To be called when they are there, in the copy engine's order."""
        room = slot.experts[0]
        if isinstance(room, UnpackedExpert):
            unpack_expert_into(landing, room)

    def run(
        self,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        weights: torch.Tensor,
        held: Held,
        shares: Work,
        out: torch.Tensor,
    ) -> None:
        """Adds the shares' experts to out fp32 [T, H]; see Kernel.run."""
        if shares:
            tokens = sum(share.stop - share.start for share in shares) / len(shares)
            self.choice.at(tokens).run(hidden, rows, weights, held, shares, out)

    def run_masked(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, held: Held, out: torch.Tensor
    ) -> None:
        """Adds all held experts to out fp32 [T, H], where nothing may depend on the routing: within a captured step.

        hidden bf16 [T, H]; ids integer and weights fp32 [T, k], on the device. Triton's kernels read only the experts
        that were chosen; torch's compute every one for every token, and what was not chosen counts nothing. The first
        call for a number of tokens sends a table to the device: it comes before the capture.
        """
        tokens, experts = hidden.shape[0], sorted(held.experts)
        if not experts:
            return
        kernel = self.choice.at(tokens * ids.shape[1] / len(experts))
        if not kernel.name.startswith(TRITON):
            for expert in experts:
                room = held.experts[expert]
                matrices = room.to(hidden.device) if isinstance(room, PackedExpert) else room
                chosen = ids == expert
                share = expert_result(hidden, matrices) * (weights * chosen).sum(-1, keepdim=True)
                # Not by its weight of 0 alone: 0 times an infinity of another token's result would be no number.
                out.add_(share.masked_fill_(chosen.any(-1, keepdim=True).logical_not(), 0.0))
            return
        kernels: Any = importlib.import_module(".triton_experts", __package__)
        cut = kernels.TILES[kernel.name.removeprefix(TRITON)]
        key = (tokens, cut.tokens, *experts)
        if key not in held._tables:
            work = [(held.packed(e), place * tokens, (place + 1) * tokens) for place, e in enumerate(experts)]
            numbers = send_numbers(experts, hidden.device)
            held._tables[key] = kernels.table(work, cut, hidden.device), numbers
        table, numbers = held._tables[key]
        chosen = ids == numbers[:, None, None]  # [experts, T, k]
        rows = torch.where(chosen.any(-1), torch.arange(tokens, device=hidden.device), -1)
        kernels.run(hidden, rows.view(-1), (weights * chosen).sum(-1).view(-1), held.form, table, out, cut)


def _stack_of(form: ExpertForm, count: int, device: torch.device) -> UnpackedExpert:
    def room(*shape: int) -> torch.Tensor:
        return torch.empty((count, *shape), dtype=torch.bfloat16, device=device)

    rows, width = form.intermediate_size, form.hidden_size
    biases = (room(2 * rows), room(width)) if form.bias else ()
    return UnpackedExpert(form.activation, room(2 * rows, width), room(width, rows), *biases)


def _place_of(stacked: UnpackedExpert, place: int) -> UnpackedExpert:
    return UnpackedExpert(stacked.activation, *(part[place] for part in _parts(stacked)))


def _alone(form: ExpertForm, expert: Expert) -> Held:
    """One expert, as expert 0. A stack of one needs no other memory."""
    if isinstance(expert, PackedExpert):
        return Held(form, {0: expert})
    stack = UnpackedExpert(expert.activation, *(part.unsqueeze(0) for part in _parts(expert)))
    return Held(form, {0: expert}, stack, {0: 0})


def _fill(target: UnpackedExpert, source: UnpackedExpert) -> None:
    for mine, theirs in zip(_parts(target), _parts(source), strict=True):
        mine.copy_(theirs)


def _parts(expert: UnpackedExpert) -> Iterator[torch.Tensor]:
    for part in (expert.gate_up, expert.down, expert.gate_up_bias, expert.down_bias):
        if part is not None:
            yield part
