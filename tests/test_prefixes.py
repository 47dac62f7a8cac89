"""Networks that begin alike share what is computed, in an order and with a memory that keep the computing low."""

import random
from collections.abc import Sequence

from small_spaces import stage_space

from nas.prefixes import PrefixCache, Tree, cheapest_order, shares
from supernet.arch import ArchConfig
from supernet.space import SearchSpace

SPACE = SearchSpace(
    "small",
    16,
    3,
    (
        stage_space((8, 16), 1, 3, "mb4d", "identity"),
        stage_space((8, 16, 24), 2, 4, "mb4d", "mb3d", "identity"),
    ),
)


def sampled(number: int, seed: int = 0) -> list[ArchConfig]:
    rng = random.Random(seed)
    return list(dict.fromkeys(SPACE.sample(rng) for _ in range(number)))


def nodes_of(tree: Tree, archs: Sequence[ArchConfig]) -> list[list[int]]:
    return [tree.nodes(SPACE.fit(arch).named_layers()) for arch in archs]


def layers_run(archs: Sequence[ArchConfig], kept_bytes: int, batch: int, ordered: bool = True) -> int:
    """How many layers are computed where a node has one byte."""
    tree, run = Tree(), 0
    cache: PrefixCache[None] = PrefixCache(tree, kept_bytes)
    for first in range(0, len(archs), batch):
        networks = nodes_of(tree, archs[first : first + batch])
        order = cheapest_order(networks) if ordered else list(range(len(networks)))
        cache.begin([networks[at] for at in order])
        for place, at in enumerate(order):
            start, _ = cache.longest(networks[at], place)
            for node in networks[at][start:]:
                run += not tree.is_free(node)
                cache.keep(node, None, 1)
            assert len(cache) == cache.bytes <= kept_bytes
    return run


def test_networks_share_the_nodes_of_what_they_begin_with() -> None:
    tree = Tree()
    one = SPACE.arch((16, 24), (("mb4d",) * 3, ("mb4d", "mb4d", "mb3d", "mb3d")))
    other = SPACE.arch((16, 24), (("mb4d",) * 3, ("mb4d", "mb4d", "mb4d", "mb3d")))
    empty = SPACE.arch((16, 24), (("mb4d", "identity", "mb4d"), ("mb4d", "mb4d", "mb4d", "mb3d")))
    first, second, third = nodes_of(tree, (one, other, empty))
    # stem, three blocks, embedding, two blocks, then a flat or a third block
    assert [a == b for a, b in zip(first, second, strict=True)] == [True] * 7 + [False] * (len(first) - 7)
    assert [a == b for a, b in zip(first, third, strict=False)][:3] == [True, True, False]
    assert not set(first[2:]) & set(third)
    assert [tree.is_free(node) for node in first] == [False] * 7 + [True] + [False] * 3  # flat
    # All of the first; from the third block of its stage on of the second; all but stem and block of the last.
    assert tree.layers() == 10 + 3 + 7


def test_the_cheapest_order_needs_few_nodes_at_once_to_compute_nothing_twice() -> None:
    archs = sampled(200)
    tree = Tree()
    networks = nodes_of(tree, archs)
    assert sorted(cheapest_order(networks)) == list(range(len(archs)))
    # The 200 networks can be halved less than 8 times; one more for the node that is being left.
    assert layers_run(archs, 9, len(archs)) == tree.layers()
    assert layers_run(archs, 9, len(archs), ordered=False) > 1.3 * tree.layers()


def test_a_network_may_be_deeper_than_python_s_stack() -> None:
    deep, other = [*range(1, 5001)], [*range(1, 4000), *range(5001, 5003)]
    assert cheapest_order([deep, other]) == [1, 0], "the longest way last"


def test_with_room_for_all_nothing_is_computed_twice_whatever_is_asked_for_when() -> None:
    archs = sampled(100)
    tree = Tree()
    nodes_of(tree, archs)
    for batch in (1, 7):
        assert layers_run(archs, 10_000, batch) == tree.layers()
        assert layers_run(archs, 0, batch) == sum(
            sum(not tree.is_free(node) for node in nodes) for nodes in nodes_of(tree, archs)
        )


def test_of_a_chain_that_does_not_fit_nodes_stay_that_lie_apart() -> None:
    tree = Tree()
    (nodes,) = nodes_of(tree, [SPACE.arch((16, 24), (("mb4d",) * 3, ("mb4d",) * 4))])
    cache: PrefixCache[int] = PrefixCache(tree, 3)
    cache.begin([nodes])
    for place, node in enumerate(nodes[:-1], 1):  # stem, 3, embedding, 4
        cache.keep(node, place, 1)
    kept = sorted(cache.values())
    assert len(kept) == 3
    assert max(b - a for a, b in zip([0, *kept], [*kept, len(nodes)], strict=True)) < len(nodes) - 3  # never the last three


def test_what_later_networks_of_the_batch_begin_with_stays() -> None:
    tree = Tree()
    archs = [SPACE.arch((16, 24), (("mb4d",) * 3, ("mb4d", "mb4d", "mb4d", kind))) for kind in ("mb4d", "mb3d", "identity")]
    networks = nodes_of(tree, archs)
    cache: PrefixCache[int] = PrefixCache(tree, 1)
    cache.begin(networks)
    cache.keep(networks[0][7], 7, 1)
    cache.keep(networks[0][8], 8, 1)  # of the first network alone
    assert cache.values() == [7]
    assert cache.longest(networks[2], 2) == (8, 7)


def test_processes_get_neighbours_and_about_equal_work() -> None:
    archs = sampled(120)
    tree = Tree()
    networks = nodes_of(tree, archs)
    whole = layers_run(archs, 10_000, len(archs))
    for number in (1, 2, 5):
        divided = shares(networks, number)
        assert sorted(at for share in divided for at in share) == list(range(len(archs)))
        work = [layers_run([archs[at] for at in share], 10_000, len(archs)) for share in divided]
        assert max(work) < 1.25 * sum(work) / number
        assert sum(work) < 1.1 * whole  # little that two of them compute
    assert shares(networks[:1], 3) == [[], [0], []]
    assert shares([], 2) == [[], []]
