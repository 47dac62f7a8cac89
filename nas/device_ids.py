"""What devices are called: kinds, which `--device` takes, and ids, which tables have. No torch."""

from __future__ import annotations

import re
from typing import Any

GPUS = ("cuda", "a100")
MACS = ("mac-npu", "mac-cpu")
PHONES = ("iphone-npu", "iphone-cpu")  # timed by a program on the device
HERE = ("cpu", *GPUS, *MACS)  # timed from this process
KINDS = (*HERE, *PHONES)


def is_id(device: str) -> bool:
    """Whether this may be the id of a CPU or a Neural Engine, of whatever machine."""
    return re.fullmatch(r"[a-z0-9][a-z0-9.-]*-(cpu|npu)(-[a-z0-9.-]+)?", device) is not None


def is_gpu(device: str) -> bool:
    """Whether this may be the id of an NVIDIA GPU: `a100-sxm4-80gb`, `a100-mig-1g.5gb-b1`."""
    return re.fullmatch(r"[a-z0-9-]+-(\d+gb|mig-[a-z0-9.+]+)", settings_in(device)[0]) is not None


def is_phone(device: str) -> bool:
    """Whether this is an iPhone's id or kind."""
    return device.startswith("iphone")


def is_core_ml(device: str) -> bool:
    """Whether the device of this id is timed through Core ML: an iPhone, a Mac's Neural Engine, or its CPU under Core ML."""
    return is_phone(device) or settings_in(device)[0].endswith(("-npu", "-coreml-cpu"))


def takes_jobs(device: str) -> bool:
    """Whether models can be brought to the device of this id; a GPU and Core ML on a Mac are timed from a process there."""
    return is_phone(device) or (is_id(device) and not is_core_ml(device))


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
