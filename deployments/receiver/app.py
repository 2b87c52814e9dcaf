"""The HTTP side: one route a configured hook, and two for whoever watches over the receiver."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deployments.receiver.answers import Answer, Health, Refusal, to_answer
from deployments.receiver.batches import Batches
from deployments.receiver.config import Hook, ReceiverSettings
from deployments.receiver.description import (
    describe_accepted,
    describe_hook,
    describe_responses,
    describe_scheme,
    describe_standard_headers,
)
from deployments.receiver.group_commit import GroupCommit
from deployments.receiver.journal import Delivery, Journal, Receipt
from deployments.receiver.read_delivery import HeldBytes, check_before_body, read_body, to_delivery
from deployments.receiver.refused import Refused
from deployments.receiver.runs import FlowRuns, RunsUnavailable
from deployments.receiver.signatures import verify_bearer, verify_standard

logger = logging.getLogger(__name__)

# Anyone may ask for /readyz: the Prefect server is asked at most so often.
READY_FOR_S = 2.0
# With uvicorn's own grace below the 10 s after which Docker kills; the journal has what is left.
STOP_PATIENCE_S = 6.0

Keys = Mapping[str, Sequence[bytes]]
ConnectRuns = Callable[[], AbstractAsyncContextManager[FlowRuns]]


@dataclass(slots=True)
class Parts:
    """What there is only while the app runs."""

    commits: GroupCommit
    runs: FlowRuns
    batches: Batches


def make_app(settings: ReceiverSettings, keys: Keys, journal: Journal, connect_runs: ConnectRuns) -> FastAPI:
    """`keys`: each hook's, by its name. The journal is closed when the app ends."""
    receiver = Receiver(settings, keys)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with connect_runs() as runs:
            commits = GroupCommit(journal)
            batches = Batches(settings, commits, runs)
            receiver.parts = Parts(commits, runs, batches)
            await batches.start()
            yield
            left = await batches.stop(STOP_PATIENCE_S)
            await commits.close()
            journal.close()
            logger.info("webhooks stopped batches_left=%d", left)

    app = FastAPI(
        title="Ballast webhooks",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # they load scripts from other hosts
        redoc_url=None,
    )
    for name, hook in settings.hooks.items():
        _add_hook(app, receiver, name, hook)
    _add_probes(app, receiver)
    app.add_exception_handler(Refused, _refuse)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(sqlite3.Error, _refuse_for_disk)
    _describe_security(app, settings)
    return app


class Receiver:
    def __init__(self, settings: ReceiverSettings, keys: Keys) -> None:
        self.settings = settings
        self.keys = keys
        self.parts: Parts | None = None
        self._held = HeldBytes(settings.max_held_bytes)
        self._ready: tuple[float, str | None] = (float("-inf"), None)
        self._asking = asyncio.Lock()

    @property
    def running(self) -> Parts:
        if self.parts is None:
            raise RuntimeError("the app has not started: its lifespan was not entered")
        return self.parts

    async def receive(self, name: str, hook: Hook, request: Request) -> JSONResponse:
        """202 when it is written down, or 200 for a test of the sender's. Raises Refused."""
        began = time.perf_counter()
        try:
            receipt = await self._read_and_take(name, hook, request)
        except Refused as refused:
            logger.warning("webhook_delivery refused hook=%s status=%d reason=%r", name, refused.status, refused.reason)
            raise
        except ClientDisconnect:
            raise Refused(400, "The body broke off.") from None
        answer = self.answer(receipt)
        logger.info(
            "webhook_delivery %s hook=%s delivery=%s new=%s changed=%s run=%s coalesced=%s ms=%.1f",
            answer.status,
            name,
            answer.delivery,
            receipt.is_new,
            "all" if answer.changed is None else len(answer.changed),
            answer.run,
            answer.coalesced,
            1000 * (time.perf_counter() - began),
        )
        status = 200 if answer.status == "pong" else 202
        return JSONResponse(
            answer.model_dump(), status, headers={"Location": answer.address} if status == 202 else None
        )

    async def _read_and_take(self, name: str, hook: Hook, request: Request) -> Receipt:
        settings, keys, headers = self.settings, self.keys[name], dict(request.headers)
        check_before_body(hook, keys, headers, now=time.time(), tolerance_s=settings.tolerance_s)
        # Until the delivery is written down: its names take several times the body's bytes.
        with self._held.open() as hold:
            body = await read_body(
                headers,
                request.stream(),
                hold,
                max_bytes=settings.max_body_bytes,
                timeout_s=settings.body_timeout_s,
            )
            delivery = to_delivery(name, hook, keys, headers, body, settings, time.time())
            del body
            return await self._take(delivery)

    async def _take(self, delivery: Delivery) -> Receipt:
        if delivery.status == "pong":
            return Receipt(delivery, None, None, None, coalesced=False)
        return await self.running.batches.accept(delivery)

    async def find(self, name: str, hook: Hook, delivery_id: str, request: Request) -> JSONResponse:
        headers = dict(request.headers)
        if hook.auth == "bearer":
            verify_bearer(self.keys[name], headers)
        else:
            # GitHub's scheme over no body would be one signature for ever: asking is signed as Standard Webhooks has it.
            signed = verify_standard(
                self.keys[name], headers, b"", now=time.time(), tolerance_s=self.settings.tolerance_s
            )
            if signed != delivery_id:
                raise Refused(
                    401, "webhook-id is not the delivery asked for. Sign this delivery's id, with an empty body."
                )
        receipt = await self.running.batches.find(name, delivery_id)
        if receipt is None:
            raise Refused(
                404, f"The hook {name} knows no such delivery, or no longer: {self.settings.keep_days:g} days."
            )
        return JSONResponse(self.answer(receipt).model_dump())

    def answer(self, receipt: Receipt) -> Answer:
        return to_answer(receipt, self.running.runs.page(receipt.run) if receipt.run else None)

    async def check_ready(self) -> None:
        """Raises Refused 503: the journal can't be written, Prefect is away, or a hook's deployment is not there."""
        async with self._asking:
            asked, reason = self._ready
            if time.monotonic() - asked > READY_FOR_S:
                reason = await self._find_fault()
                self._ready = time.monotonic(), reason
        if reason is not None:
            raise Refused(503, reason)

    async def _find_fault(self) -> str | None:
        try:
            await self.running.commits.do(lambda journal: journal.touch())
            for deployment in sorted({hook.deployment for hook in self.settings.hooks.values()}):
                await self.running.runs.check(deployment)
        except sqlite3.Error as error:
            return (
                f"The journal {self.settings.journal} can't be written: {error}. Free its disk, or name another file."
            )
        except RunsUnavailable as error:
            return str(error)
        return self.running.batches.fault


