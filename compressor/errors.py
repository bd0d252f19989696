"""What can go wrong on the host, beyond the errors it shares with the device.

    EdgewardenError
    |- ConfigError
    |  |- RecipeError      the recipe or the task module it names cannot be used; carries file and line
    |  `- MissingExtra     a library is not installed that only the host side needs
    |- DataError           the data a task needs is missing or is not what the task was written for
    |- ReferenceRefused    the rows given cannot carry a drift reference
    |- SurgeryRefused      a view cannot be added to this model
    |- StageFailed         a step of the pipeline could not finish
    `- GateFailed          nothing that was built may ship; carries gate, measured and limit

Exit codes of the command line: 2 recipe or libraries, 9 data, 10 stage, 11 gate; the device's codes keep theirs.
"""

from __future__ import annotations

from pathlib import Path

from agent.contract.errors import ConfigError, EdgewardenError


class RecipeError(ConfigError):
    """`line` counts from 1; 0 when no single line is to blame."""

    code = "recipe"

    def __init__(self, message: str, *, path: Path | None = None, line: int = 0, hint: str = "") -> None:
        place = "" if path is None else f"{path}:{line}: " if line else f"{path}: "
        super().__init__(place + message, hint=hint)
        self.path = path
        self.line = line


# What `pip install edgewarden[compressor]` brings beyond a plain installation, by the names they are imported as.
EXTRA = ("jinja2", "matplotlib", "onnx", "onnxscript", "rich", "sqlalchemy", "starlette", "torch", "uvicorn")


class MissingExtra(ConfigError):
    code = "missing_extra"

    @staticmethod
    def of(error: ImportError) -> MissingExtra | None:
        """Ours for a failed import, when the missing library belongs to the extra."""
        library = (error.name or "").partition(".")[0]
        if not isinstance(error, ModuleNotFoundError) or library not in EXTRA:
            return None
        return MissingExtra(
            f"this command needs {library} of the extra [compressor], which is not installed",
            hint="Run pip install 'edgewarden[compressor]', or pip install '.[compressor]' in a clone.",
        )


class DataError(EdgewardenError):
    code = "data"
    exit_code = 9


class ReferenceRefused(EdgewardenError):
    code = "reference_refused"


class SurgeryRefused(EdgewardenError):
    code = "surgery_refused"
    exit_code = 4


class StageFailed(EdgewardenError):
    """`stage` and `subject` say what was being done to what."""

    code = "stage_failed"
    exit_code = 10

    def __init__(self, stage: str, subject: str, reason: str, *, hint: str = "") -> None:
        super().__init__(f"stage '{stage}' failed on '{subject}': {reason}", hint=hint)
        self.stage = stage
        self.subject = subject
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        # it travels from a training process to the pipeline
        return (type(self), (self.stage, self.subject, self.reason), {"hint": self.hint})


class GateFailed(EdgewardenError):
    """`measured` and `limit` are in the gate's own unit."""

    code = "gate_failed"
    exit_code = 11

    def __init__(self, gate: str, measured: float, limit: float, *, subject: str, hint: str = "") -> None:
        super().__init__(f"gate '{gate}' refused {subject}: measured {measured:g}, limit {limit:g}", hint=hint)
        self.gate = gate
        self.measured = measured
        self.limit = limit
        self.subject = subject
