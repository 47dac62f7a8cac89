"""Slimming goes from the largest network to the budget by the smallest drop per millisecond, step by step."""

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from refusals import refusal

from nas.slimming import LANDING, MIN_SAVING, MobileEfficiency, slim, slot_score, start_network
from nas.trajectory import COLUMNS, Evaluation, Limit, Step, Trajectory
from supernet.arch import ArchConfig
from supernet.space import SearchSpace, StageSpace
from supernet.specs import MB3D, MB4D, Block, Embedding, Identity


def stage_space(widths: tuple[int, ...], stride: int, depth: int, *kinds: str) -> StageSpace:
    blocks: dict[str, Block] = {"mb4d": MB4D(widths[-1]), "mb3d": MB3D(widths[-1]), "identity": Identity(widths[-1])}
    return StageSpace(widths, stride, depth, tuple(blocks[kind] for kind in kinds))


def kinds_of(arch: ArchConfig) -> list[list[str]]:
    return [[block.kind for block in stage.blocks] for stage in arch.stages]


@dataclass(frozen=True)
class Table:
    """1 ms for everything that is no block, and for each block its width in channels times its kind's ms."""

    ms_per_channel: Mapping[str, float] = field(default_factory=lambda: {"mb4d": 1 / 16, "mb3d": 1 / 8, "identity": 0})

    def predict_ms(self, arch: ArchConfig) -> float:
        return 1 + sum(self.ms_per_channel[block.kind] * block.dim for stage in arch.stages for block in stage.blocks)


@dataclass
class Additive:
    """A loss of 1 plus what is listed for each slot's kind and each stage's width; what is not listed costs nothing."""

    slots: Mapping[tuple[int, int, str], float]
    widths: Mapping[tuple[int, int], float]
    asked: list[ArchConfig] = field(default_factory=list)

    def __call__(self, arch: ArchConfig) -> float:
        self.asked.append(arch)
        blocks = [(i, j, b.kind) for i, stage in enumerate(arch.stages) for j, b in enumerate(stage.blocks)]
        return (
            1
            + sum(self.slots.get(block, 0) for block in blocks)
            + sum(self.widths.get(stage, 0) for stage in enumerate(arch.widths))
        )


# -- An example by hand ------------------------------------------------------------------------------------------------
#
# Stage 1: widths 8 and 16, one slot. Stage 2: widths 16, 24 and 32, two slots. Odds against identity: slot (1, 1) 1;
# slot (2, 1) 2 + 3 = 5; slot (2, 2) 1 + 6 = 7. So slot (1, 1) is the least important, and stage 1 (1, against 12).

TWO = SearchSpace(
    "two",
    16,
    10,
    (stage_space((8, 16), 2, 1, "mb4d", "identity"), stage_space((16, 24, 32), 2, 2, "mb4d", "mb3d", "identity")),
)
ODDS = [{"mb4d": 1.0}, {"mb4d": 2.0, "mb3d": 3.0}, {"mb4d": 1.0, "mb3d": 6.0}]
IMPORTANCE = [{kind: math.log(odds) for kind, odds in slot.items()} for slot in ODDS]


def loss_by_hand() -> Additive:
    return Additive(
        {(0, 0, "identity"): 0.30, (1, 0, "mb4d"): 0.20, (1, 1, "mb4d"): 0.70},
        {(0, 8): 0.10, (1, 24): 0.30, (1, 16): 0.30 + 0.75},
    )


def test_the_example_by_hand() -> None:
    found = slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 4.0)

    # Every slot at its best-scoring candidate: 1 + mb4d 16/16 + 2 x mb3d 32/8 = 1 + 1 + 4 + 4 = 10 ms, loss 1.
    assert found.start == TWO.arch((16, 32), (("mb4d",), ("mb3d", "mb3d")), "two-start")
    expected = [
        # At 10 ms. Best: a token block becomes a map block, 4 to 2 ms.
        (
            10.0,
            [
                ("mb3d to mb4d in slot 1 of stage 2", 2.0, 0.20 / 2.0),  # 0.10
                ("narrow stage 1 from 16 to 8", 0.5, 0.10 / 0.5),  # 0.20
                ("empty slot 1 of stage 1", 1.0, 0.30 / 1.0),  # 0.30
            ],
        ),
        # At 8 ms. The next token block would cost more: 0.70 for 2 ms.
        (
            8.0,
            [
                ("narrow stage 1 from 16 to 8", 0.5, 0.10 / 0.5),  # 0.20
                ("empty slot 1 of stage 1", 1.0, 0.30 / 1.0),  # 0.30
                ("mb3d to mb4d in slot 2 of stage 2", 2.0, 0.70 / 2.0),  # 0.35
            ],
        ),
        # At 7.5 ms. Stage 1 has no narrower width, so stage 2 is offered: 2 + 4 to 1.5 + 3 ms. The block of stage 1
        # saves half of what it did.
        (
            7.5,
            [
                ("narrow stage 2 from 32 to 24", 1.5, 0.30 / 1.5),  # 0.20
                ("mb3d to mb4d in slot 2 of stage 2", 2.0, 0.70 / 2.0),  # 0.35
                ("empty slot 1 of stage 1", 0.5, 0.30 / 0.5),  # 0.60
            ],
        ),
        # At 6 ms. 24 to 16 takes 1.5 + 3 to 1 + 2 ms; the token block 3 to 1.5 ms.
        (
            6.0,
            [
                ("mb3d to mb4d in slot 2 of stage 2", 1.5, 0.70 / 1.5),  # 0.467
                ("narrow stage 2 from 24 to 16", 1.5, 0.75 / 1.5),  # 0.50
                ("empty slot 1 of stage 1", 0.5, 0.30 / 0.5),  # 0.60
            ],
        ),
        # At 4.5 ms. No token blocks are left; 24 to 16 takes 1.5 + 1.5 to 1 + 1 ms.
        (
            4.5,
            [
                ("empty slot 1 of stage 1", 0.5, 0.30 / 0.5),  # 0.60
                ("narrow stage 2 from 24 to 16", 1.0, 0.75 / 1.0),  # 0.75
            ],
        ),
    ]
    assert [step.ms for step in found.steps] == [ms for ms, _ in expected]
    for step, (_, options) in zip(found.steps, expected, strict=True):
        assert [(o.action, o.saved_ms) for o in step.options] == [(action, saved) for action, saved, _ in options]
        assert [o.score for o in step.options] == pytest.approx([score for _, _, score in options])
        assert all(o.ms == step.ms - o.saved_ms == Table().predict_ms(o.arch) for o in step.options)
    # 1 + 2 x 24/16 = 4 ms; loss 1 + 0.20 + 0.10 + 0.30 + 0.70 + 0.30.
    assert found.arch == TWO.arch((8, 24), (("identity",), ("mb4d", "mb4d")), "two-start")
    assert found.ms == 4.0
    assert found.evaluation.loss == pytest.approx(2.60)
    assert math.isnan(found.evaluation.accuracy)


