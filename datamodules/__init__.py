"""Users, items, histories, splits and candidates of every data set; no tokens, no models."""

import os

# Polars hands freed memory back to the system after half a second and asks for it anew with the next block
# of a file: a fifth of the time of parsing. What is set already comes last and wins.
_KEEP = "dirty_decay_ms:20000,muzzy_decay_ms:20000"
_given = os.environ.get("_RJEM_MALLOC_CONF", "")
if _KEEP not in _given:
    os.environ["_RJEM_MALLOC_CONF"] = f"{_KEEP},{_given}".rstrip(",")
