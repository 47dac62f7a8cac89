"""Drops of single changes predict what adds up exactly, and say how far the rest does."""

import csv
import itertools
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refusal
from small_spaces import stage_space

from nas.data import ImageData, Images
from nas.evaluation import Evaluator
from nas.kept import Remembered
from nas.recovery import Recovered
from nas.scores import (
    Change,
    Drops,
    additivity,
    changes_of,
    completed,
    measure_drops,
    measure_pairs,
    pairs_to_measure,
    single_changes,
)
from nas.settings import SupernetSettings
from nas.slimming import start_network
from nas.trajectory import Evaluation
from supernet.arch import ArchConfig
from supernet.metapath import Supernet
from supernet.space import SearchSpace, StageSpace
from supernet.specs import MB3D, MB4D, Identity
from supernet.units import UnitScores

ROOT = Path(__file__).parent.parent
TWO_OF_EACH = (MB4D(24), MB4D(24, act="relu"), MB3D(24), MB3D(24, act="relu"), Identity(24))
SPACE = SearchSpace(
    "three",
    16,
    10,
    (
        stage_space((8, 16), 2, 2, "mb4d", "identity"),
        stage_space((16, 24, 32), 1, 4, "mb4d", "mb3d", "identity"),
        StageSpace((16, 24), 1, 3, TWO_OF_EACH),
    ),
)
MAPS = SPACE.largest
EXACT = 1e-9


def bases() -> list[ArchConfig]:
    rng = random.Random(1)
    return [MAPS, SPACE.smallest, *(SPACE.sample(rng) for _ in range(6))]


class Truth:
    """A random loss: a term for each slot's kind and each stage's width, and, where asked, for each two of them in a stage."""

    def __init__(self, seed: int, pairs: float = 0.0) -> None:
        self.seed, self.pairs = seed, pairs
        self.asked: list[ArchConfig] = []

    def _term(self, *of: object) -> float:
        return random.Random(f"{self.seed} {of}").gauss(0, 1)

    def __call__(self, arch: ArchConfig) -> Evaluation:
        self.asked.append(arch)
        loss = 3.0
        for i, (stage, choices) in enumerate(zip(SPACE.fit(arch).stages, SPACE.stages, strict=True)):
            parts = [("width", stage.width), *((j, choices.kind_of(b)) for j, b in enumerate(stage.blocks))]
            loss += sum(self._term(i, part) for part in parts)
            loss += self.pairs * sum(self._term(i, *two) for two in itertools.combinations(parts, 2))
        return Evaluation(loss, 0.5 - loss / 100)


def members(number: int, seed: int = 7) -> list[ArchConfig]:
    rng = random.Random(seed)
    return [SPACE.smallest, SPACE.largest, *(SPACE.sample(rng) for _ in range(number))]


# -- Single changes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", bases())
def test_what_adds_up_is_predicted_exactly_for_every_network(base: ArchConfig) -> None:
    truth = Truth(0)
    drops = measure_drops(SPACE, base, truth)
    for arch in members(200):
        assert drops.sum_for(arch) == pytest.approx(truth(arch).loss, abs=EXACT)
        assert drops.evaluation_for(arch).accuracy == pytest.approx(truth(arch).accuracy, abs=EXACT)


@pytest.mark.parametrize("base", bases())
def test_every_option_is_measured_once_in_a_network_of_the_space_that_has_it(base: ArchConfig) -> None:
    truth = Truth(0)
    ticks: list[float] = []
    drops = measure_drops(SPACE, base, truth, ticks.append)
    # 1 + 2 + 1 other widths; 2 slots with 1 other candidate, 4 with 2, 3 with 4.
    assert len(drops.singles) == 4 + 2 * 1 + 4 * 2 + 3 * 4
    assert len(truth.asked) == len(drops.singles) + 1 == sum(ticks)
    assert all(arch in SPACE for arch in truth.asked)
    for change, drop in drops.singles.items():
        network = completed(SPACE, base, [change])
        assert network is not None and change in changes_of(SPACE, base, network)
        assert (drop.loss, drop.accuracy) == truth(network)


