"""What the receiver answers; also the schemas of the OpenAPI description."""

from __future__ import annotations

from typing import Literal
from urllib.parse import quote

from pydantic import BaseModel, Field

from deployments.receiver.journal import Receipt


class Answer(BaseModel):
    """One delivery and what became of it."""

    delivery: str = Field(description="The delivery's id. Sent again under this id, it starts nothing.")
    status: Literal["collecting", "released", "waiting", "ignored", "pong"] = Field(
        description="collecting: its run starts when the burst is over; released: the run has all paths and may start; "
        "waiting: the Prefect server has not made the run yet, and will; ignored: nothing to ingest, see reason; pong: a test."
    )
    run: str | None = Field(description="The flow run's id; null where there is none, or none yet.")
    page: str | None = Field(description="The run's page in Prefect's UI.")
    coalesced: bool = Field(description="Whether it joined a run that another delivery had begun.")
    changed: list[str] | None = Field(description="The documents that it names; null: the whole source.")
    reason: str | None = Field(description="Why it was ignored.")
    address: str = Field(description="Where to ask again, signed as the hook asks for.")


class Refusal(BaseModel):
    error: str = Field(description="What is wrong, and the way out.")


class Health(BaseModel):
    status: Literal["ok"] = "ok"


def address_of(hook: str, delivery_id: str) -> str:
    return f"/hooks/{hook}/deliveries/{quote(delivery_id, safe='')}"


def to_answer(receipt: Receipt, page: str | None) -> Answer:
    delivery = receipt.delivery
    status: Literal["collecting", "released", "waiting", "ignored", "pong"]
    if delivery.status == "pong":
        status = "pong"
    elif delivery.status == "ignored":
        status = "ignored"
    elif receipt.run is None:
        status = "waiting"
    else:
        status = "released" if receipt.batch_state == "done" else "collecting"
    return Answer(
        delivery=delivery.id,
        status=status,
        run=receipt.run,
        page=page,
        coalesced=receipt.coalesced,
        changed=None if delivery.changed is None else list(delivery.changed),
        reason=delivery.reason,
        address=address_of(delivery.hook, delivery.id),
    )
