"""A write of many parts, sent whole and, where that is too much for one request, in halves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from tasks.backends.qdrant_calls import CheckedCalls
from tasks.backends.qdrant_faults import BatchTooLarge

log = logging.getLogger(__name__)

Item = TypeVar("Item")


def send_halved(
    calls: CheckedCalls, describe: Callable[[int], str], items: Sequence[Item], send: Callable[[Sequence[Item]], None]
) -> None:
    """Send the items in one request, or in as many halves as it takes. describe: number of items -> what is tried.

    Raises StoreRejected for a single item that is too large, and what CheckedCalls.run raises.
    """
    try:
        calls.run(describe(len(items)), lambda: send(items), can_split=len(items) > 1)
    except BatchTooLarge as error:
        log.info("qdrant action=split items=%d reason=%s", len(items), error)
        half = len(items) // 2
        send_halved(calls, describe, items[:half], send)
        send_halved(calls, describe, items[half:], send)
