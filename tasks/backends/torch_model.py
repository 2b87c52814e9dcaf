"""A SentenceTransformer on a device: loading, placing, and what can be read off it without running it.

Runs with torch 2.11 and later, transformers 5.17 and later, sentence-transformers 6.0 and later.
"""

from __future__ import annotations

import copy
import logging
from itertools import chain
from typing import Any, cast

from tasks.errors import ConfigError, DeviceError, ModelError
from tasks.records import Attention, ModelShape, Precision

logger = logging.getLogger(__name__)

GIB = 1024**3


def resolve_device(device: str) -> str:
    """ "cuda" becomes "cuda:0". Raises DeviceError where torch does not have it, with the reason."""
    import torch

    if device == "cpu":
        return device
    if not device.startswith("cuda"):
        raise ConfigError(f"Device {device!r} is none that Ballast embeds on. Use cuda:N or cpu.")
    index = int(device.partition(":")[2] or 0)
    if torch.version.cuda is None and torch.version.hip is None:
        raise DeviceError(f"{device} was asked for, but torch {torch.__version__} is a build without CUDA. Use cpu.")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= found:
        raise DeviceError(
            f"{device} was asked for, but torch {torch.__version__} sees {found} CUDA devices. Check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or use cpu."
        )
    return f"cuda:{index}"


def resolve_precision(precision: str, device: str) -> Precision:
    """auto: fp16 on CUDA, fp32 on the CPU. Raises DeviceError for bf16 where the hardware only emulates it."""
    import torch

    if precision == "auto":
        return "fp32" if device == "cpu" else "fp16"
    # Emulated bf16 is slow, and attention falls back to kernels that hold all heads x s x s scores.
    if precision == "bf16" and device != "cpu" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise DeviceError(f"{name} has no bf16 arithmetic of its own. Use embedding.precision=fp16 or fp32.")
    if precision not in ("fp32", "fp16", "bf16"):
        raise ConfigError(f"Precision {precision!r} is unknown. Use auto, fp32, fp16 or bf16.")
    return cast(Precision, precision)


def to_dtype(precision: Precision) -> Any:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def load_model(model_path: str, precision: Precision) -> Any:
    """The SentenceTransformer at `model_path`, on the host, in `precision`. Raises ModelError."""
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(str(model_path), device="cpu", model_kwargs={"dtype": to_dtype(precision)})
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ModelError(
            f"The embedding model {model_path} can't be loaded: {type(error).__name__}: {error}. "
            "Give a model id of the hub, or a folder that holds a SentenceTransformer."
        ) from error
    return check_prompt_pooling(model)


def check_prompt_pooling(model: Any) -> Any:
    """Refuse a pooling that leaves the prompt's tokens out: token ids don't tell where the prompt ends."""
    for module in model.modules():
        if getattr(module, "include_prompt", True) is False and any(getattr(model, "prompts", {}).values()):
            raise ModelError(
                "This model's pooling leaves out the prompt's tokens (include_prompt=false), which Ballast can't do. "
                "Use a model that pools all tokens, or one without prompts."
            )
    return model


def wrap_transformer(model: Any, pooling: str) -> Any:
    """A transformers model as a SentenceTransformer with `pooling` ("cls", "mean", ...) and normalisation."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    class Body(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            output = self.model(features["input_ids"], attention_mask=features.get("attention_mask"))
            return {**features, "token_embeddings": output.last_hidden_state}

    return SentenceTransformer(modules=[Body(), Pooling(model.config.hidden_size, pooling), Normalize()], device="cpu")


def place_model(model: Any, device: str, precision: Precision) -> Any:
    """Cast on the host, then move: the device never holds both precisions."""
    model.eval()
    if next(model.parameters()).device.type == "cpu":
        model.to(dtype=to_dtype(precision))
        return model.to(device)
    return model.to(device=device, dtype=to_dtype(precision))


def copy_to_host(model: Any) -> Any:
    """An fp32 copy of `model` on the host that takes no memory on its device."""
    import torch

    # deepcopy looks tensors up in its memo first: filled with host copies, it never clones one on the device.
    memo: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        moved = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(moved, requires_grad=False) if is_parameter else moved
    return copy.deepcopy(model, memo)


def read_config(model: Any) -> Any:
    """The transformers configuration. Raises ModelError for a model that is no transformer."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "num_hidden_layers") and hasattr(config, "num_attention_heads"):
            return config
    raise ModelError("This model holds no transformer, so its memory can't be modelled. Use a transformer encoder.")


def read_shape(model: Any) -> ModelShape:
    config = read_config(model)
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        max_tokens=config.max_position_embeddings,
    )


def read_max_tokens(model: Any) -> int:
    """The longest sequence: the model's own limit, never above what its position table holds."""
    config = read_config(model)
    positions = int(config.max_position_embeddings)
    for module in model.modules():
        # RoBERTa counts positions from padding_idx + 1 on: XLM-R's table of 8194 serves 8192 tokens.
        padding_idx = getattr(getattr(module, "position_embeddings", None), "padding_idx", None)
        if padding_idx is not None:
            positions -= int(padding_idx) + 1
            break
    limit = getattr(model, "max_seq_length", None)
    return min(int(limit), positions) if limit else positions


def read_pad_id(model: Any) -> int:
    """The id that fills short rows. XLM-R derives positions from it: another one would shift padded rows."""
    tokenizer = getattr(model, "tokenizer", None)
    for source in (tokenizer, read_config(model)):
        pad_id = getattr(source, "pad_token_id", None)
        if pad_id is not None:
            return int(pad_id)
    return 0


def count_weights_bytes(model: Any) -> int:
    return sum(t.numel() * t.element_size() for t in chain(model.parameters(), model.buffers()))


def find_kernels(model: Any, device: str, precision: Precision) -> tuple[Attention, Attention]:
    """Which attention an unmasked and a masked batch get, as torch itself dispatches them on this device.

    "math" holds heads x s x s scores a row; bf16 on a T4 ends there. Asked, not looked up: it differs by torch version.
    """
    import torch

    config = read_config(model)
    implementation = str(getattr(config, "_attn_implementation", "sdpa"))
    if implementation != "sdpa":
        # Whatever is not known to avoid the scores is taken to hold them.
        known: Attention = "flash_attention_2" if implementation == "flash_attention_2" else "eager"
        return known, known
    heads, rows = config.num_attention_heads, 48
    shape = (2, heads, rows, config.hidden_size // heads)
    query = torch.zeros(shape, device=device, dtype=to_dtype(precision))
    mask = torch.zeros((2, 1, rows, rows), device=device, dtype=query.dtype)
    with torch.inference_mode():
        choices = [torch._fused_sdp_choice(query, query, query, attn_mask=given) for given in (None, mask)]
    kernels: list[Attention] = ["math" if choice == 0 else "sdpa" for choice in choices]
    return kernels[0], kernels[1]
