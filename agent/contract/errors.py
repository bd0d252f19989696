"""Every error a caller can meet, in one tree. Plain Python: the worker imports it too.

    EdgewardenError
    |- ConfigError              a setting is missing, unknown or out of range
    |- ContractError            a document or message does not keep the contract
    |  |- UnsupportedVersion
    |  `- MalformedMessage
    |- ArtifactError            an artifact cannot be used
    |  |- Untrusted
    |  |- Incompatible          for another device class, runtime or input signature
    |  |- Corrupt               a digest, size or format is wrong
    |  |- TooLarge
    |  `- Unavailable
    |- ServingError             one request cannot be answered
    |  |- InvalidRequest
    |  |- UnknownModel
    |  |- Overloaded
    |  |- DeadlineExceeded
    |  |- EngineFailed
    |  `- Disconnected          the connection to the server broke or cannot be opened
    |- LinkError                the broker refused or cannot be reached
    |- StorageError
    |  |- DiskFull
    |  |- StateUnreadable
    |  `- StateLocked           another agent holds this state folder
    |- SensorError
    `- NotRunning               no agent answers on the admin socket

A message says what was tried, on what, what happened; `hint` says what to do. `code` is stable and travels
over MQTT and in reports; `retryable` says whether the same call may succeed later without a change.
"""

from __future__ import annotations

from typing import ClassVar


class EdgewardenError(Exception):
    """Base of all our errors."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        if hint:
            self.add_note(hint)  # a program's traceback says what to do as well

    def sentence(self) -> str:
        """One line for a person: what happened, then what to do."""
        text = str(self).rstrip(".")
        return f"{text}. {self.hint}" if self.hint else f"{text}."


class ConfigError(EdgewardenError):
    code = "config"
    exit_code = 2


class ContractError(EdgewardenError):
    code = "contract"
    exit_code = 3


class UnsupportedVersion(ContractError):
    code = "unsupported_version"


class MalformedMessage(ContractError):
    code = "malformed"


class ArtifactError(EdgewardenError):
    code = "artifact"
    exit_code = 4


class Untrusted(ArtifactError):
    code = "untrusted"


class Incompatible(ArtifactError):
    code = "incompatible"


class Corrupt(ArtifactError):
    code = "corrupt"


class TooLarge(ArtifactError):
    code = "too_large"


class Unavailable(ArtifactError):
    code = "unavailable"
    retryable = True


class ServingError(EdgewardenError):
    """`status`: what the server said (HTTP), None when it said nothing; `retry_after_s`: when to ask again."""

    code = "serving"
    exit_code = 8

    def __init__(
        self, message: str, *, hint: str = "", status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.retry_after_s = retry_after_s


class InvalidRequest(ServingError):
    code = "invalid_request"


class UnknownModel(ServingError):
    code = "unknown_model"


class Overloaded(ServingError):
    code = "overloaded"
    retryable = True


class DeadlineExceeded(ServingError):
    code = "deadline_exceeded"
    retryable = True


class EngineFailed(ServingError):
    code = "engine_failed"


class Disconnected(ServingError):
    code = "disconnected"
    retryable = True


class LinkError(EdgewardenError):
    code = "link"
    retryable = True
    exit_code = 5


class StorageError(EdgewardenError):
    code = "storage"
    exit_code = 6


class DiskFull(StorageError):
    code = "disk_full"
    retryable = True


class StateUnreadable(StorageError):
    code = "state_unreadable"


class StateLocked(StorageError):
    code = "state_locked"
    exit_code = 7


class SensorError(EdgewardenError):
    code = "sensor"
    retryable = True


class NotRunning(EdgewardenError):
    code = "not_running"
    retryable = True
    exit_code = 9
