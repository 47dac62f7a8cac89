"""What every single choice costs: drops in loss and accuracy of one change at a time, and how far they add up. No torch.

A `Drops` predicts the loss of any network of a space from networks that differ from a base in one place: another
candidate in one slot, or another width of one stage (a `Change`).

*Slots are not independent where a stage has blocks on tokens.* Those stand behind the stage's blocks on maps, so a token
block in a slot before a map block is no network. Nothing is moved to make it one: a change is measured in the nearest
network in which it can stand (`completed`), where the map blocks behind it have become the same token block (or, for a map
block behind token blocks, those before it the same map block). Its drop is what that network loses beyond the drops of
its other changes, which are measured before it. So the drops of slots j, j + 1, ... that become token blocks add up to what
was measured, and for a loss that is a sum over slots and widths the prediction is exact for every network of the space.

*Pairs* (`measure_pairs`): the same for two changes of one stage, beyond all that is known of smaller sets. For a loss with
terms of single changes and of pairs inside a stage, with all pairs measured, it is exact again.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from nas.kept import described, write_csv
from nas.slimming import Importance
from nas.statistics import kendall_tau, line, r_squared
from nas.trajectory import Evaluation, evaluate_all
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.files import read_csv, reading
from supernet.space import SearchSpace

COLUMNS = ("stage", "slot", "option", "drop_loss", "drop_accuracy", "loss", "accuracy")
"""Of drops.csv. Stages and slots are counted from 1; no slot: a width; no stage: the base network."""
PAIR_COLUMNS = (
    "stage",
    "slot",
    "option",
    "second_slot",
    "second_option",
    "drop_loss",
    "drop_accuracy",
    "loss",
    "accuracy",
)
ADDITIVITY_COLUMNS = ("network", "changes", "predicted_loss", "loss")
LARGEST_ADVANTAGE = 100.0  # as log-odds: exp of it is still a number, with room for sums

Evaluate = Callable[[ArchConfig], Evaluation]
Tick = Callable[[float], None]


class Change(NamedTuple):
    """Another choice than the base's in one place, stage and slot counted from 0: a kind in a slot, or a stage's width."""

    stage: int
    slot: int | None
    option: str | int


Changes = tuple[Change, ...]


class Drop(NamedTuple):
    """What a change, or a pair, costs beyond what is known of smaller sets of changes; and the network that it was measured in.

    `drop_loss` in nats, `drop_accuracy` as a share of images; both above zero where the network is worse for it.
    """

    drop_loss: float
    drop_accuracy: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Drops:
    """A base network of a space, its loss and accuracy, and the drop of every single change; of pairs, where measured."""

    space: SearchSpace
    base: ArchConfig
    evaluation: Evaluation
    singles: Mapping[Change, Drop]
    pairs: Mapping[tuple[Change, Change], Drop]

    def evaluation_for(self, arch: ArchConfig) -> Evaluation:
        """Return loss and accuracy of a member of the space as the base's and the drops of its changes add up to."""
        changes = changes_of(self.space, self.base, arch)
        found = [self.singles[change] for change in changes]
        if self.pairs:
            found += [self.pairs[pair] for pair in itertools.combinations(changes, 2) if pair in self.pairs]
        loss = self.evaluation.loss + math.fsum(drop.drop_loss for drop in found)
        return Evaluation(loss, self.evaluation.accuracy - math.fsum(drop.drop_accuracy for drop in found))

    def sum_for(self, arch: ArchConfig) -> float:
        """Return the predicted loss (nats) of a member of the space: the base's and the drops of its changes."""
        return self.evaluation_for(arch).loss

    def advantages(self) -> list[dict[str, float]]:
        """Return, for every slot, each kind's advantage over identity: the loss with identity there minus that with it."""
        base = dict(zip(self.space.slots, _kinds(self.space, self.base), strict=True))

        def drop(stage: int, slot: int, kind: str) -> float:
            return 0.0 if base[stage, slot] == kind else self.singles[Change(stage, slot, kind)].drop_loss

        return [
            {k: drop(i, j, "identity") - drop(i, j, k) for k in self.space.stages[i].kinds if k != "identity"}
            for i, j in self.space.slots
        ]

    def importance(self) -> Importance:
        """Return the advantages as the log-odds that slimming takes: divided by their typical size, the median.

        That is the log-odds of a kind against identity where networks are drawn with probability exp(-loss / median). Each
        is less by the log of how many kinds its slot has: slimming adds the odds of a slot's kinds, and here that shall be
        their mean, as a slot with more candidates does not lose more when it is emptied.
        """
        advantages = self.advantages()
        sizes = [abs(value) for slot in advantages for value in slot.values()]
        scale = max(median(sizes), max(sizes) / LARGEST_ADVANTAGE) or 1.0
        return [{kind: value / scale - math.log(len(slot)) for kind, value in slot.items()} for slot in advantages]

    def save(self, path: Path) -> None:
        """Write `drops.csv`; and `pairs.csv` beside it where there are pairs."""
        base = Drop(0.0, 0.0, *self.evaluation)
        lines = [_record("", "", "base", drop=base), *(_record(*_text(c), drop=drop) for c, drop in self.singles.items())]
        write_csv(path, (dict(zip(COLUMNS, values, strict=True)) for values in lines), COLUMNS)
        beside = path.with_name("pairs.csv")
        if self.pairs:
            pairs = (_record(*_text(a), *_text(b)[1:], drop=drop) for (a, b), drop in self.pairs.items())
            write_csv(beside, (dict(zip(PAIR_COLUMNS, values, strict=True)) for values in pairs), PAIR_COLUMNS)
        else:
            beside.unlink(missing_ok=True)  # they would be of an earlier drops.csv

    @classmethod
    def load(cls, path: Path, space: SearchSpace) -> Drops:
        """Read what `save` wrote. The base network is what has no row: in each place one option has none.

        Raises:
            InputError: the file cannot be read, or is not of this space.
        """
        lines = _read(path, COLUMNS)
        with_stage = [line for line in lines if line["stage"]]
        if len(lines) - len(with_stage) != 1:
            raise InputError(f"{path} must have one row without a stage, that of the base network: write it anew")
        try:
            singles = {_change(line["stage"], line["slot"], line["option"]): _drop(line) for line in with_stage}
            (base,) = (_drop(line) for line in lines if not line["stage"])
        except ValueError as error:
            raise InputError(f"{path} cannot be read ({error}): write it anew") from error
        if len(singles) < len(with_stage):
            raise InputError(f"{path} has a change twice: write it anew")
        if not all(math.isfinite(drop.drop_loss) and math.isfinite(drop.loss) for drop in (base, *singles.values())):
            raise InputError(f"{path} has a loss that is no finite number: write it anew")
        choices = _choices(space)
        left = {at: [o for o in options if Change(*at, o) not in singles] for at, options in choices.items()}
        if any(len(o) != 1 for o in left.values()) or sum(map(len, choices.values())) != len(left) + len(singles):
            raise InputError(f"{path} is not of the space {space.name}: give the space that it was measured in")
        chosen = {at: options[0] for at, options in left.items()}
        widths = [int(chosen[i, None]) for i in range(len(space.stages))]
        kinds = [[str(chosen[i, j]) for j in range(stage.depth)] for i, stage in enumerate(space.stages)]
        pairs = {}
        beside = path.with_name("pairs.csv")
        with reading(str(beside), "remove it, or write it anew"):
            for entry in _read(beside, PAIR_COLUMNS) if beside.exists() else []:
                first = _change(entry["stage"], entry["slot"], entry["option"])
                second = _change(entry["stage"], entry["second_slot"], entry["second_option"])
                drop = pairs[first, second] = _drop(entry)
                if first not in singles or second not in singles or first == second or not math.isfinite(drop.drop_loss):
                    raise ValueError(f"{first} and {second} are no pair of its changes, or have no finite loss")
        return cls(space, space.arch(widths, kinds), Evaluation(base.loss, base.accuracy), singles, pairs)