# ---------------------------------------------------------------------------------------------- routes


def _add_hook(app: FastAPI, receiver: Receiver, name: str, hook: Hook) -> None:
    async def receive(request: Request) -> JSONResponse:
        return await receiver.receive(name, hook, request)

    async def find(delivery: str, request: Request) -> JSONResponse:
        return await receiver.find(name, hook, delivery, request)

    app.post(
        f"/hooks/{name}",
        status_code=202,
        response_model=Answer,
        operation_id=f"deliver_{name}",
        responses={**describe_accepted(hook), **describe_responses(400, 401, 408, 409, 413, 415, 422, 503)},
        openapi_extra=describe_hook(name, hook),
    )(receive)
    scheme = describe_scheme(hook)[0]
    app.get(
        f"/hooks/{name}/deliveries/{{delivery}}",
        response_model=Answer,
        operation_id=f"find_{name}",
        summary=f"What became of a delivery to {name}",
        responses=describe_responses(401, 404, 422, 503),
        openapi_extra={
            "parameters": [] if hook.auth == "bearer" else describe_standard_headers(),
            "security": [{"bearer" if scheme == "bearer" else "standard_webhooks": []}],
        },
    )(find)


def _add_probes(app: FastAPI, receiver: Receiver) -> None:
    @app.get("/healthz", summary="Whether the receiver is alive")
    async def healthz() -> Health:
        return Health()

    @app.get("/readyz", summary="Whether deliveries become runs", responses=describe_responses(503))
    async def readyz() -> Health:
        """The journal can be written, and the Prefect server has every hook's deployment."""
        await receiver.check_ready()
        return Health()


def _describe_security(app: FastAPI, settings: ReceiverSettings) -> None:
    schemes = dict(describe_scheme(hook) for hook in settings.hooks.values())
    for hook in settings.hooks.values():
        if hook.auth == "hmac":  # asking for a delivery is signed so, whatever its hook's scheme
            schemes.setdefault(*describe_scheme_of_questions())
    make = app.openapi

    def describe() -> dict[str, Any]:
        document = make()
        document.setdefault("components", {})["securitySchemes"] = schemes
        return document

    app.openapi = describe  # type: ignore[method-assign]


def describe_scheme_of_questions() -> tuple[str, dict[str, Any]]:
    text = "Standard Webhooks, over an empty body; webhook-id is the delivery asked for."
    return "standard_webhooks", {"type": "apiKey", "in": "header", "name": "webhook-signature", "description": text}


# ---------------------------------------------------------------------------------------------- refusals


async def _refuse(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    # What is left of a body that is too large, or one too many, is not read: the connection can't be used again.
    headers = {"Connection": "close"} if error.status in (408, 413, 503) else {}
    if error.status == 503:
        headers["Retry-After"] = "5"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(Refusal(error=error.reason).model_dump(), error.status, headers=headers)


async def _refuse_route(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    reason = str(error.detail)
    if error.status_code == 404:
        reason = "No such hook or page. Hooks are POST /hooks/NAME, with the names of the receiver's configuration."
    elif error.status_code == 405:
        reason = "Not with this method. Deliveries are POST /hooks/NAME."
    return JSONResponse(Refusal(error=reason).model_dump(), error.status_code, headers=error.headers)


async def _refuse_for_disk(request: Request, error: Exception) -> JSONResponse:
    logger.error("webhook_journal unwritable reason=%r", str(error))
    return await _refuse(request, Refused(503, f"The journal can't be written: {error}. Send it again later."))
