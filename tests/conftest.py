"""One thread for torch, in the tests and in what they start: its operations here are so small that two threads wait for each
other at every one of them, and the tests already run on several cores (pytest-xdist)."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # before torch is imported
os.environ["METAPATH_NAS_CACHE"] = ""  # nothing of the tests' images is kept on disk

import torch  # noqa: E402

torch.set_num_threads(1)