def test_landing_gives_width_back() -> None:
    # The loop ends at 4.5 ms, 12 % under the target. With its blocks, 1 + w1/16 + 2 x w2/16 is 5.0 ms at (16, 24),
    # within 3 % under 5.1 ms, and 5.5 ms at (8, 32).
    found = slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 5.1)
    assert [step.taken.action for step in found.steps[3:]] == [
        "mb3d to mb4d in slot 2 of stage 2",
        "land: stage 1 8 to 16",
    ]
    assert (found.ms, found.arch.widths) == (5.0, (16, 24))
    assert (found.steps[-1].taken.saved_ms, found.steps[-1].taken.ms) == (-0.5, 5.0)
    assert found.evaluation.loss == pytest.approx(1 + 0.20 + 0.30 + 0.70)


def test_landing_gives_blocks_back_where_width_alone_does_not_get_there() -> None:
    # The loop ends at 4 ms with (8, 24) and an empty stage 1. Between 4.3165 and 4.45 ms: 1 + 2 x w2/16 is 4 or 5 ms,
    # and with the block of stage 1, 4.5 or 5 ms. With mb4d and mb3d in stage 2 it is 1 + w1/16 + 3 x w2/16.
    assert slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 4.45).ms == 4.0  # none of them: the loop's own network stays
    # Between 4.8015 and 4.95 ms, with mb3d 1/8 + 0.02 a channel: 1 + 8/16 + 16/16 + 2 + 0.32 = 4.82 ms.
    table = Table({"mb4d": 1 / 16, "mb3d": 1 / 8 + 0.02, "identity": 0})
    found = slim(TWO, IMPORTANCE, loss_by_hand(), table, 4.95)
    assert found.steps[-2].taken.arch.widths == (8, 24)
    assert found.steps[-1].taken.action == "land: 1 block back, stage 2 24 to 16"
    assert (kinds_of(found.arch), found.arch.widths) == ([["mb4d"], ["mb4d", "mb3d"]], (8, 16))
    assert found.ms == pytest.approx(4.82)


def test_records_have_a_row_for_every_option_and_one_taken_for_every_step() -> None:
    found = slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 5.1)
    rows = list(found.records())
    assert len(rows) == sum(len(step.options) for step in found.steps) == 3 + 3 + 3 + 3 + 2
    assert [row["step"] for row in rows if row["taken"]] == [1, 2, 3, 4, 5]
    assert rows[0] == {
        "step": 1,
        "taken": True,
        "action": "mb3d to mb4d in slot 1 of stage 2",
        "ms_before": 10.0,
        "ms_after": 8.0,
        "saved_ms": 2.0,
        "loss_before": 1.0,
        "loss_after": pytest.approx(1.2),
        "accuracy_before": pytest.approx(math.nan, nan_ok=True),
        "accuracy_after": pytest.approx(math.nan, nan_ok=True),
        "score": pytest.approx(0.1),
    }


def test_on_step_sees_every_step_in_order() -> None:
    seen: list[Step] = []
    found = slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 5.1, on_step=seen.append)
    assert tuple(seen) == found.steps


def test_no_network_is_evaluated_twice() -> None:
    evaluate = loss_by_hand()
    slim(TWO, IMPORTANCE, evaluate, Table(), 5.1)
    assert len(evaluate.asked) == len(set(evaluate.asked))


# -- The rules, one by one ---------------------------------------------------------------------------------------------


def test_a_slot_s_score_is_the_log_of_its_summed_odds() -> None:
    assert slot_score({"mb4d": math.log(2), "mb3d": math.log(3)}) == pytest.approx(math.log(5))
    assert slot_score({"mb4d": -1.5}) == -1.5
    assert slot_score({"mb4d": 1000.0, "mb3d": 1000.0}) == pytest.approx(1000 + math.log(2))  # no overflow


def test_the_start_has_each_slot_s_best_candidate_with_tokens_last() -> None:
    # Slot (2, 1) prefers tokens and slot (2, 2) maps; even where identity is better than both.
    importance = [{"mb4d": -5.0}, {"mb4d": -2.0, "mb3d": -1.0}, {"mb4d": 1.0, "mb3d": 0.0}]
    assert kinds_of(start_network(TWO, importance)) == [["mb4d"], ["mb4d", "mb3d"]]
    assert start_network(TWO, importance).widths == (16, 32)


