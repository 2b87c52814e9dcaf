"""Why a delivery is not taken: the HTTP status and a reason with the way out."""

from __future__ import annotations

from tasks.errors import BallastError


class Refused(BallastError):  # noqa: N818  what the sender is told; nothing is wrong here
    """`status`: the answer's HTTP status, 4xx or 503."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
