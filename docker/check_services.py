"""Health check of `prefect server services start`, which listens on no port.

Its docket worker signs in with Redis every few seconds under this container's host name, so exit code 0 says that the
process lives, runs its event loop and reaches Redis: without these nothing is scheduled and no automation fires.
"""

import asyncio
import socket
import sys
from datetime import UTC, datetime, timedelta

from docket import Docket
from prefect.settings import get_current_settings

# docket signs in every two seconds and drops a worker that missed five.
SILENT = timedelta(seconds=15)


async def is_alive() -> bool:
    settings = get_current_settings().server.docket
    async with Docket(name=settings.name, url=settings.url) as docket:
        workers = await docket.workers()
    since = datetime.now(UTC) - SILENT
    return any(worker.name.startswith(f"{socket.gethostname()}#") and worker.last_seen > since for worker in workers)


if __name__ == "__main__":
    sys.exit(0 if asyncio.run(is_alive()) else 1)
