"""Which networks begin with the same layers, in which order to evaluate them, and what of their activations to keep. No torch.

The beginnings of networks form a tree: its root is the image, and a node is everything from the image up to one layer. What
was computed at a node serves every network that goes through it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from supernet.specs import Flat, Layer, Unflat

Value = TypeVar("Value")
Nodes = Sequence[int]
"""A network's nodes, one a layer, from the first to the last. Networks that begin alike have the same numbers up to there."""

ROOT = 0


class Tree:
    """The beginnings of all networks that it was asked for, numbered."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, str, Layer], int] = {}
        self._parents = [ROOT]
        self._free = [True]

    def nodes(self, named: Iterable[tuple[str, Layer]]) -> list[int]:
        """Return the nodes of a network's layers (`ArchConfig.named_layers`)."""
        found, parent = [], ROOT
        for name, layer in named:
            node = self._numbers.setdefault((parent, name, layer), len(self._parents))
            if node == len(self._parents):
                self._parents.append(parent)
                self._free.append(isinstance(layer.spec, Flat | Unflat))
            found.append(node)
            parent = node
        return found

    def is_free(self, node: int) -> bool:
        """Whether the node's layer only looks at its input in another shape: it is no work, and what it returns is not kept."""
        return self._free[node]

    def layers(self) -> int:
        """Return how many layers must be computed for all networks so far if nothing is computed twice."""
        return self._free.count(False)

    def layers_since(self, node: int, kept: Iterable[int]) -> int:
        """Return how many layers it takes to come to a node from the last one before it that is among `kept`."""
        layers = 0
        while node != ROOT:
            layers += not self._free[node]
            node = self._parents[node]
            if node in kept:
                break
        return layers


def cheapest_order(networks: Sequence[Nodes]) -> list[int]:
    """Return the places of networks in the order in which the fewest activations have to be kept at once to compute nothing
    twice.

    Depth first, at each node the largest subtree last: when that is entered, the node itself is no longer needed. So of the
    nodes before the present one, no more are needed than the number of networks can be halved.
    """
    children: dict[int, dict[int, None]] = {}
    ends: dict[int, list[int]] = {}
    for place, nodes in enumerate(networks):
        for parent, node in zip((ROOT, *nodes), nodes, strict=False):
            children.setdefault(parent, {})[node] = None
        ends.setdefault(nodes[-1] if nodes else ROOT, []).append(place)
    sizes: dict[int, int] = {}
    for node in sorted({ROOT, *(node for nodes in networks for node in nodes)}, reverse=True):  # children have larger numbers
        sizes[node] = 1 + sum(sizes[child] for child in children.get(node, ()))
    order: list[int] = []
    waiting = [ROOT]
    while waiting:
        node = waiting.pop()
        order += ends.get(node, ())
        waiting += sorted(children.get(node, ()), key=lambda child: sizes[child])[::-1]
    return order


def shares(networks: Sequence[Nodes], number: int) -> list[list[int]]:
    """Divide networks among processes: return the places that each of them gets.

    Neighbours in the cheapest order stay together, so that a process computes what its own networks have in common once. Each
    has about as many layers to compute.
    """
    order = cheapest_order(networks)
    costs, before = [], ()  # type: list[int], Nodes
    for place in order:
        nodes = networks[place]
        common = sum(a == b for a, b in zip(before, nodes, strict=False))  # nodes are equal up to one place and not after it
        costs.append(len(nodes) - common)
        before = nodes
    found: list[list[int]] = [[] for _ in range(number)]
    total, done = sum(costs), 0
    for place, cost in zip(order, costs, strict=True):
        middle = (done + cost / 2) / total if total else 0.0
        found[min(number - 1, int(middle * number))].append(place)
        done += cost
    return found


class PrefixCache(Generic[Value]):
    """Activations at nodes, of `memory_bytes` in all at most.

    When there is no room, that goes first which no network of the batch at hand begins with any more; of those what saves the
    fewest layers a byte, and the longer its last batch is past the less it counts, by the square of the batches. So of a chain
    that does not fit some nodes stay that lie apart, rather than the last ones.
    """

    def __init__(self, tree: Tree, memory_bytes: int) -> None:
        self.tree = tree
        self.memory_bytes = memory_bytes
        self.bytes = 0
        self._kept: dict[int, tuple[Value, int]] = {}
        self._used: dict[int, int] = {}  # the last batch with a network that goes through a node
        self._last: dict[int, int] = {}  # the last network of the batch at hand that does
        self._batch = 0
        self._place = 0

    def __len__(self) -> int:
        return len(self._kept)

    def values(self) -> list[Value]:
        """Return what is kept."""
        return [value for value, _ in self._kept.values()]

    def begin(self, batch: Sequence[Nodes]) -> None:
        """Say which networks come next, in their order."""
        self._batch += 1
        self._last = {node: place for place, nodes in enumerate(batch) for node in nodes}
        self._used.update(dict.fromkeys(self._last, self._batch))
        self._place = 0

    def longest(self, nodes: Nodes, place: int = 0) -> tuple[int, Value | None]:
        """Return how many of the first layers of the network at this place in the batch need not be computed, the last layer
        aside, and their activations; 0 and None where nothing is kept of them."""
        self._place = place
        for length in range(len(nodes) - 1, 0, -1):
            if nodes[length - 1] in self._kept:
                return length, self._kept[nodes[length - 1]][0]
        return 0, None

    def keep(self, node: int, value: Value, size: int) -> None:
        """Keep the activations of a node, of `size` bytes, if there is room for them or they are worth more than others."""
        if self.tree.is_free(node) or size > self.memory_bytes or node in self._kept:
            return
        self._kept[node] = value, size
        self.bytes += size
        while self.bytes > self.memory_bytes:
            least = min(self._kept, key=self._worth)
            self.bytes -= self._kept.pop(least)[1]

    def _worth(self, node: int) -> tuple[bool, float]:
        age = 1 + self._batch - self._used.get(node, 0)
        saved = self.tree.layers_since(node, self._kept)
        return self._last.get(node, -1) > self._place, saved / (self._kept[node][1] + 1) / age**2