def test_ties_go_to_more_milliseconds_then_to_the_earlier_stage() -> None:
    # Nothing costs anything: 2 ms by a token block, 1 ms by the empty slot, 0.5 ms by width.
    first = slim(TWO, IMPORTANCE, lambda arch: 1.0, Table(), 4.0).steps[0]
    assert [(option.score, option.saved_ms) for option in first.options] == [(0, 2.0), (0, 1.0), (0, 0.5)]

    # Slot (2, 1) is the least important, and so is stage 1. Either saves 1 ms: 16/16, or 2 x (16 - 8)/16.
    space = SearchSpace(
        "ties", 16, 10, (stage_space((8, 16), 2, 2, "mb4d", "identity"), stage_space((16,), 2, 2, "mb4d", "identity"))
    )
    importance = [{"mb4d": math.log(odds)} for odds in (1.0, 1.0, 0.5, 5.0)]
    options = slim(space, importance, lambda arch: 1.0, Table(), 4.0).steps[0].options
    assert [(o.action, o.saved_ms) for o in options] == [
        ("narrow stage 1 from 16 to 8", 1.0),
        ("empty slot 1 of stage 2", 1.0),
    ]


def test_a_drop_below_zero_counts_as_none() -> None:
    # Emptying slot (1, 1) improves the loss by far, but that makes it no better than what costs nothing.
    loss = Additive({(0, 0, "identity"): -5.0, (1, 0, "mb4d"): -0.001}, {(0, 8): 0.1})
    options = slim(TWO, IMPORTANCE, loss, Table(), 8.0).steps[0].options
    assert [(o.action, o.score) for o in options] == [
        ("mb3d to mb4d in slot 1 of stage 2", 0.0),
        ("empty slot 1 of stage 1", 0.0),
        ("narrow stage 1 from 16 to 8", pytest.approx(0.2)),
    ]


@dataclass(frozen=True)
class CheapFirstStage:
    """The hand-written table, but the one block of stage 1 takes `share` of 5 ms, at both widths."""

    share: float

    def predict_ms(self, arch: ArchConfig) -> float:
        (block,) = arch.stages[0].blocks
        rest = Table().predict_ms(arch) - Table().ms_per_channel[block.kind] * block.dim
        return rest + (0 if isinstance(block, Identity) else self.share * 5)


def test_what_saves_under_a_thousandth_of_the_target_is_not_offered() -> None:
    def actions(share: float) -> list[str]:
        options = slim(TWO, IMPORTANCE, loss_by_hand(), CheapFirstStage(share), 5.0).steps[0].options
        return sorted(option.action for option in options)

    untoken = "mb3d to mb4d in slot 1 of stage 2"
    # Width saves nothing in stage 1, so stage 2 takes its place, and slot (2, 1) that of slot (1, 1).
    assert actions(0.9 * MIN_SAVING) == ["empty slot 1 of stage 2", untoken, "narrow stage 2 from 32 to 24"]
    assert actions(1.1 * MIN_SAVING) == ["empty slot 1 of stage 1", untoken, "narrow stage 2 from 32 to 24"]