def test_a_token_block_is_measured_with_the_map_blocks_behind_it_turned_too() -> None:
    truth = Truth(3)
    drops = measure_drops(SPACE, MAPS, truth)
    chain = [Change(1, slot, "mb3d") for slot in range(4)]
    kinds: list[list[str]] = [["mb4d"] * 2, ["mb4d"] * 4, ["mb4d"] * 3]
    before = truth(MAPS).loss
    for slot in (3, 2, 1, 0):
        kinds[1][slot] = "mb3d"
        arch = SPACE.arch(MAPS.widths, kinds)
        assert completed(SPACE, MAPS, [chain[slot]]) == arch
        assert drops.singles[chain[slot]].drop_loss == pytest.approx(truth(arch).loss - before, abs=EXACT)
        before = truth(arch).loss
    # An empty slot stays empty, and with fixed map blocks behind it there is no such network.
    assert completed(SPACE, MAPS, [chain[1], Change(1, 2, "identity")]) == SPACE.arch(
        MAPS.widths, [["mb4d"] * 2, ["mb4d", "mb3d", "identity", "mb3d"], ["mb4d"] * 3]
    )
    tokens = SPACE.arch(MAPS.widths, [["mb4d"] * 2, ["mb3d"] * 4, ["mb4d"] * 3])
    assert completed(SPACE, tokens, [Change(1, 2, "mb4d")]) == SPACE.arch(
        MAPS.widths, [["mb4d"] * 2, ["mb4d"] * 3 + ["mb3d"], ["mb4d"] * 3]
    )
    mixed = SPACE.arch(MAPS.widths, [["mb4d"] * 2, ["mb4d", "mb4d", "mb3d", "mb3d"], ["mb4d"] * 3])
    assert completed(SPACE, mixed, [Change(1, 0, "mb3d"), Change(1, 3, "mb4d")]) is None


def test_a_kill_costs_nothing_that_was_evaluated(tmp_path: Path) -> None:
    truth = Truth(0)

    def killed(arch: ArchConfig) -> Evaluation:
        if len(truth.asked) == 9:
            raise KeyboardInterrupt
        return truth(arch)

    with pytest.raises(KeyboardInterrupt):
        measure_drops(SPACE, MAPS, Remembered(killed, tmp_path / "evaluations.csv"))
    again = Truth(0)
    drops = measure_drops(SPACE, MAPS, Remembered(again, tmp_path / "evaluations.csv"))
    assert len(again.asked) == len(drops.singles) + 1 - 9


def test_a_loss_that_is_no_number_is_refused() -> None:
    line = refusal(lambda: measure_drops(SPACE, MAPS, lambda arch: Evaluation(math.nan, 0.1)))
    assert "loss of nan" in line


# -- Importance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", bases()[:4])
def test_an_advantage_is_the_loss_with_identity_minus_that_with_the_kind(base: ArchConfig) -> None:
    truth = Truth(5)
    advantages = measure_drops(SPACE, base, truth).advantages()
    for (i, j), slot in zip(SPACE.slots, advantages, strict=True):
        assert list(slot) == [kind for kind in SPACE.stages[i].kinds if kind != "identity"]
        for kind, advantage in slot.items():
            expected = truth._term(i, (j, "identity")) - truth._term(i, (j, kind))
            assert advantage == pytest.approx(expected, abs=EXACT)


def test_importance_keeps_the_order_of_advantages_and_is_finite() -> None:
    drops = measure_drops(SPACE, MAPS, Truth(5))
    advantages, importance = drops.advantages(), drops.importance()
    for i in (0, 1, 2):  # slots of one stage have as many candidates
        pairs = [
            (a, log_odds[kind])
            for (stage, _), slot, log_odds in zip(SPACE.slots, advantages, importance, strict=True)
            if stage == i
            for kind, a in slot.items()
        ]
        assert [x for x, _ in sorted(pairs)] == sorted(x for x, _ in pairs)
        assert [y for _, y in sorted(pairs)] == sorted(y for _, y in pairs)
    best = start_network(SPACE, importance)
    assert SPACE.stages[0].kind_of(best.stages[0].blocks[0]) == "mb4d", "the largest network has no empty slots"
    # One slot that decides everything, and no difference at all.
    one = Change(0, 0, "identity")
    singles = {c: d._replace(drop_loss=1e9 if c == one else 1e-9) for c, d in drops.singles.items()}
    spread = [v for slot in replace(drops, singles=singles).importance() for v in slot.values()]
    assert math.isfinite(math.exp(max(spread)))
    flat = {c: d._replace(drop_loss=0.0) for c, d in drops.singles.items()}
    for slot in replace(drops, singles=flat).importance():
        # Log of the summed odds: 0, however many candidates there are.
        assert math.log(sum(map(math.exp, slot.values()))) == pytest.approx(0, abs=EXACT)


