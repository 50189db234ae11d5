"""The errors that a user can cause and mend.

    FsdfmError
    |-- ConfigError       a setting, or a combination of settings, that cannot work
    |-- DataError         an input that is missing, empty, not text or too short; an output that
    |                     cannot be written
    |-- CheckpointError   a model, run or checkpoint that is missing, corrupt, truncated or foreign
    |-- TrainingError     training that cannot go on (the loss is not finite)
    |-- WorkerError       work of several processes that cannot go on (another one ended)
    `-- BenchError        a measurement that cannot go on (a side's process died)

Every message is one line that says what is wrong and what to do, and calls options by the names of
their fields. Only the command line turns these into flags and exit codes; anything else that
escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class FsdfmError(Exception):
    """Base of every error that is the user's to mend.

    Args:
        message: one line.
        fields: names of options, as the message calls them.
    """

    def __init__(self, message: str, *fields: str) -> None:
        super().__init__(message)
        self.fields = fields


class ConfigError(FsdfmError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(FsdfmError):
    """An input that is missing, empty, not text or too short; an output that cannot be written."""


class CheckpointError(FsdfmError):
    """A model, run or checkpoint that is missing, corrupt, truncated or foreign."""


class TrainingError(FsdfmError):
    """Training that cannot go on."""


class WorkerError(FsdfmError):
    """Work of several processes that cannot go on."""


class BenchError(FsdfmError):
    """A measurement that cannot go on."""