def single_changes(space: SearchSpace, base: ArchConfig) -> list[Change]:
    """Return every change of the base network: stage by stage its other widths, then each slot's other candidates."""
    now: dict[tuple[int, int | None], str | int] = {(i, None): width for i, width in enumerate(base.widths)}
    for at, kind in zip(space.slots, _kinds(space, base), strict=True):
        now[at] = kind
    return [Change(*at, option) for at, options in _choices(space).items() for option in options if option != now[at]]


def changes_of(space: SearchSpace, base: ArchConfig, arch: ArchConfig) -> Changes:
    """Return what a member of the space has otherwise than the base, in the order of `single_changes`."""
    arch = space.fit(arch.without_mux())
    kinds = list(zip(space.slots, _kinds(space, base), _kinds(space, arch), strict=True))
    found: list[Change] = []
    for i, (was, width) in enumerate(zip(base.widths, arch.widths, strict=True)):
        if width != was:
            found.append(Change(i, None, width))
        found += [Change(i, j, kind) for (stage, j), before, kind in kinds if stage == i and kind != before]
    return tuple(found)


def completed(space: SearchSpace, base: ArchConfig, changes: Iterable[Change]) -> ArchConfig | None:
    """Return the network nearest to the base that has the changes: where token blocks would stand before map blocks, those
    that are not among the changes give way, as the module says. None where no network has all of the changes."""
    changes = tuple(changes)
    widths = list(base.widths)
    kinds = [[s.kind_of(block) for block in stage.blocks] for s, stage in zip(space.stages, base.stages, strict=True)]
    fixed = {(change.stage, change.slot) for change in changes}
    for change in changes:
        if change.slot is None:
            widths[change.stage] = int(change.option)
        else:
            kinds[change.stage][change.slot] = str(change.option)
    for i, j, kind in changes:
        form = _form(space, i, str(kind)) if j is not None else None
        if form is None:
            continue
        assert j is not None
        others = range(j + 1, len(kinds[i])) if form == "tokens" else range(j)
        for other in others:
            if (i, other) not in fixed and _form(space, i, kinds[i][other]) not in (None, form):
                kinds[i][other] = str(kind)
    arch = space.arch(widths, kinds)
    return arch if _kinds(space, arch) == [kind for stage in kinds for kind in stage] else None