# -- Pairs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", bases())
def test_with_all_pairs_what_is_pairwise_within_stages_is_predicted_exactly(base: ArchConfig) -> None:
    truth = Truth(1, pairs=0.5)
    drops = measure_drops(SPACE, base, truth)
    with_pairs = measure_pairs(drops, truth)
    errors = [abs(drops.sum_for(arch) - truth(arch).loss) for arch in members(100)]
    assert max(errors) > 0.5, "single changes alone are far off"
    for arch in members(200):
        assert with_pairs.sum_for(arch) == pytest.approx(truth(arch).loss, abs=1e-6)


def test_pairs_of_what_adds_up_are_zero() -> None:
    truth = Truth(2)
    with_pairs = measure_pairs(measure_drops(SPACE, MAPS, truth), truth)
    assert with_pairs.pairs
    assert max(abs(drop.drop_loss) for drop in with_pairs.pairs.values()) < EXACT
    assert all(first.stage == second.stage for first, second in with_pairs.pairs)
    assert len(set(truth.asked)) == len(truth.asked), "a pair that is the network of a single change is none"


def test_a_count_of_pairs_takes_the_cheapest_in_the_same_order_each_time() -> None:
    truth = Truth(1, pairs=0.5)
    drops = measure_drops(SPACE, MAPS, truth)
    every, few = pairs_to_measure(drops), pairs_to_measure(drops, 12)
    assert len(few) == 12 and few == [pair for pair in every if pair in few] == pairs_to_measure(drops, 12)

    def cost(pair: tuple[Change, Change]) -> float:
        return sum(drops.singles[change].drop_loss for change in pair)

    assert max(map(cost, few)) <= min(cost(pair) for pair in every if pair not in few)
    asked = len(truth.asked)
    assert tuple(measure_pairs(drops, truth, 12).pairs) == tuple(few)
    assert len(truth.asked) - asked == 12


# -- The file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", bases()[:5])
def test_drops_come_back_from_their_file(base: ArchConfig, tmp_path: Path) -> None:
    truth = Truth(1, pairs=0.5)
    drops = measure_drops(SPACE, base, truth)
    drops.save(tmp_path / "drops.csv")
    assert Drops.load(tmp_path / "drops.csv", SPACE) == drops
    with_pairs = measure_pairs(drops, truth, 20)
    with_pairs.save(tmp_path / "drops.csv")
    assert Drops.load(tmp_path / "drops.csv", SPACE) == with_pairs
    drops.save(tmp_path / "drops.csv")
    assert Drops.load(tmp_path / "drops.csv", SPACE) == drops, "pairs of an earlier file are gone"


def test_the_file_can_be_read_by_people(tmp_path: Path) -> None:
    drops = measure_drops(SPACE, MAPS, Truth(0))
    drops.save(tmp_path / "drops.csv")
    base, width, *_, last = csv.DictReader((tmp_path / "drops.csv").read_text().splitlines())
    assert list(base) == ["stage", "slot", "option", "drop_loss", "drop_accuracy", "loss", "accuracy"]
    assert (base["stage"], base["option"], float(base["loss"])) == ("", "base", drops.evaluation.loss)
    assert (width["stage"], width["slot"], width["option"]) == ("1", "", "8")
    assert (last["stage"], last["slot"], last["option"]) == ("3", "3", "identity")
    assert float(width["drop_loss"]) == pytest.approx(float(width["loss"]) - drops.evaluation.loss, abs=EXACT)
    assert float(width["drop_accuracy"]) == pytest.approx(drops.evaluation.accuracy - float(width["accuracy"]), abs=EXACT)


