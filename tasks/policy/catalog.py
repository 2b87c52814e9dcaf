"""Well-known embedding models by their public shapes: what `ballast plan` compares on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tasks.policy.memory import derive_prior
from tasks.records import Attention, ModelFit, ModelShape, Precision


@dataclass(frozen=True, slots=True)
class PublicModel:
    """`max_tokens`: the limit of one sequence, which may be lower than the position table in `shape`."""

    name: str
    shape: ModelShape
    max_tokens: int


CATALOG = (
    PublicModel("BAAI/bge-m3", ModelShape(24, 1024, 16, 4096, 250_002, 8194), 8192),
    PublicModel("BAAI/bge-base-en-v1.5", ModelShape(12, 768, 12, 3072, 30_522, 512), 512),
    PublicModel("BAAI/bge-small-en-v1.5", ModelShape(12, 384, 12, 1536, 30_522, 512), 512),
    PublicModel("sentence-transformers/all-MiniLM-L6-v2", ModelShape(6, 384, 12, 1536, 30_522, 512), 256),
)
"""From the models' public config.json and sentence_bert_config.json. Largest first."""


def weights_bytes(shape: ModelShape, precision: Precision) -> int:
    """Device memory of the weights alone."""
    return shape.parameters * (4 if precision == "fp32" else 2)


def count_flops(shape: ModelShape, lengths: ArrayLike) -> float:
    """Floating point operations to embed nodes of these lengths, without padding: the matrix products only.

    Per token and layer 2 * (4 h^2 + 2 h i) for the projections and the feed-forward block, and 4 h s for scores and
    context.
    """
    tokens = np.asarray(lengths, dtype=np.float64)
    linear = 2.0 * (4.0 * shape.hidden**2 + 2.0 * shape.hidden * shape.intermediate)
    attention = 4.0 * shape.hidden
    return float(shape.layers * (linear * tokens.sum() + attention * (tokens**2).sum()))


def split_lengths(lengths: ArrayLike, max_tokens: int) -> NDArray[np.int64]:
    """The lengths that a model with a smaller limit would see: a node of n > limit becomes ceil(n / limit) near-equal
    pieces.

    An approximation of chunking anew: overlap, special tokens and sentence ends are not modelled, nor is another
    tokenizer.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    pieces = np.maximum(-(-lengths // max_tokens), 1)
    parts = np.repeat(lengths // pieces, pieces)
    # The remainder goes to the first pieces, a token each: nothing is lost and no piece exceeds the limit.
    position = np.arange(parts.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return np.asarray(parts + (position < np.repeat(lengths % pieces, pieces)), dtype=np.int64)


def compare_models(
    lengths: ArrayLike,
    budget_total_bytes: int,
    precision: Precision,
    *,
    chosen: ModelShape,
    kernel_masked: Attention = "sdpa",
    kernel_unmasked: Attention = "sdpa",
    models: Sequence[PublicModel] = CATALOG,
) -> tuple[ModelFit, ...]:
    """Whether each model's weights and its longest node fit the budget, and what it costs against the chosen model.

    `lengths`: tokens a node as chunked for the chosen model; a model with a smaller limit gets them by split_lengths().
    `budget_total_bytes`: for weights and micro-batch together, margin already taken. Peaks are the closed-form prior's.
    """
    reference = count_flops(chosen, lengths)
    fits = []
    for model in models:
        pieces = split_lengths(lengths, model.max_tokens)
        weights = weights_bytes(model.shape, precision)
        prior = derive_prior(model.shape, precision, kernel_masked, kernel_unmasked)
        longest = int(pieces.max(initial=1))
        alone = prior.largest_batch(pieces, False, budget_total_bytes - weights)
        spilled = int((alone == 0).sum())
        fits.append(
            ModelFit(
                model=model.name,
                parameters=model.shape.parameters,
                weights_bytes=weights,
                fits=weights <= budget_total_bytes and spilled == 0,
                max_tokens=model.max_tokens,
                largest_batch=int(prior.largest_batch(longest, False, budget_total_bytes - weights)),
                spilled_nodes=spilled,
                relative_cost=count_flops(model.shape, pieces) / reference if reference else 1.0,
            )
        )
    return tuple(fits)