def measure_drops(space: SearchSpace, base: ArchConfig, evaluate: Evaluate, on_progress: Tick | None = None) -> Drops:
    """Evaluate the base network and every single change of it; `len(single_changes(space, base)) + 1` networks.

    Args:
        evaluate: a network to its loss and accuracy, such as an Evaluator, or one that is Remembered, so that a kill costs
            nothing that was done.
        on_progress: called with 1 after each network.

    Raises:
        InputError: the base is not in the space, or a loss is no finite number.
    """
    base = space.fit(base.without_mux())
    base = replace(base, name=space.name)
    (evaluation,) = _evaluated(evaluate, [base], on_progress)
    none = Drops(space, base, evaluation, {}, {})
    changes = single_changes(space, base)
    found = _measured(none, [(change,) for change in changes], evaluate, on_progress)
    return Drops(space, base, evaluation, {change: found[change,] for change in changes}, {})


def pairs_to_measure(drops: Drops, count: int | None = None) -> list[tuple[Change, Change]]:
    """Return the pairs of changes inside a stage that some network has, in the order of `single_changes`.

    Of them the `count` with the smallest summed drops, which a search makes first; None: all.
    """
    pairs = []
    for first, second in itertools.combinations(single_changes(drops.space, drops.base), 2):
        if first.stage != second.stage or first.slot == second.slot:
            continue
        together = completed(drops.space, drops.base, (first, second))
        # Where one brings the other with it, the two are the network of a single drop.
        alone = [completed(drops.space, drops.base, (change,)) for change in (first, second)]
        if together is not None and together not in alone:
            pairs.append((first, second))
    cheapest = sorted(range(len(pairs)), key=lambda at: (sum(drops.singles[c].drop_loss for c in pairs[at]), at))
    return [pairs[at] for at in sorted(cheapest[:count])]


def measure_pairs(drops: Drops, evaluate: Evaluate, count: int | None = None, on_progress: Tick | None = None) -> Drops:
    """Return the drops with those of pairs inside a stage: `len(pairs_to_measure(drops, count))` more networks.

    Raises:
        InputError: a loss is no finite number.
    """
    pairs = pairs_to_measure(drops, count)
    found = _measured(replace(drops, pairs={}), pairs, evaluate, on_progress)
    return replace(drops, pairs={pair: found[pair] for pair in pairs})


def _measured(drops: Drops, terms: Sequence[Changes], evaluate: Evaluate, on_progress: Tick | None) -> dict[Changes, Drop]:
    """Return each term's drop: what its network loses beyond what the terms inside that network add up to."""
    networks: dict[Changes, ArchConfig] = {}
    for term in terms:
        network = completed(drops.space, drops.base, term)
        assert network is not None, f"no network has {term}"
        networks[term] = network
    evaluations = dict(zip(terms, _evaluated(evaluate, list(networks.values()), on_progress), strict=True))
    known: dict[Changes, Drop] = {(change,): drop for change, drop in drops.singles.items()}
    found: dict[Changes, Drop] = {}
    size = len(terms[0]) if terms else 0

    def inside(arch: ArchConfig) -> Iterator[Drop]:
        changes = changes_of(drops.space, drops.base, arch)
        for length in range(1, size + 1):
            yield from (known[part] for part in itertools.combinations(changes, length) if part in known)

    def changed(term: Changes) -> int:
        return len(changes_of(drops.space, drops.base, networks[term]))

    for term in sorted(terms, key=changed):  # smaller networks first: their terms are inside the larger ones
        evaluation, others = evaluations[term], list(inside(networks[term]))
        loss = evaluation.loss - drops.evaluation.loss - math.fsum(drop.drop_loss for drop in others)
        accuracy = drops.evaluation.accuracy - evaluation.accuracy - math.fsum(drop.drop_accuracy for drop in others)
        known[term] = found[term] = Drop(loss, accuracy, *evaluation)
    return found


