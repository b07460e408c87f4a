"""Typed errors. Each carries the numbers of what happened and says what to do.

The C++ side raises these same classes (``csrc/bindings/exceptions.cpp`` looks them up here by name), so
there is one hierarchy. Attributes that do not apply to an error are ``None``.
"""

from __future__ import annotations


class SidpError(Exception):
    """Base of every error that this package raises.

    Attributes: ``rank`` (who reports), ``peer`` (whom it concerns), ``layer`` (pool index), ``num_bytes``,
    ``waited_ms``, ``expected`` and ``seen`` (flag values or counts).
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        peer: int | None = None,
        layer: int | None = None,
        num_bytes: int | None = None,
        waited_ms: int | None = None,
        expected: int | None = None,
        seen: int | None = None,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.peer = peer
        self.layer = layer
        self.num_bytes = num_bytes
        self.waited_ms = waited_ms
        self.expected = expected
        self.seen = seen


class ConfigError(SidpError, ValueError):
    """A setting, environment variable or argument is outside its range."""


class UsageError(SidpError, RuntimeError):
    """A call that the state of the object does not allow (step nesting, wrong order, wrong mode)."""


class ClosedError(UsageError):
    """Use of a group, pool or runtime after ``close()``."""


class UnknownNameError(SidpError, KeyError):
    """A layer, tensor or op that was never declared."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0]) if self.args else ""


class ShapeError(SidpError, ValueError):
    """A tensor's shape, dtype or row count does not fit what was declared."""


class ManifestMismatchError(SidpError, ValueError):
    """Ranks disagree about names, shapes, dtypes, strides, placement or versions."""


class CheckpointError(SidpError, ValueError):
    """A model file is missing, truncated, or says something that is not true of its bytes."""


class CapacityError(SidpError, MemoryError):
    """Something does not fit; ``num_bytes`` is what was asked for."""


class DeadlineError(SidpError, TimeoutError):
    """A wait outlived its deadline; ``waited_ms`` says how long it was."""


class PeerDeadError(SidpError, ConnectionError):
    """A rank of the group died."""


class DuplicateRankError(SidpError, ValueError):
    """Two processes claim the same rank of one group."""


class UnsupportedError(SidpError, NotImplementedError):
    """A backend or model lacks a capability; nothing was silently replaced."""


class RemoteOpError(SidpError, RuntimeError):
    """The owner's op failed; the message carries the owner's words."""


class DeviceError(SidpError, RuntimeError):
    """A call of the GPU's driver failed; the message carries the driver's words."""


class SlowCopyWarning(UserWarning):
    """A peer's copy engine could not be had, so its layers are read by this GPU's: ``Runtime``, ``owners_engines``."""


class UnhelpfulWarning(UserWarning):
    """A configuration that is predicted not to pay; ``warnings.simplefilter("error", UnhelpfulWarning)`` refuses it."""


class DoubtfulProfileWarning(UserWarning):
    """A rate was measured far below the one that this GPU is known for, as on a busy GPU. It is used, and not kept."""
