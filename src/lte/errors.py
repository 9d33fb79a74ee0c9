"""Errors a user can cause and mend. The command line prints them as one line and exits with code 2."""

from __future__ import annotations


class LTEError(ValueError):
    """Something the caller gave cannot be used; the message names the thing, the value and the way out."""


class ConfigError(LTEError):
    """A setting is unknown, out of range or contradicts another one."""


class UnsupportedModelError(LTEError):
    """The model's family, or its activation function, is not one this package knows."""


class CheckpointError(LTEError):
    """A saved model is missing, truncated, edited, of another version, or not sparse."""


class DataError(LTEError):
    """A data file is missing, empty, or lacks the column that was asked for."""


class NonFiniteLossError(LTEError):
    """Training produced a NaN or an infinity and was stopped."""


class CalibrationError(LTEError):
    """No thresholds give the sparsity that was asked for."""


class BackendError(LTEError):
    """A kernel backend was asked for that cannot run here, or not with these tensors."""


LAST_SEED = 2**32 - 1
"""The largest that every library's generators take."""


def check_seed(seed: int) -> None:
    """ConfigError where a generator would not take it."""
    if not 0 <= seed <= LAST_SEED:
        raise ConfigError(f"seed={seed} must be from 0 to {LAST_SEED}")