def test_a_file_of_another_space_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "drops.csv"
    assert "cannot be read" in refusal(lambda: Drops.load(path, SPACE))
    measure_drops(SPACE, MAPS, Truth(0)).save(path)
    wider = replace(SPACE, stages=(replace(SPACE.stages[0], depth=3), *SPACE.stages[1:]))
    assert "not of the space three" in refusal(lambda: Drops.load(path, wider))
    narrower = replace(SPACE, stages=(replace(SPACE.stages[0], depth=1), *SPACE.stages[1:]))
    assert "not of the space three" in refusal(lambda: Drops.load(path, narrower))
    text = path.read_text()
    path.write_text(text + text.splitlines()[-1] + "\n")
    assert "has a change twice" in refusal(lambda: Drops.load(path, SPACE))
    path.write_text(text.replace("drop_loss", "loss_drop"))
    assert "must have the columns" in refusal(lambda: Drops.load(path, SPACE))


# -- Additivity --------------------------------------------------------------------------------------------------------


def test_what_adds_up_is_found_to_and_what_does_not_is_not() -> None:
    truth = Truth(0)
    drops = measure_drops(SPACE, MAPS, truth)
    found = additivity(SPACE, drops, truth, 50, seed=1)
    assert len(found.records) == 50 == len({record["network"] for record in found.records})
    assert all(isinstance(record["changes"], int) and record["changes"] >= 2 for record in found.records)
    assert (found.r_squared, found.tau, found.slope) == pytest.approx((1, 1, 1))

    def halved(arch: ArchConfig) -> Evaluation:
        """Where more than one thing changes, half of the drops is seen."""
        return Evaluation(drops.evaluation.loss + (drops.sum_for(arch) - drops.evaluation.loss) / 2)

    half = additivity(SPACE, drops, halved, 50, seed=1)
    assert (half.r_squared, half.tau, half.slope) == pytest.approx((1, 1, 0.5))
    chance = random.Random(0)
    noise = additivity(SPACE, drops, lambda arch: Evaluation(chance.random()), 50, seed=1)
    assert noise.r_squared < 0.2 and abs(noise.tau) < 0.25


def test_the_networks_are_decided_by_the_seed_and_pairs_help_where_there_are_any() -> None:
    truth = Truth(1, pairs=0.5)
    drops = measure_drops(SPACE, MAPS, truth)
    first = additivity(SPACE, drops, truth, 20, seed=2)
    assert first == additivity(SPACE, drops, truth, 20, seed=2)
    assert first.records != additivity(SPACE, drops, truth, 20, seed=3).records
    better = additivity(SPACE, measure_pairs(drops, truth), truth, 20, seed=2)
    assert better.r_squared > 0.999 > first.r_squared
    assert [r["network"] for r in better.records] == [r["network"] for r in first.records]


def test_a_space_with_few_networks_has_few() -> None:
    tiny = SearchSpace("tiny", 16, 10, (stage_space((8, 16), 1, 1, "mb4d", "identity"),))
    drops = measure_drops(tiny, tiny.largest, lambda arch: Evaluation(float(arch.widths[0])))
    (only,) = additivity(tiny, drops, lambda arch: Evaluation(float(arch.widths[0])), 50).records
    assert only["network"] == "8: identity"
    assert [change.option for change in single_changes(tiny, tiny.largest)] == [8, "identity"]


def test_the_noun_needs_no_torch() -> None:
    code = "import sys, nas.scores; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# -- Recovery ----------------------------------------------------------------------------------------------------------

PICTURES = SearchSpace(
    "pictures", 8, 3, (stage_space((8, 16), 1, 1, "mb4d", "identity"), stage_space((8, 16), 2, 2, "mb4d", "mb3d", "identity"))
)
RECOVERY = SupernetSettings(recovery_steps=20, batch_size=16, learning_rate=0.02, recalibration_images=32, accelerator="cpu")


