"""Teachers of other kinds: files of torch.export, and timm's. What a file may not do."""

import pickle
import zipfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas import from_timm
from nas.data import IMAGENET_MEAN, IMAGENET_STD
from nas.steps import mixed_precision
from nas.teacher import load_teacher
from supernet.arch import ArchConfig, Stage
from supernet.errors import InputError
from supernet.model import build_model
from supernet.specs import MB4D

ARCH = ArchConfig("tiny", 16, 10, (Stage(8, 2, (MB4D(8),)), Stage(8, 2, (MB4D(8),))))
DIGITS = "0123456789"  # ten names


def exported(path: Path, *, dynamic: bool = True) -> nn.Module:
    """Write a network as torch.export does; return it."""
    torch.manual_seed(0)
    model = build_model(ARCH).eval()
    batch = torch.export.Dim.DYNAMIC if dynamic else None
    program = torch.export.export(model, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return model


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt2"
    return path, exported(path)


def test_an_exported_network_teaches_at_the_size_it_was_exported_for(program: tuple[Path, nn.Module]) -> None:
    path, model = program
    teacher = load_teacher(path, 16, DIGITS)
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(teacher.network(x), model(x))
        larger = load_teacher(path, 32, DIGITS).network(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert larger.shape == (5, 10)
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert teacher.digest.startswith("sha256 ")
    with pytest.raises(InputError, match="knows 10 classes, but the data have 3"):
        load_teacher(path, 16, "abc")


def test_files_that_are_no_such_network_are_refused_in_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    exported(tmp_path / "fixed.pt2", dynamic=False)
    (tmp_path / "broken.pt2").write_bytes(b"PK nothing")
    for name, said in (
        ("fixed.pt2", r"its images are \(2, 3, 16, 16\)\): give a file of torch.export.save that takes .* a dynamic N"),
        ("broken.pt2", "cannot be used"),
        ("absent.pt2", "No such file"),
    ):
        with pytest.raises(InputError, match=said):
            load_teacher(tmp_path / name, 16, DIGITS)
    assert capfd.readouterr().err == "", "torch.export's own log is kept back"


def test_an_exported_network_with_views_teaches_a_training_whose_images_are_channels_last(tmp_path: Path) -> None:
    """Its views are of the layout that it was traced in."""

    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4 * 14 * 14, 10)

        def forward(self, x: Tensor) -> Tensor:
            maps = self.map(x)
            return self.last(maps.view(maps.size(0), -1))

    model, x = Viewing().eval(), torch.randn(5, 3, 16, 16)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, tmp_path / "views.pt2")
    teacher = load_teacher(tmp_path / "views.pt2", 16, DIGITS).network.to(torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(teacher(x.contiguous(memory_format=torch.channels_last)), model(x))


def test_an_exported_network_teaches_in_fp32_where_its_student_learns_in_bf16(tmp_path: Path) -> None:
    """torch.export writes down the precision of whatever is converted."""

    class Converting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.map(x).float().mean((2, 3)))

    model, x = Converting().eval(), torch.randn(5, 3, 16, 16)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, tmp_path / "converting.pt2")
    teacher = load_teacher(tmp_path / "converting.pt2", 16, DIGITS)
    with torch.no_grad(), mixed_precision(x.device, "bf16"):
        taught = teacher.network(x)
    with torch.no_grad():
        torch.testing.assert_close(taught, model(x))


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.path, "run"))


def test_what_is_pickled_in_an_exported_network_cannot_run_code(program: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """torch.export.load unpickles anything where reading tensors alone fails."""
    path, _ = program
    changed, mark = tmp_path / "changed.pt2", tmp_path / "mark"
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(changed, "w") as after:
        names = [name for name in before.namelist() if "sample_inputs" in name]
        assert names, "the part that is pickled"
        for name in before.namelist():
            after.writestr(name, pickle.dumps(Payload(mark)) if name in names else before.read(name))
    with pytest.raises(InputError, match="cannot be used"):
        load_teacher(changed, 16, DIGITS)
    assert not mark.exists()
    with suppress(Exception):
        torch.export.load(changed)
    assert mark.exists(), "by itself, PyTorch runs it"


class Brightness(nn.Module):
    """Logits that are the mean of the image as it is given: to see how it was normalised, and its side."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack((x.mean((1, 2, 3)), torch.full((len(x),), float(x.shape[2]))), 1)


def test_timms_teacher_sees_its_own_size_and_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, pretrained: bool) -> nn.Module:
        if name != "known":
            raise RuntimeError(f"Unknown model ({name})")
        assert pretrained
        model = Brightness()
        model.num_classes = 2
        model.pretrained_cfg = {"input_size": (3, 24, 24), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        return model

    monkeypatch.setattr(from_timm, "import_timm", lambda: (SimpleNamespace(create_model=create), ""))
    teacher = load_teacher("timm:known", 16, "ab")
    mean, std = (torch.tensor(figures).view(3, 1, 1) for figures in (IMAGENET_MEAN, IMAGENET_STD))
    white = (torch.ones(2, 3, 16, 16) - mean) / std
    torch.testing.assert_close(teacher.network(white), torch.tensor([[1.0, 24.0]] * 2))  # white less 0.5, by 0.5
    with pytest.raises(InputError, match=r"Unknown model \(other\)"):
        load_teacher("timm:other", 16, "ab")
    with pytest.raises(InputError, match="knows 2 classes"):
        load_teacher("timm:known", 16, "abcde")
    monkeypatch.setattr(from_timm, "import_timm", lambda: (None, "No module named 'timm'"))
    with pytest.raises(InputError, match="pip install timm"):
        load_teacher("timm:known", 16, "ab")
