"""200 signed deliveries a second for 30 s against the webhook receiver: is one lost or doubled, and how long does one wait?

    python tests/benchmarks/webhook_load.py [--rate 200] [--seconds 30] [--hooks 4] [--quick]

Prefect's server, the receiver and the senders are processes of their own. Open loop: each delivery has its time, whatever
became of those before it, and its latency counts from that time. Each names a document that no other names, and one in fifty
is sent twice. Afterwards every document must be in one flow run's parameters and in no other: exit 1 where it is not.
Compared with a run a delivery: arun_deployment from as many senders as find work, for a few seconds, on the same server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a script's own folder is there instead

import aiohttp  # noqa: E402

from deployments.receiver.signatures import sign_standard  # noqa: E402
from tests.deployments.receiver.processes import SECRET, PrefectServer, ReceiverProcess, to_toml, wait_until  # noqa: E402

SENT_TWICE = 50  # one in so many
BASELINE_SENDERS = 8
CONNECTIONS = 100


@dataclass
class Sent:
    """Seconds from a delivery's time to its answer, and the answers by status; None: no answer."""

    waits_s: list[float] = field(default_factory=list)
    statuses: Counter[int | None] = field(default_factory=Counter)
    with_run: int = 0
    late_s: list[float] = field(default_factory=list)  # that the sender itself was behind


async def send_all(url: str, hooks: Sequence[str], rate: float, count: int) -> Sent:
    sent = Sent()
    # httpx took 5 ms of a core a request here, which would have measured the sender: aiohttp takes a tenth.
    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    patience = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(connector=connector, timeout=patience) as client, asyncio.TaskGroup() as group:
        start = time.perf_counter() + 0.5
        for number in range(count):
            at = start + number / rate
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            for _ in range(2 if number % SENT_TWICE == 0 else 1):
                group.create_task(send(client, url, hooks[number % len(hooks)], number, at, sent))
    return sent


async def send(client: aiohttp.ClientSession, url: str, hook: str, number: int, at: float, sent: Sent) -> None:
    sent.late_s.append(time.perf_counter() - at)
    body = json.dumps({"changed": [f"load/{number:06d}.md"]}).encode()
    delivery, now = f"load-{number}", int(time.time())
    headers = {
        "content-type": "application/json",
        "webhook-id": delivery,
        "webhook-timestamp": str(now),
        "webhook-signature": sign_standard(SECRET.encode(), delivery, now, body),
    }
    try:
        async with client.post(f"{url}/hooks/{hook}", data=body, headers=headers) as answer:
            text = await answer.read()
    except (aiohttp.ClientError, TimeoutError):
        sent.statuses[None] += 1
        return
    sent.waits_s.append(time.perf_counter() - at)
    sent.statuses[answer.status] += 1
    sent.with_run += answer.status == 202 and json.loads(text)["run"] is not None


def count_documents(server: PrefectServer, hooks: Sequence[str]) -> tuple[Counter[str], int, int]:
    """How many runs name each document, how many runs there are, and how many of them are over the whole source."""
    found: Counter[str] = Counter()
    runs = [run for hook in hooks for run in server.runs(hook)]
    for run in runs:
        found.update(run["parameters"]["changed"] or ())
    return found, len(runs), sum(run["parameters"]["changed"] is None for run in runs)


async def run_a_delivery(server: PrefectServer, deployment: str, seconds: float) -> list[float]:
    """The same without a receiver: each sender creates a run, waits for it, and creates the next one; seconds a run."""
    from prefect.deployments import arun_deployment

    waits: list[float] = []
    end = time.perf_counter() + seconds

    async def keep_on(sender: int) -> None:
        while time.perf_counter() < end:
            began = time.perf_counter()
            key = f"baseline:{sender}:{len(waits)}:{began}"
            await arun_deployment(
                deployment, parameters={"changed": [key]}, timeout=0, as_subflow=False, idempotency_key=key
            )
            waits.append(time.perf_counter() - began)

    await asyncio.gather(*(keep_on(sender) for sender in range(BASELINE_SENDERS)))
    return waits


def at_share(values: Sequence[float], share: float) -> float:
    """In milliseconds: what this share of the values is not above."""
    ordered = sorted(values)
    return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def main(options: argparse.Namespace) -> int:
    rate, seconds, baseline_s = (50.0, 2.0, 1.0) if options.quick else (options.rate, options.seconds, 5.0)
    count = int(rate * seconds)
    hooks = [f"load-{place}" for place in range(options.hooks)]
    with tempfile.TemporaryDirectory() as folder:
        server = PrefectServer(Path(folder))
        receiver = None
        try:
            server.start()
            deployment = server.deploy("load")
            config = Path(folder) / "webhooks.toml"
            knobs = {"journal": f"{folder}/journal.sqlite", "quiet_s": 2 if options.quick else 10, "max_window_s": 10}
            hook = {"kind": "generic", "deployment": deployment, "secret": "SECRET"}
            config.write_text(to_toml(knobs, dict.fromkeys(hooks, hook)))
            receiver = ReceiverProcess(config, server.url, {"PREFECT_LOGGING_LEVEL": "WARNING"})
            sent = asyncio.run(send_all(receiver.url, hooks, rate, count))
            wait_until(lambda: all(run["state"]["name"] != "Collecting" for h in hooks for run in server.runs(h)), 120)
            receiver.stop()
            found, runs, whole = count_documents(server, hooks)
            os.environ["PREFECT_API_URL"] = server.url
            baseline = asyncio.run(run_a_delivery(server, deployment, baseline_s))
        finally:
            if receiver is not None and receiver.process.poll() is None:
                receiver.process.kill()
            server.stop()
    names = {f"load/{number:06d}.md" for number in range(count)}
    lost, doubled = len(names - set(found)), sum(times > 1 for times in found.values())
    repeated = sum(sent.statuses.values()) - count
    p50, p99 = at_share(sent.waits_s, 0.5), at_share(sent.waits_s, 0.99)
    base_rate = len(baseline) / baseline_s
    base_p50, base_p99 = at_share(baseline, 0.5), at_share(baseline, 0.99)
    if options.quick:
        print("A smoke test: the figures mean nothing.")
    print(f"sent {count} deliveries at {rate:g}/s over {options.hooks} hooks, {repeated} of them twice")
    print(f"accepted {sent.statuses[202]} of {count + repeated}; others {dict(sent.statuses - Counter({202: 10**9}))}")
    print(f"answered with the run's id {sent.with_run}; runs {runs}, over the whole source {whole}")
    print(f"lost {lost}, doubled {doubled}")
    print(f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {at_share(sent.waits_s, 1):.1f} ms")
    print(
        f"of it the sender itself was late: p50 {at_share(sent.late_s, 0.5):.1f} ms, p99 {at_share(sent.late_s, 0.99):.1f} ms"
    )
    print(
        f"a run a delivery, {BASELINE_SENDERS} senders at their own rate: {base_rate:.1f}/s, "
        f"p50 {base_p50:.1f} ms, p99 {base_p99:.1f} ms"
    )
    print(f"ratio: rate {rate / base_rate:.1f}, p50 {base_p50 / p50:.1f}, p99 {base_p99 / p99:.1f}")
    return int(bool(lost or doubled or whole or sent.statuses[202] != count + repeated))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=200.0, help="deliveries a second")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--hooks", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="2 s at 50/s, for a test")
    sys.exit(main(parser.parse_args()))