@pytest.fixture(scope="module")
def striped() -> ImageData:
    """Three classes that are three colours, so that a few steps of training tell them apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (60,), generator=generator)
    pixels = torch.randint(0, 120, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(60), labels] += 100
    images = Images(pixels, torch.arange(60), labels)
    return ImageData(images, images, images, ("r", "g", "b"), 8, False, False, (), "", "")


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    torch.manual_seed(0)
    return Supernet(PICTURES).eval()


def test_recovery_trains_a_copy_and_the_same_network_has_the_same_result_in_any_order(
    supernet: Supernet, striped: ImageData
) -> None:
    plain = Evaluator(supernet, striped, 32)
    weights = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    networks = [PICTURES.largest, PICTURES.smallest, PICTURES.arch((16, 8), (("mb4d",), ("mb4d", "mb3d")))]
    recovered = Recovered(plain, striped, RECOVERY, seed=0)
    first = [recovered(arch) for arch in networks]
    torch.manual_seed(99)
    assert [recovered(arch) for arch in reversed(networks)] == first[::-1]
    assert Recovered(plain, striped, RECOVERY, seed=1)(networks[0]) != first[0]
    for name, tensor in supernet.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    for arch, after in zip(networks, first, strict=True):
        assert after.loss < 0.8 * plain(arch).loss, "twenty steps learn three colours"


def test_recovery_of_blocks_that_draw_has_the_same_result_again(striped: ImageData) -> None:
    space = SearchSpace("drawing", 8, 3, (stage_space((8, 16), 1, 2, "dropping", "identity"),))
    recovered = Recovered(Evaluator(Supernet(space), striped, 32), striped, replace(RECOVERY, recovery_steps=3), seed=0)
    first = recovered(space.largest)
    torch.manual_seed(99)
    assert recovered.evaluator(space.largest) == recovered.evaluator(space.largest)
    assert recovered(space.largest) == first


@pytest.mark.parametrize("steps", [1, 3])
def test_recovery_takes_as_many_steps_as_asked_for(
    supernet: Supernet, striped: ImageData, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    taken = 0
    step = torch.optim.AdamW.step

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal taken
        taken += 1
        return step(*args, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    Recovered(Evaluator(supernet, striped, 32), striped, replace(RECOVERY, recovery_steps=steps), seed=0)(PICTURES.largest)
    assert taken == steps


def test_a_recovered_narrow_network_has_the_channels_that_the_search_keeps(supernet: Supernet, striped: ImageData) -> None:
    widths = [stage.widths[-1] for stage in PICTURES.stages]
    last_first = UnitScores(tuple(torch.arange(width, dtype=torch.float64) for width in widths), {})
    still = replace(RECOVERY, recovery_steps=1, learning_rate=1e-12)
    first = Recovered(Evaluator(supernet, striped, 32), striped, still, 0)
    last = Recovered(Evaluator(supernet, striped, 32, kept=last_first), striped, still, 0)
    assert first(PICTURES.largest) == last(PICTURES.largest)
    assert first(PICTURES.smallest) != last(PICTURES.smallest)


def test_recovery_that_learns_nothing_changes_nothing(supernet: Supernet, striped: ImageData) -> None:
    plain = Evaluator(supernet, striped, 32)
    still = replace(RECOVERY, recovery_steps=1, learning_rate=1e-12)
    arch = PICTURES.largest
    assert Recovered(plain, striped, still, seed=0)(arch).loss == pytest.approx(plain(arch).loss, abs=1e-5)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"recovery_steps": -1}, "recovery_steps must not be negative"),
        ({"max_params": -1}, "max_params must not be negative"),
        ({"additivity_networks": 1}, "at least 2"),
        ({"importance": "drop"}, "did you mean drops"),
        ({"importance": "logits", "mixture_epochs": 0}, "needs a mixture"),
        ({"mes_size_unit": 0.0}, "mes_size_unit must be a positive number"),
        ({"mes_latency_alpha": -1.0}, "mes_latency_alpha must be a positive number"),
        ({"objective": "mess"}, "did you mean mes"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(wrong: dict[str, object], named: str) -> None:
    assert named in refusal(lambda: SupernetSettings(**wrong))  # type: ignore[arg-type]
