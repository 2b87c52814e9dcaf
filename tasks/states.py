"""A task's result together with the name and message that its state shows."""

from __future__ import annotations

from typing import TypeVar, cast

from prefect.states import Completed

Result = TypeVar("Result")


def complete(data: Result, message: str, *, name: str = "Completed") -> Result:
    """Return this from a task: Prefect makes it the run's state and hands `data` to whoever asks for the result."""
    return cast(Result, Completed(name=name, message=message, data=data))
