"""What devices are called: kinds, which `--device` takes, and ids, which tables have. No torch."""

from __future__ import annotations

import re
from typing import Any

GPUS = ("cuda", "a100")
MACS = ("mac-npu", "mac-cpu")
PHONES = ("iphone-npu", "iphone-cpu")  # timed by a program on the device
HERE = ("cpu", *GPUS, *MACS)  # timed from this process
KINDS = (*HERE, *PHONES)


def suffix(threads: int, precision: str, batch: int) -> str:
    """Return what a CPU's device id says of settings that are not usual."""
    return (
        (f"-{threads}t" if threads != 1 else "")
        + (f"-{precision}" if precision != "fp32" else "")
        + (f"-b{batch}" if batch != 1 else "")
    )


def settings_in(device: str) -> tuple[str, dict[str, Any]]:
    """Return an id without what its end says of settings (`-2t`, `-int8`, `-b8`), and those: None where it says nothing."""
    end = re.search(r"(?:-(\d+)t)?(?:-(int8|fp32|fp16|bf16))?(?:-b(\d+))?$", device)
    assert end is not None  # everything in it is optional
    threads, precision, batch = end.groups()
    settings = {"threads": threads and int(threads), "precision": precision, "batch": batch and int(batch)}
    return device[: end.start()], settings
