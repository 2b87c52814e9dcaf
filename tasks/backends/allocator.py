"""PyTorch's CUDA allocator: the environment it reads when torch is imported, and whether it took effect."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping

logger = logging.getLogger(__name__)

# The variable was renamed and some versions read expandable_segments under one name only: set both.
_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_SETTING = "expandable_segments"


def allocator_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Both variables with expandable_segments:True added to what the user set; a user's own expandable_segments wins.

    Without expandable segments a change of shapes leaves cached blocks that fit nothing: 7.84 GiB reserved but
    unallocated on a 15 GiB card. `environment` is os.environ unless given. Must be set before torch is imported.
    """
    given = os.environ if environment is None else environment
    settings: dict[str, str] = {}
    for name in _VARIABLES:
        for entry in given.get(name, "").split(","):
            if entry.strip():
                settings.setdefault(entry.split(":")[0].strip(), entry.strip())
    settings.setdefault(_SETTING, f"{_SETTING}:True")
    return dict.fromkeys(_VARIABLES, ",".join(settings.values()))


def set_allocator_environment() -> None:
    """Set this process's environment. Too late once torch is imported: says so and changes nothing."""
    if "torch" in sys.modules:
        logger.warning(
            "allocator_settings=unchanged reason='torch was imported before its allocator environment was set' "
            "way_out='set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True before the process starts'"
        )
        return
    os.environ.update(allocator_environment())


def check_allocator_settings() -> bool:
    """Whether the CUDA allocator really uses expandable segments; logs the reason and the way out when it does not.

    Call it where a CUDA device is in use: reading the settings initialises CUDA.
    """
    import torch

    settings = torch.cuda.memory._snapshot().get("allocator_settings", {})
    if settings.get(_SETTING):
        return True
    logger.warning(
        "allocator_settings=%s: expandable segments are off in torch %s, so changing batch shapes fragment the "
        "device's memory. Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True before the process starts.",
        settings,
        torch.__version__,
    )
    return False
