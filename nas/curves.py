"""Training curves as TensorBoard event files: in `<folder>/tensorboard`, where the package tensorboard is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nas.parallel import is_first

Points = Mapping[str, Iterable[tuple[int, float]]]
"""By a curve's name: after how many steps of training, and the value."""


@contextmanager
def curves(folder: Path, steps_done: int) -> Iterator[Callable[[Points], None]]:
    """Yield a function that adds points to the curves of the training in `folder`; without tensorboard, it does nothing, and
    of several processes the first one alone does.

    The points are in the file when it returns: call it before the checkpoint that holds the same steps. `steps_done` is where
    this training goes on; what a killed one wrote of later steps no longer counts then, so that no step is there twice.
    """
    if not is_first():
        yield lambda points: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield lambda points: None
        return
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done + 1)

    def add(points: Points) -> None:
        for name, curve in points.items():
            for step, value in curve:
                writer.add_scalar(name, value, step)
        writer.flush()

    try:
        yield add
    finally:
        writer.close()
