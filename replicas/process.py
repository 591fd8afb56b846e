"""What a process does once it has loaded everything that it will keep: make its pauses short."""

from __future__ import annotations

import gc
import sys

# Python lets a thread compute for 5 ms while another one waits: a poll of a database would show in a first token.
_SWITCH_S = 0.0005


def settle_down() -> None:
    """Called once, by the process of a gateway or a replica.

    What was loaded is taken out of the garbage collector's sight: looking through it takes 10 to 20 ms, which a request
    would wait for, and finds nothing.
    """
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()