def test_several_steps_of_width_are_taken_where_one_does_not_save_enough() -> None:
    class Rounded(Table):
        """A device that computes 16 and 24 channels of a map block in the same time, as it does 32 and 40."""

        def predict_ms(self, arch: ArchConfig) -> float:
            return 1 + sum(block.dim // 16 for stage in arch.stages for block in stage.blocks if block.kind == "mb4d")

    space = SearchSpace("steps", 16, 10, (stage_space((16, 24, 32, 40), 2, 1, "mb4d", "identity"),))
    step = slim(space, [{"mb4d": 0.0}], lambda arch: float(-arch.widths[0]), Rounded(), 2.0).steps[0]
    assert [option.action for option in step.options][-1] == "narrow stage 1 from 40 to 24"


def test_the_earliest_token_block_goes_first_and_tokens_stay_last() -> None:
    kinds = ("mb4d", "mb3d", "identity")
    space = SearchSpace("tokens", 16, 10, (stage_space((16, 32), 2, 3, *kinds), stage_space((16, 32), 2, 3, *kinds)))
    rng = random.Random(0)
    importance = [{"mb4d": rng.random(), "mb3d": 2 + rng.random()} for _ in space.slots]
    found = slim(space, importance, lambda arch: rng.random(), Table(), Table().predict_ms(space.smallest) + 0.1)
    assert found.steps
    seen = 0
    for step in found.steps:
        before = found.start if step is found.steps[0] else found.steps[found.steps.index(step) - 1].taken.arch
        tokens = [(i, j) for i, stage in enumerate(kinds_of(before)) for j, k in enumerate(stage) if k == "mb3d"]
        for option in step.options:
            assert not any(
                b.tokens and not later.tokens and not isinstance(later, Identity)
                for stage in option.arch.stages
                for b, later in itertools.combinations(stage.blocks, 2)
            )
            if " to mb4d " in option.action:
                seen += 1
                i, j = tokens[0]
                assert option.action == f"mb3d to mb4d in slot {j + 1} of stage {i + 1}"
                assert kinds_of(option.arch)[i][j] == "mb4d"
    assert seen > 3


def test_a_stage_that_has_tokens_alone_does_not_keep_the_next_one_from_maps() -> None:
    stages = (stage_space((16,), 2, 1, "mb3d", "identity"), stage_space((16,), 2, 1, "mb4d", "mb3d", "identity"))
    importance = [{"mb3d": 9.0}, {"mb4d": 1.0, "mb3d": 9.0}]
    found = slim(SearchSpace("tokens", 16, 10, stages), importance, lambda arch: 1.0, Table(), 4.0)
    assert "mb3d to mb4d in slot 1 of stage 2" in [option.action for option in found.steps[0].options]


def test_a_stage_s_score_sums_the_odds_of_its_filled_slots() -> None:
    # Odds 1 and 1 make 2 for stage 1, under 3 for stage 2; in log-odds, 0 + 0 is under log 3 as well, but with 0.9 and
    # 0.9 against 1.5 the sum of odds is larger (1.8) while the sum of logs is smaller (-0.21 against 0.41).
    space = SearchSpace(
        "sums",
        16,
        10,
        (stage_space((8, 16), 2, 2, "mb4d", "identity"), stage_space((8, 16), 2, 1, "mb4d", "identity")),
    )
    importance = [{"mb4d": math.log(odds)} for odds in (0.9, 0.9, 1.5)]
    steps = slim(space, importance, loss_by_hand(), Table(), 1.0).steps
    narrowed = [option.action for option in steps[0].options if option.action.startswith("narrow")]
    assert narrowed == ["narrow stage 2 from 16 to 8"]


def test_accuracy_is_charged_where_asked() -> None:
    # By loss the token block is the cheapest, by accuracy it is width: 0.01 / 0.5 = 0.02 a ms against 0.1 / 2 = 0.05.
    def evaluate(arch: ArchConfig) -> Evaluation:
        kinds = kinds_of(arch)
        accuracy = 0.9 - 0.1 * (kinds[1][0] == "mb4d") - 0.01 * (arch.widths[0] == 8) - 0.3 * (kinds[0] == ["identity"])
        return Evaluation(loss_by_hand()(arch), accuracy)

    by_loss, by_accuracy = (
        slim(TWO, IMPORTANCE, evaluate, Table(), 9.0, score=score).steps[0].taken for score in ("loss", "accuracy")
    )
    assert by_loss.action == "mb3d to mb4d in slot 1 of stage 2"
    assert by_accuracy.action == "narrow stage 1 from 16 to 8"
    assert by_accuracy.score == pytest.approx(0.02)


# -- The budget --------------------------------------------------------------------------------------------------------


def test_a_budget_that_the_largest_network_meets_returns_it_with_no_steps() -> None:
    for budget in (10.0, 11.0, 1000.0):
        found = slim(TWO, IMPORTANCE, loss_by_hand(), Table(), budget)
        assert (found.arch, found.steps, found.ms) == (start_network(TWO, IMPORTANCE), (), 10.0)


@pytest.mark.parametrize("budget", [0, -1, math.nan, math.inf, -math.inf])
def test_a_budget_that_is_no_latency_is_refused(budget: float) -> None:
    assert "positive number of milliseconds" in refusal(lambda: slim(TWO, IMPORTANCE, loss_by_hand(), Table(), budget))


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        ({"MB4D": 1.0, "mb3d": 1.0}, "must have mb4d, mb3d for slot 1 of stage 2 of space two, but has MB4D, mb3d"),
        ({"mb4d": 1.0}, "must have mb4d, mb3d for slot 1 of stage 2 of space two, but has mb4d"),
        ({}, "but has nothing"),
        ({"mb4d": math.nan, "mb3d": 0.0}, "must be finite, but is nan for mb4d in slot 1 of stage 2"),
        ({"mb4d": 0.0, "mb3d": -math.inf}, "must be finite, but is -inf for mb3d in slot 1 of stage 2"),
    ],
)
def test_an_importance_that_is_not_of_the_space_is_refused(slot: dict[str, float], message: str) -> None:
    importance = [IMPORTANCE[0], slot, IMPORTANCE[2]]
    assert message in refusal(lambda: slim(TWO, importance, loss_by_hand(), Table(), 5.0))
    assert "importance has 2 slots" in refusal(lambda: slim(TWO, IMPORTANCE[:2], loss_by_hand(), Table(), 5.0))


def test_an_importance_may_be_as_large_as_numbers_are() -> None:
    huge = [dict.fromkeys(slot, 1e300) for slot in IMPORTANCE]
    assert slim(TWO, huge, loss_by_hand(), Table(), 5.0).ms <= 5.0


def test_a_budget_below_the_smallest_network_is_refused_with_one_that_is_not() -> None:
    @dataclass(frozen=True)
    class Offset:
        ms: float

        def predict_ms(self, arch: ArchConfig) -> float:
            return self.ms + Table().predict_ms(arch)

    for offset in (0.234561, 0.23444, 98.76543, 12345.678, 8.9999):  # rounded to four digits, down or up
        table = Offset(offset)
        message = refusal(lambda table=table: slim(TWO, IMPORTANCE, loss_by_hand(), table, 0.5))  # type: ignore[misc]
        assert "0.5 ms is below the smallest network" in message
        named = float(message.split("at least ")[1].removesuffix(" ms"))
        assert named == pytest.approx(1 + offset, rel=1e-3)
        assert slim(TWO, IMPORTANCE, loss_by_hand(), table, named).ms <= named


def test_the_smallest_network_is_reached_even_if_the_last_step_saves_little() -> None:
    table = CheapFirstStage(1e-5)
    found = slim(TWO, IMPORTANCE, loss_by_hand(), table, table.predict_ms(TWO.smallest))
    assert kinds_of(found.arch) == kinds_of(TWO.smallest)