def _evaluated(evaluate: Evaluate, archs: Sequence[ArchConfig], on_progress: Tick | None) -> list[Evaluation]:
    """Return the evaluations of networks, all at once.

    Raises:
        InputError: a loss is no finite number.
    """
    found = evaluate_all(evaluate, archs, on_progress)
    for arch, evaluation in zip(archs, found, strict=True):
        if not math.isfinite(evaluation.loss):
            raise InputError(f"evaluating {described(arch)} gives a loss of {evaluation.loss}: lower the learning rate")
    return found


class Additivity(NamedTuple):
    """How well the drops of single changes add up, on networks with several: the share of the measured losses' variance that
    a line on the predicted ones explains, Kendall's tau of the two, that line's slope, and a record for each network."""

    r_squared: float
    tau: float
    slope: float
    records: list[dict[str, object]]


def additivity(
    space: SearchSpace, drops: Drops, evaluate: Evaluate, count: int = 50, seed: int = 0, on_progress: Tick | None = None
) -> Additivity:
    """Compare prediction and evaluation on `count` random networks with at least two changes.

    They lie between the base and the smallest network: in each, a share of the places, drawn anew for each network, has
    another candidate than the base's, or another width. Of a space with fewer networks there are fewer.
    """
    networks = _random_networks(space, drops.base, count, seed)
    records: list[dict[str, object]] = []
    predicted = [drops.sum_for(arch) for arch in networks]
    losses = [evaluation.loss for evaluation in _evaluated(evaluate, networks, on_progress)]
    for arch, expected, loss in zip(networks, predicted, losses, strict=True):
        values = (described(arch), len(changes_of(space, drops.base, arch)), expected, loss)
        records.append(dict(zip(ADDITIVITY_COLUMNS, values, strict=True)))
    return Additivity(r_squared(predicted, losses), kendall_tau(predicted, losses), line(predicted, losses)[0], records)


def _random_networks(space: SearchSpace, base: ArchConfig, count: int, seed: int) -> list[ArchConfig]:
    rng = random.Random(seed)
    kinds = dict(zip(space.slots, _kinds(space, base), strict=True))
    found: dict[ArchConfig, None] = {}
    for _ in range(20 * count):
        share = rng.uniform(0, 1)
        widths = [
            rng.choice([w for w in stage.widths if w != width] or [width]) if rng.random() < share else width
            for stage, width in zip(space.stages, base.widths, strict=True)
        ]
        changed = [
            [
                rng.choice([k for k in stage.kinds if k != kinds[i, j]]) if rng.random() < share else kinds[i, j]
                for j in range(stage.depth)
            ]
            for i, stage in enumerate(space.stages)
        ]
        arch = space.arch(widths, changed)  # token blocks come last: it may have other changes than were drawn
        if len(changes_of(space, base, arch)) > 1:
            found[arch] = None
        if len(found) == count:
            break
    return list(found)


def _choices(space: SearchSpace) -> dict[tuple[int, int | None], tuple[str | int, ...]]:
    """Return the options of every place: a stage's widths, then the candidates of each of its slots."""
    found: dict[tuple[int, int | None], tuple[str | int, ...]] = {}
    for i, stage in enumerate(space.stages):
        found[i, None] = stage.widths
        found.update({(i, j): stage.kinds for j in range(stage.depth)})
    return found


def _kinds(space: SearchSpace, member: ArchConfig) -> list[str]:
    """Return the kind in every slot of a network that has all slots."""
    pairs = zip(space.stages, member.stages, strict=True)
    return [choices.kind_of(block) for choices, stage in pairs for block in stage.blocks]


def _form(space: SearchSpace, stage: int, kind: str) -> str | None:
    """Return whether a candidate works on tokens or on maps; None for identity."""
    choices = space.stages[stage]
    if kind == "identity":
        return None
    return "tokens" if choices.candidates[choices.kinds.index(kind)].tokens else "map"


def _text(change: Change) -> tuple[str, str, str]:
    slot = "" if change.slot is None else str(change.slot + 1)
    return str(change.stage + 1), slot, str(change.option)


def _record(*place: str, drop: Drop) -> tuple[str, ...]:
    return (*place, *map(repr, drop))  # repr gives back the same float when it is read


def _change(stage: str, slot: str, option: str) -> Change:
    return Change(int(stage) - 1, int(slot) - 1, option) if slot else Change(int(stage) - 1, None, int(option))


def _drop(row: Mapping[str, str]) -> Drop:
    return Drop(*(float(row[name]) for name in Drop._fields))


def _read(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    return read_csv(path, columns, "the file of drops", "write it anew")
