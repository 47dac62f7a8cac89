"""A small search on made-up images, for tests of many processes: `python search_together.py FOLDER what`."""

import os
import signal
import sys
from pathlib import Path

from nas.command import run_command
from nas.distributed import shared, together
from supernet.errors import InputError


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def search(folder: Path) -> None:
    """Measure drops and slim, once plainly, and measure drops with a step of recovery before each evaluation."""
    import torch
    from small_spaces import stage_space

    from nas.data import ImageData, Images
    from nas.evaluation import Evaluator
    from nas.kept import Remembered, write_csv
    from nas.recovery import Recovered
    from nas.scores import measure_drops
    from nas.settings import SupernetSettings
    from nas.slimming import slim
    from supernet.arch import ArchConfig
    from supernet.metapath import Supernet
    from supernet.model import count
    from supernet.space import SearchSpace

    stages = (
        stage_space((8, 16), 1, 2, "mb4d", "identity"),
        stage_space((8, 16, 24), 2, 3, "mb4d", "mb3d", "identity"),
    )
    space = SearchSpace("small", 8, 3, stages)
    generator = torch.Generator().manual_seed(0)

    def pictures(number: int) -> Images:
        pixels = torch.randint(0, 256, (number, 3, 8, 8), generator=generator, dtype=torch.uint8)
        return Images(pixels, torch.arange(number), torch.randint(0, 3, (number,), generator=generator))

    class Macs:
        def predict_ms(self, arch: ArchConfig) -> float:
            return count(arch).macs / 1e6

    torch.manual_seed(0)
    net = Supernet(space)
    for parameter in net.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    data = ImageData(pictures(24), pictures(24), pictures(3), ("a", "b", "c"), 8, False, False, (), "", "")
    evaluator = Evaluator(net, data, 16)
    evaluate = Remembered(shared(evaluator), folder / "evaluations.csv")
    evaluate(space.smallest)
    drops = measure_drops(space, space.largest, evaluate)
    drops.save(folder / "drops.csv")
    table = Macs()
    found = slim(space, drops.importance(), evaluate, table, 0.4 * table.predict_ms(space.largest))
    write_csv(folder / "trajectory.csv", found.records(), found.columns)
    found.arch.save(folder / "searched.yaml")
    recovered = Recovered(evaluator, data, SupernetSettings(recovery_steps=1, batch_size=8), 0)
    measure_drops(space, space.largest, shared(recovered)).save(folder / "drops-recovered.csv")


def note_evaluations(folder: Path, dies: bool = False) -> None:
    """Write down which networks each process evaluates; the second one dies of its first, if so asked."""
    from nas.evaluation import Evaluator
    from nas.kept import described

    evaluate = Evaluator._evaluate

    def noted(self, arch, *rest):  # type: ignore[no-untyped-def]
        with (folder / f"evaluated-{rank()}").open("a") as file:
            file.write(described(arch) + "\n")
        if dies and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluate(self, arch, *rest)

    Evaluator._evaluate = noted  # type: ignore[method-assign]


def refuse() -> None:
    raise InputError("this cannot be used: give something else")


def main(folder: Path, what: str) -> None:
    if what == "refuses":
        together(lambda: run_command("search", refuse))
        return
    note_evaluations(folder, what == "dies")
    together(lambda: run_command("search", lambda: search(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