def test_a_table_on_which_the_loop_is_stuck_is_an_error_and_no_endless_loop() -> None:
    class Perverse:
        """Only the smallest network is quick; every single action makes the largest one slower."""

        def predict_ms(self, arch: ArchConfig) -> float:
            return {TWO.smallest.stages: 1.0, start_network(TWO, IMPORTANCE).stages: 5.0}.get(arch.stages, 6.0)

    assert "no action saves anything from 5 ms on" in refusal(lambda: slim(TWO, IMPORTANCE, loss_by_hand(), Perverse(), 2.0))


def test_importance_of_another_space_and_an_unknown_score_are_refused() -> None:
    assert "2 slots" in refusal(lambda: slim(TWO, IMPORTANCE[:2], loss_by_hand(), Table(), 4.0))
    message = refusal(lambda: slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 4.0, score="acc"))  # type: ignore[arg-type]
    assert "accuracy" in message


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused(loss: float) -> None:
    """max(0, NaN) is 0 in Python: the network that broke would be the cheapest."""

    def evaluate(arch: ArchConfig) -> float:
        return loss if kinds_of(arch)[0] == ["identity"] else 1.0

    assert f"gives {loss}" in refusal(lambda: slim(TWO, IMPORTANCE, evaluate, Table(), 4.0))
    # An evaluation without accuracy cannot be charged by accuracy.
    assert "charges accuracy" in refusal(lambda: slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 4.0, score="accuracy"))


# -- Going on ----------------------------------------------------------------------------------------------------------


def test_a_tighter_budget_goes_on_from_a_trajectory() -> None:
    whole = slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 4.0)
    landed = slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 5.1)
    assert len(landed.steps) == 5 and landed.steps[-1].taken.action.startswith("land")

    evaluate = loss_by_hand()
    further = slim(TWO, IMPORTANCE, evaluate, Table(), 4.0, start=landed)
    assert further.steps == whole.steps  # the four steps are kept, the landing is undone
    assert all(kept is old for kept, old in zip(further.steps, landed.steps[:4], strict=False))
    assert (further.start, further.arch, further.ms) == (whole.start, whole.arch, whole.ms)
    # Only the end of the kept steps and the options of the new one are evaluated.
    assert set(evaluate.asked) == {
        whole.steps[3].taken.arch,
        *(option.arch for option in whole.steps[4].options),
    }


def test_a_trajectory_without_steps_is_gone_on_from_as_well() -> None:
    begun = slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 10.0)
    further = slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 4.0, start=begun)
    assert further.arch == slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 4.0).arch


# -- Random tables -----------------------------------------------------------------------------------------------------

THREE = SearchSpace(
    "three",
    32,
    10,
    (
        stage_space((8, 16), 2, 2, "mb4d", "identity"),
        stage_space((16, 24, 32), 2, 2, "mb4d", "mb3d", "identity"),
        stage_space((24, 32, 40, 48), 2, 3, "mb3d", "mb4d", "identity"),
    ),
)


