"""The memory model: peak device bytes of one forward pass, on top of the weights, from batch size and padded tokens.

b nodes of s padded tokens are n = b*s tokens. Inference frees a layer's tensors before the next layer makes its own, so
the number of layers doesn't matter and the peak is the larger of two moments inside one layer:

    unmasked: c0 + n * max(token,        attention        + square        * s)
    masked:   c0 + n * max(masked_token + mask * s, masked_attention + masked_square * s)

`token` is the feed-forward moment, `attention + square*s` the attention moment. A sum c0 + c1 n + c2 n s is the
special case token == attention. The max matters: with one sum for both moments, a padded batch of bge-m3 at 2048
tokens comes out 27 % wrong. All coefficients are >= 0 and masked ones >= unmasked ones, so predictions are monotone in
b and s and never smaller with a mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tasks.records import Attention, ModelShape, Precision

FIXED_BYTES = 32 * 1024**2
"""c0 of the prior: cuBLAS workspaces (8 MiB up to Ampere, 32 MiB on Hopper), blocks rounded to 512 bytes, split
segments."""

IDS_BYTES = 16
"""Per token: int64 token ids and attention mask, alive all the way. Measured: 16 bytes remain beyond the hidden
states."""


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """Coefficients in bytes: `fixed` per forward pass, `square*` and `mask` per token and padded token, the rest per
    token."""

    fixed: float
    token: float
    attention: float
    square: float
    masked_token: float
    masked_attention: float
    masked_square: float
    mask: float

    def predict(self, nodes: ArrayLike, padded_tokens: ArrayLike, masked: ArrayLike) -> NDArray[np.int64]:
        """Peak bytes on top of the weights; the arguments broadcast against each other."""
        b = np.asarray(nodes, dtype=np.float64)
        s = np.asarray(padded_tokens, dtype=np.float64)
        return np.ceil(self.fixed + b * s * self._token_bytes(s, masked)).astype(np.int64)

    def largest_batch(self, padded_tokens: ArrayLike, masked: ArrayLike, budget_bytes: float) -> NDArray[np.int64]:
        """The most nodes whose predicted peak stays within the budget, exactly; 0 where not even one node fits."""
        s = np.asarray(padded_tokens, dtype=np.float64)
        per_node = s * self._token_bytes(s, masked)
        room = max(0.0, float(budget_bytes) - self.fixed)
        # A model without slopes would fit any batch: 2^40 nodes is "any".
        nodes = np.floor(np.minimum(room / np.maximum(per_node, 1e-9), 2.0**40)).astype(np.int64)
        # The division rounds: step to the exact integer, never over.
        nodes = nodes - (self.predict(nodes, padded_tokens, masked) > budget_bytes)
        nodes = nodes + (self.predict(nodes + 1, padded_tokens, masked) <= budget_bytes)
        return np.maximum(nodes, 0)

    def coefficients(self) -> Mapping[str, float]:
        """For reports: name -> bytes."""
        return asdict(self)

    def _token_bytes(self, s: NDArray[np.float64], masked: ArrayLike) -> NDArray[np.float64]:
        plain = np.maximum(self.token, self.attention + self.square * s)
        padded = np.maximum(self.masked_token + self.mask * s, self.masked_attention + self.masked_square * s)
        return np.where(np.asarray(masked, dtype=bool), padded, plain)


def derive_prior(
    shape: ModelShape,
    precision: Precision,
    kernel_masked: Attention,
    kernel_unmasked: Attention,
    *,
    pads_mask: bool = True,
) -> MemoryModel:
    """The closed form, from what lives at the two moments of a BERT or XLM-R layer (transformers 5.23) at inference.

    h, i: hidden and intermediate size; e: bytes of an element. Per token:
    - always alive: the embeddings' output (held by the model's forward until it returns) and the layer's input: 2 h e;
    - feed-forward: and the attention block's output h, the dense output i, its GELU i: 3 h e + 2 i e in all. The layer
      norms, the sum of the embeddings and the pooling need less. Measured on the CPU for MiniLM, bge-base, bge-m3:
      exact to 16 bytes a token;
    - attention, flash or memory-efficient kernel: and q, k, v and the context: 6 h e;
    - attention by `math`: and scores, softmax and its -inf test, all fp32: 9 * heads * s bytes; half precision also
      copies q, k, v to fp32 and scales them: 13 h e beside the scores, 21 h e before there are any;
    - mask: transformers keeps a bool [b, 1, s, s] for the whole pass: s bytes; the kernel turns it into elements: e s
      bytes; CUDA's memory-efficient kernel copies that once more where s is no multiple of 8 (`pads_mask`; never on a
      CPU).
    """
    e = 4 if precision == "fp32" else 2
    h, i = shape.hidden * e, shape.intermediate * e
    token = IDS_BYTES + 3.0 * h + 2.0 * i

    def at_attention(kernel: Attention) -> tuple[float, float, float]:
        """(s-independent moment, attention per token, attention per token and s), without what the mask adds."""
        match kernel:
            case "math":
                upcast = e == 2
                before_scores = IDS_BYTES + (21.0 if upcast else 6.0) * h
                return max(token, before_scores), IDS_BYTES + (13.0 if upcast else 6.0) * h, 9.0 * shape.heads
            case "eager":  # scores and their scaled or softmaxed copy, in the model's own precision
                return token, IDS_BYTES + 6.0 * h, 2.0 * e * shape.heads
            case "sdpa" | "flash_attention_2":  # and flash's log-sum-exp, fp32, a number per head
                return token, IDS_BYTES + 6.0 * h + 4.0 * shape.heads, 0.0

    plain_token, plain_attention, plain_square = at_attention(kernel_unmasked)
    masked_token, masked_attention, masked_square = at_attention(kernel_masked)
    match kernel_masked:
        case "flash_attention_2":  # takes no mask: rows are unpadded, q, k and v copied once more
            mask, kernel_mask = 0.0, 0.0
            masked_attention += 3.0 * h
        case "eager":  # an additive mask in the model's precision from the start
            mask, kernel_mask = float(e), float(e)
        case "math":
            mask, kernel_mask = 1.0, 1.0 + e
        case "sdpa":
            mask, kernel_mask = 1.0, 1.0 + (2.0 if pads_mask else 1.0) * e
    return MemoryModel(
        fixed=float(FIXED_BYTES),
        token=plain_token,
        attention=plain_attention,
        square=plain_square,
        masked_token=max(masked_token, plain_token),
        masked_attention=max(masked_attention, plain_attention),
        masked_square=max(masked_square + kernel_mask, plain_square),
        mask=mask,
    )
