"""How TensorFlow gets the processor's memory."""

from __future__ import annotations

import os


def keep_memory() -> None:
    """Has TensorFlow keep the processor's memory that one step frees for the next; before it computes anything.

    The C library gives large blocks back to the system at once, and a third of a step goes by in page faults.
    """
    megabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "1")
    os.environ.setdefault("TF_CPU_BFC_MEM_LIMIT_IN_MB", str(megabytes))