class RandomTable:
    """Additive over layers, each with a random time that rises with its widths."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.rate = {kind: rng.uniform(0.2, 2) for kind in ("stem", "mb4d", "mb3d", "flat", "unflat", "head")}
        self.power = {kind: rng.uniform(0.3, 2) for kind in (*self.rate, "embedding")}
        self.stage = {resolution: rng.uniform(0.3, 3) for resolution in (32, *THREE.resolutions)}

    def predict_ms(self, arch: ArchConfig) -> float:
        total = 0.1
        for layer in arch.layers():
            spec = layer.spec
            size = spec.dim * (spec.dim_in / 16 if isinstance(spec, Embedding) else 1)
            total += self.rate.get(spec.kind, 0.5) * self.stage[layer.resolution] * (size / 16) ** self.power[spec.kind]
        return total


def random_run(seed: int, share: float | None = None) -> tuple[Trajectory, RandomTable, float]:
    """Slim to a random share of the way from the smallest network to the largest."""
    rng = random.Random(f"run {seed}")
    table = RandomTable(seed)
    importance = [
        {kind: rng.uniform(-2, 2) for kind in THREE.stages[stage].kinds if kind != "identity"} for stage, _ in THREE.slots
    ]
    low, high = table.predict_ms(THREE.smallest), table.predict_ms(start_network(THREE, importance))
    budget = low + (rng.uniform(0.02, 0.95) if share is None else share) * (high - low)
    cost = {(i, j, k): rng.random() for (i, j), k in itertools.product(THREE.slots, ("identity", "mb4d"))}
    widths = {(i, w): rng.random() * (s.widths[-1] - w) / 16 for i, s in enumerate(THREE.stages) for w in s.widths}
    return slim(THREE, importance, Additive(cost, widths), table, budget), table, budget


def test_a_landing_that_is_slower_and_worse_is_left_out_where_only_better_ones_are_wanted() -> None:
    def evaluate(arch: ArchConfig) -> float:
        """A network of 5 ms, where the loop would land, is bad."""
        return 9.0 if Table().predict_ms(arch) == 5.0 else loss(arch)

    loss = loss_by_hand()
    worse = slim(TWO, IMPORTANCE, evaluate, Table(), 5.1)
    assert (worse.ms, worse.evaluation.loss) == (5.0, 9.0)
    found = slim(TWO, IMPORTANCE, evaluate, Table(), 5.1, only_better=True)
    assert found.ms == 4.5 and found.evaluation.loss < 9.0
    assert found.steps == worse.steps[:-1]
    assert slim(TWO, IMPORTANCE, loss, Table(), 5.1, only_better=True).ms == 5.0, "a better one is landed at"


@pytest.mark.parametrize("seed", range(30))
def test_it_lands_within_3_percent_wherever_brute_force_does(seed: int) -> None:
    found, table, budget = random_run(seed)
    assert found.ms <= budget
    assert found.ms == table.predict_ms(found.arch)
    assert found.arch in THREE
    if found.ms >= (1 - LANDING) * budget:
        return
    blocks = {tuple(map(tuple, kinds_of(arch))) for arch in (found.start, *(s.taken.arch for s in found.steps))}
    for kinds, widths in itertools.product(blocks, itertools.product(*(s.widths for s in THREE.stages))):
        ms = table.predict_ms(THREE.arch(widths, kinds))
        assert not (1 - LANDING) * budget <= ms <= budget, (kinds, widths)


def test_the_random_runs_land_and_land_not() -> None:
    runs = [random_run(seed) for seed in range(30)]
    landed = [found for found, _, _ in runs if found.steps[-1].taken.action.startswith("land")]
    assert len(landed) >= 5
    assert any(" back" in found.steps[-1].taken.action for found in landed)
    assert 10 <= sum(found.ms >= (1 - LANDING) * budget for found, _, budget in runs) <= 25


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.5, 1 - 1e-9, 1.0])
def test_every_budget_from_the_smallest_network_on_is_met(share: float) -> None:
    for seed in range(10):
        found, _, budget = random_run(seed, share)
        assert found.ms <= budget


# -- Action 4 ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByActivation:
    """4 ms for a block with GELU, 3 with HardSwish, 2 with ReLU."""

    def predict_ms(self, arch: ArchConfig) -> float:
        ms = {"gelu": 4.0, "hardswish": 3.0, "relu": 2.0}
        return 1 + sum(ms[b.act] for stage in arch.stages for b in stage.blocks if isinstance(b, MB4D | MB3D))


def test_a_cheaper_candidate_of_the_same_form_is_offered_where_the_odds_lose_least() -> None:
    blocks = (MB4D(16), MB4D(16, act="hardswish"), MB4D(16, act="relu"), MB3D(16), Identity(16))
    space = SearchSpace("acts", 16, 10, (StageSpace((16,), 2, 2, blocks),))
    assert space.stages[0].kinds == ("mb4d", "mb4d(act=hardswish)", "mb4d(act=relu)", "mb3d", "identity")
    importance = [
        {"mb4d": 3.0, "mb4d(act=hardswish)": 2.0, "mb4d(act=relu)": 1.5, "mb3d": 0.0},
        {"mb4d": 3.0, "mb4d(act=hardswish)": 2.5, "mb4d(act=relu)": 0.0, "mb3d": 2.9},
    ]
    found = slim(space, importance, lambda arch: 0.0, ByActivation(), 7.0, landing=1.0)
    assert found.ms <= 7.0
    by_hand = slim(space, importance, _gelu_is_dear, ByActivation(), 8.0, landing=1.0)
    # 3.0 to 2.5 loses least, and saves 1 ms; the attention block is of another form, and does not come instead.
    assert [o.action for o in by_hand.steps[0].options if "(act" in o.action] == [
        "mb4d to mb4d(act=hardswish) in slot 2 of stage 1"
    ]
    assert by_hand.steps[0].taken.action == "mb4d to mb4d(act=hardswish) in slot 2 of stage 1"
    assert by_hand.arch in space


def _gelu_is_dear(arch: ArchConfig) -> float:
    """Empty slots cost a lot, activations next to nothing."""
    return sum(1.0 if isinstance(block, Identity) else 0.0 for stage in arch.stages for block in stage.blocks)


# -- Limits ------------------------------------------------------------------------------------------------------------


def params_of(arch: ArchConfig) -> float:
    """A made-up size: 100 for a channel of a stage, and its square for each block, twice for one on tokens."""
    blocks = sum(b.dim**2 * (1 + b.tokens) for stage in arch.stages for b in stage.blocks if not isinstance(b, Identity))
    return blocks + 100.0 * sum(arch.widths)


def test_what_saves_parameters_and_no_time_is_offered_while_they_are_too_many() -> None:
    class Rounded(Table):
        """No width of stage 1 is quicker than another."""

        def predict_ms(self, arch: ArchConfig) -> float:
            return super().predict_ms(arch) + sum((16 - b.dim) / 16 for b in arch.stages[0].blocks if b.kind == "mb4d")

    # The start: 1 + 1 + 4 + 4 = 10 ms; widths 16 + 32 = 48 channels, of which 40 are allowed.
    limit = Limit("channels", lambda arch: float(sum(arch.widths)), 40.0)
    found = slim(TWO, IMPORTANCE, loss_by_hand(), Rounded(), 11.0, limits=[limit])
    (step,) = found.steps
    # Blocks have no part in it, so neither emptying a slot nor turning one is offered.
    assert [(o.action, o.saved_ms) for o in step.options] == [("narrow stage 1 from 16 to 8", 0.0)]
    # 8 of 40 channels, a fifth of the limit, counts like a fifth of the target: 0.10 for 2.2 ms.
    assert step.taken.gain == pytest.approx(2.2)
    assert step.taken.score == pytest.approx(0.10 / 2.2)
    assert found.arch == TWO.arch((8, 32), (("mb4d",), ("mb3d", "mb3d")), "two-start")
    assert (found.ms, step.figures, step.taken.figures) == (10.0, {"channels": 48.0}, {"channels": 40.0})


def test_time_and_a_limit_count_together_until_one_is_met() -> None:
    # Target 9 of 10 ms, 40 of 48 channels. Narrowing stage 1 saves 0.5 ms and 8 channels: 0.5 + 9 x 8/40 = 2.3 ms.
    limit = Limit("channels", lambda arch: float(sum(arch.widths)), 40.0)
    found = slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 9.0, limits=[limit])
    assert [(o.action, o.gain) for o in found.steps[0].options] == [
        ("narrow stage 1 from 16 to 8", pytest.approx(2.3)),  # 0.10 / 2.3
        ("mb3d to mb4d in slot 1 of stage 2", pytest.approx(2.0)),  # 0.20 / 2
        ("empty slot 1 of stage 1", pytest.approx(1.0)),  # 0.30
    ]
    # The channels are met now: milliseconds alone count, and narrowing stage 2 saves 2 x 4 - 2 x 3 of them.
    assert [(o.action, o.gain) for o in found.steps[1].options] == [
        ("mb3d to mb4d in slot 1 of stage 2", pytest.approx(2.0)),
        ("narrow stage 2 from 32 to 24", pytest.approx(2.0)),
        ("empty slot 1 of stage 1", pytest.approx(0.5)),
    ]
    assert len(found.steps) == 2 and found.ms == 7.5, "40 channels are as near to the limit as landing would end"


def test_no_action_breaks_what_is_met() -> None:
    # A block on maps has more of something than one on tokens: 4 allowed, 4 there, and 5 after the cheapest action.
    limit = Limit("maps", lambda arch: float(sum(2 if b.kind == "mb4d" else 1 for s in arch.stages for b in s.blocks)), 4.0)
    found = slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 8.0, limits=[limit])
    assert not any(" to mb4d " in option.action for option in found.steps[0].options)
    assert all(limit.of(option.arch) <= 4 for step in found.steps for option in step.options)
    assert slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 8.0).steps[0].taken.action.startswith("mb3d to mb4d")


def test_no_action_that_saves_of_a_limit_breaks_the_target() -> None:
    class Perverse(Table):
        """Stage 1 is slower at 8 channels than at 16."""

        def predict_ms(self, arch: ArchConfig) -> float:
            return super().predict_ms(arch) + (3 if arch.widths[0] == 8 else 0)

    limit = Limit("channels", lambda arch: float(sum(arch.widths)), 40.0)
    found = slim(TWO, IMPORTANCE, loss_by_hand(), Perverse(), 10.5, limits=[limit])
    assert found.steps[0].taken.action == "narrow stage 2 from 32 to 24", "narrowing stage 1 would take 12.5 ms"
    assert found.arch.widths == (16, 24) and found.ms <= 10.5


def test_a_limit_that_all_networks_keep_changes_nothing() -> None:
    limit = Limit("params", params_of, 1e9)
    for budget in (4.0, 4.45, 5.1, 7.0, 11.0):
        free = slim(TWO, IMPORTANCE, loss_by_hand(), Table(), budget)
        kept = slim(TWO, IMPORTANCE, loss_by_hand(), Table(), budget, limits=[limit])
        rows = [[(o.action, o.ms, o.score, o.gain) for o in step.options] for run in (free, kept) for step in run.steps]
        assert str(rows[: len(free.steps)]) == str(rows[len(free.steps) :]), "as text, as landing has no score (NaN)"
        assert kept.arch == free.arch


def limited_run(seed: int, share: float) -> tuple[Trajectory, RandomTable, float, Limit]:
    """Slim to a random budget and `share` of the way from the smallest network's parameters to the largest's."""
    rng = random.Random(f"limited {seed}")
    table = RandomTable(seed)
    importance = [
        {kind: rng.uniform(-2, 2) for kind in THREE.stages[stage].kinds if kind != "identity"} for stage, _ in THREE.slots
    ]
    low, high = table.predict_ms(THREE.smallest), table.predict_ms(start_network(THREE, importance))
    least, most = params_of(THREE.smallest), params_of(start_network(THREE, importance))
    limit = Limit("params", params_of, least + share * (most - least))
    budget = low + rng.uniform(0.05, 1.2) * (high - low)
    cost = {(i, j, k): rng.random() for (i, j), k in itertools.product(THREE.slots, ("identity", "mb4d"))}
    widths = {(i, w): rng.random() * (s.widths[-1] - w) / 16 for i, s in enumerate(THREE.stages) for w in s.widths}
    return slim(THREE, importance, Additive(cost, widths), table, budget, limits=[limit]), table, budget, limit


def test_target_and_limit_are_met_wherever_they_lie_and_landing_keeps_to_both() -> None:
    landed = 0
    for seed, share in itertools.product(range(12), (0.0, 0.1, 0.4, 0.8)):
        found, table, budget, limit = limited_run(seed, share)
        assert table.predict_ms(found.arch) <= budget
        assert limit.of(found.arch) <= limit.at_most
        for step in found.steps:
            if step.taken.action.startswith("land"):
                landed += 1
                assert all(limit.of(option.arch) <= limit.at_most for option in step.options)
    assert landed >= 5


def test_a_limit_below_the_smallest_network_is_refused_with_the_least_that_it_can_be() -> None:
    least = int(params_of(TWO.smallest))
    line = refusal(lambda: slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 4.0, limits=[Limit("params", params_of, least - 1)]))
    assert f"at most {least - 1} params is below the smallest network of two: give at least {least}" in line
    found = slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 11.0, limits=[Limit("params", params_of, least)])
    assert params_of(found.arch) == least


def test_records_name_what_the_score_is_per() -> None:
    assert slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 5.1).columns == COLUMNS
    limits = [Limit("params", params_of, 3000.0), Limit("channels", lambda arch: float(sum(arch.widths)), 40.0)]
    found = slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 9.0, limits=limits)
    extra = ("gain_ms", "params_before", "params_after", "channels_before", "channels_after")
    assert found.columns == (*COLUMNS, *extra)
    rows = list(found.records())
    assert all(tuple(row) == found.columns for row in rows)
    for row in rows:
        rise = max(0.0, row["loss_after"] - row["loss_before"])  # type: ignore[operator]
        assert row["score"] == pytest.approx(rise / row["gain_ms"])  # type: ignore[operator]
    assert (rows[0]["channels_before"], rows[0]["params_before"]) == (48.0, params_of(start_network(TWO, IMPORTANCE)))
    mes = slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 4.0, mes=MobileEfficiency(params_of))
    assert mes.columns == (*COLUMNS, "gain_mes", "mes_before", "mes_after")


# -- Size and latency together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "ms", "published"),
    [(3.5e6, 0.9, 102.9), (6.1e6, 1.1, 63.8), (12.6e6, 1.6, 30.5), (26.1e6, 2.7, 12.6), (12.3e6, 1.4, 35.3)],
    ids=["V2-S0", "V2-S1", "V2-S2", "V2-L", "L1"],
)
def test_the_mobile_efficiency_score_is_the_published_one(params: float, ms: float, published: float) -> None:
    assert MobileEfficiency(params_of).of(params, ms) == pytest.approx(published, abs=0.1)


def test_the_constants_are_settings() -> None:
    score = MobileEfficiency(params_of, size_unit=1e6, latency_unit_ms=2.0, size_alpha=1.0, latency_alpha=2.0)
    assert score.of(1e6, 2.0) == 100
    assert score.of(2e6, 2.0) == 50 and score.of(1e6, 4.0) == 25


def single_actions(arch: ArchConfig) -> set[ArchConfig]:
    """Every slot emptied, every stage one step narrower, the first token block as a map block: of TWO, by other code."""
    widths, kinds = list(arch.widths), kinds_of(arch)
    found = set()
    for i, stage in enumerate(kinds):
        for j, kind in enumerate(stage):
            if kind != "identity":
                other = [list(s) for s in kinds]
                other[i][j] = "identity"
                found.add(TWO.arch(widths, other, arch.name))
        if smaller := [w for w in TWO.stages[i].widths if w < widths[i]]:
            found.add(TWO.arch([*widths[:i], max(smaller), *widths[i + 1 :]], kinds, arch.name))
    if tokens := [j for j, kind in enumerate(kinds[1]) if kind == "mb3d"]:
        other = [list(s) for s in kinds]
        other[1][tokens[0]] = "mb4d"
        found.add(TWO.arch(widths, other, arch.name))
    return found


def test_every_single_action_is_evaluated_and_the_smallest_drop_per_mes_is_taken() -> None:
    mes = MobileEfficiency(params_of)
    evaluate = loss_by_hand()
    found = slim(TWO, IMPORTANCE, evaluate, Table(), 4.0, mes=mes)
    arch = found.start
    for step in found.steps:
        if step.taken.action.startswith("land"):
            break
        assert {option.arch for option in step.options} == single_actions(arch)
        now = mes.of(params_of(arch), Table().predict_ms(arch))
        for option in step.options:
            gain = mes.of(params_of(option.arch), Table().predict_ms(option.arch)) - now
            drop = max(0.0, evaluate(option.arch) - evaluate(arch))
            assert (option.gain, option.score) == (pytest.approx(gain), pytest.approx(drop / gain))
        assert step.taken.score == min(option.score for option in step.options)
        arch = step.taken.arch
    assert found.ms <= 4.0


def test_mes_and_milliseconds_choose_otherwise_where_size_and_time_do() -> None:
    # Emptying stage 1 saves 1 of 6 ms and hardly any parameters, emptying stage 2 saves 4 ms and most of them.
    space = SearchSpace(
        "other", 16, 10, (stage_space((16,), 2, 1, "mb4d", "identity"), stage_space((64,), 2, 1, "mb4d", "identity"))
    )
    table = Table({"mb4d": 1 / 16, "identity": 0})  # 1 + 1 + 4 ms

    def loss(arch: ArchConfig) -> float:
        return 0.2 * (kinds_of(arch)[0] == ["identity"]) + 0.9 * (kinds_of(arch)[1] == ["identity"])

    importance = [{"mb4d": 0.0}, {"mb4d": 1.0}]
    by_time = slim(space, importance, loss, table, 5.0).steps[0].taken
    assert (by_time.action, by_time.score) == ("empty slot 1 of stage 1", pytest.approx(0.2))
    # 0.2 for 6 to 5 ms and 256 of 12,352 parameters less; 0.9 for 6 to 2 ms and 4,096 less.
    options = slim(space, importance, loss, table, 5.0, mes=MobileEfficiency(params_of)).steps[0].options
    assert [option.action for option in options] == ["empty slot 1 of stage 2", "empty slot 1 of stage 1"]
    assert all(option.arch in space for option in options)


def test_target_and_limits_stop_the_mes_loop_too() -> None:
    limit = Limit("channels", lambda arch: float(sum(arch.widths)), 24.0)
    found = slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 11.0, limits=[limit], mes=MobileEfficiency(params_of))
    assert found.arch.widths == (8, 16) and len(found.steps) > 1
    assert "mes_after" in found.columns and "channels_after" in found.columns
    further = slim(TWO, IMPORTANCE, loss_by_hand(), Table(), 4.0, start=found, limits=[limit], mes=MobileEfficiency(params_of))
    assert further.ms <= 4.0 and further.steps[: len(found.steps)] == found.steps
