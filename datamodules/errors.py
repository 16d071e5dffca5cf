"""The two ways in which data fails: it cannot be had, or it is not what its format promises."""

from __future__ import annotations


class DataSourceError(RuntimeError):
    """Bytes could not be had: no network, no file, a wrong checksum, a damaged archive."""


class DataFormatError(ValueError):
    """A file was read and is not in its format; the message names file, line, fault and remedy."""
