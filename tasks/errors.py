"""Every error Ballast raises on purpose. Each message says what happened, the actual value, the limit and the way out.

BallastError
├── ConfigError          a knob, a flag or an environment variable that can't be used
├── SourceError          the source as a whole can't be listed (a single bad document is a Rejection, not an error)
├── ModelError           the embedding model can't be found, loaded or described
│   └── TokenLimitError  prompt and metadata leave no room for text within the model's token limit
├── DeviceError          the device asked for is not there, or a device process died too often
├── StoreError           Qdrant
│   ├── StoreMismatch    another dimension, fingerprint or owner: refused before any device time is spent
│   ├── StoreMissing     no collection of that name, or no embedded Qdrant at all
│   ├── StoreLocked      another process holds the embedded Qdrant folder, or ingests into this collection
│   ├── StoreUnavailable transient: reset, timeout, 429, 5xx; worth a retry
│   └── StoreRejected    permanent: the request itself is refused
├── SpoolError           a spool file is missing, torn or not what it says
├── ApiUnavailable       the Prefect API that should record the run does not start or does not answer
├── RunStopped           the run was told to stop (Ctrl-C, a cancelled flow run); the next one goes on from there
└── BooksDontClose       documents or nodes unaccounted for at the end of a run
"""


class BallastError(Exception):
    """Base of the tree: `except BallastError` catches what Ballast refuses, and no bug."""


class ConfigError(BallastError):
    pass


class SourceError(BallastError):
    pass


class ModelError(BallastError):
    pass


class TokenLimitError(ModelError):
    pass


class DeviceError(BallastError):
    pass


class StoreError(BallastError):
    pass


class StoreMismatch(StoreError):  # noqa: N818  the tree reads as states of the store
    pass


class StoreMissing(StoreError):  # noqa: N818
    pass


class StoreLocked(StoreError):  # noqa: N818
    pass


class StoreUnavailable(StoreError):  # noqa: N818
    """`retry_after_s`: how long the server asked to be left alone; None where it did not say."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoreRejected(StoreError):  # noqa: N818
    pass


class SpoolError(BallastError):
    pass


class ApiUnavailable(BallastError):  # noqa: N818
    pass


class RunStopped(BallastError):  # noqa: N818
    pass


class BooksDontClose(BallastError):  # noqa: N818
    pass
