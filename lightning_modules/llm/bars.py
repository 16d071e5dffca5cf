"""The bar of what takes longer than two seconds outside of a Trainer."""

from __future__ import annotations

import sys
from typing import Any


def bar_of(total: int, what: str) -> Any:
    """Of ``total`` steps; a log file needs few lines of it."""
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds
    return tqdm(total=total, desc=what, unit="", delay=2, mininterval=interval)
