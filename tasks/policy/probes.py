"""Which micro-batches to probe a device with, and which to hold back for the check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.policy.memory import MemoryModel

PROBE_FRACTION = 0.6
"""Of the budget, if the prior is wrong by PROBE_DOUBT: probing must not be what runs out of memory."""

PROBE_DOUBT = 2.0

MAX_PROBE_TOKENS = 32_768


@dataclass(frozen=True, slots=True, order=True)
class Probe:
    """What to run: `nodes` rows of `padded_tokens`; masked: the last row is shorter."""

    nodes: int
    padded_tokens: int
    masked: bool


@dataclass(frozen=True, slots=True)
class ProbePlan:
    """Six to eight shapes to fit and two to four to check the fit with; fewer where a budget or a model allows no
    more."""

    fit: tuple[Probe, ...]
    held_back: tuple[Probe, ...]


def choose_probes(
    max_tokens: int, budget_bytes: int, prior: MemoryModel, *, max_batch_tokens: int = MAX_PROBE_TOKENS
) -> ProbePlan:
    """Shapes from one long node to wide and short, with and without a mask, smallest predicted peak first.

    Masked lengths are no multiple of 8, where CUDA's memory-efficient kernel copies the mask: the dearer case is
    fitted.
    """
    allowed = budget_bytes * PROBE_FRACTION / PROBE_DOUBT

    def shape_probe(length_fraction: float, token_fraction: float, masked: bool) -> Probe | None:
        s = max(min(16, max_tokens), round(max_tokens * length_fraction))
        while True:
            s -= int(masked and s % 8 == 0)
            least = 2 if masked else 1
            wanted = max(least, int(max_batch_tokens * token_fraction) // s)
            fitting = int(prior.largest_batch(s, masked, allowed))
            if fitting >= least:
                return Probe(min(wanted, fitting), s, masked)
            if s <= 16:
                return None
            s //= 2

    def shape_all(fractions: Sequence[tuple[float, float, bool]], taken: frozenset[Probe]) -> tuple[Probe, ...]:
        probes = {probe for f in fractions if (probe := shape_probe(*f)) is not None} - taken
        return tuple(sorted(probes, key=lambda x: (int(prior.predict(x.nodes, x.padded_tokens, x.masked)), x)))

    # (length against the model's limit, tokens against the largest batch, masked)
    fit = shape_all(
        (
            (1 / 32, 1 / 16, False),
            (1 / 32, 1.0, False),
            (1 / 4, 1 / 2, False),
            (1.0, 1 / 4, False),
            (1 / 32, 1 / 2, True),
            (1 / 6, 1.0, True),
            (1 / 2, 1 / 2, True),
            (1.0, 3 / 4, True),
        ),
        frozenset(),
    )
    held_back = shape_all(
        ((1 / 8, 3 / 4, False), (1 / 2, 1 / 2, False), (1 / 3, 3 / 4, True), (3 / 4, 3 / 4, True)), frozenset(fit)
    )
    return ProbePlan(fit, held_back)
