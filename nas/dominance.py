"""Which labels of a shortest path problem with several resources are not dominated. No torch.

A label has a node, costs and a loss, all whole numbers; one dominates another at the same node if it is worse in nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def efficient(node: Ints, costs: Ints, loss: Ints) -> NDArray[np.bool_]:
    """Return which labels are not dominated: no other of the same node costs and loses as little; of equal ones, one is kept.

    Exact for at most two costs. For more, some that are dominated are kept too.
    """
    match costs.shape[1]:
        case 0:
            return _lowest(node, (), loss)
        case 1:
            return _lowest(node, (costs[:, 0],), loss)
        case 2:
            return _undominated(node, costs[:, 0], costs[:, 1], loss)
    return _against_few(node, costs, loss)


def _lowest(node: Ints, by: tuple[Ints, ...], loss: Ints) -> NDArray[np.bool_]:
    """Return which labels have a lower loss than all that come before them in the order of `by`, node by node."""
    keep = np.zeros(len(node), bool)
    if not len(node):
        return keep
    order = _order(_with_node(node, by[0]), *by[1:], loss) if by else np.lexsort((loss, node))
    nodes = node[order]
    group = np.cumsum(np.append(False, nodes[1:] != nodes[:-1]))
    low = int(loss.min())
    # Each group lies wholly under the ones before, so that a running minimum begins anew with it.
    value = loss[order] - low - group * (int(loss.max()) - low + 1)
    running = np.minimum.accumulate(value)
    keep[order] = np.append(True, value[1:] < running[:-1])
    return keep


def _with_node(node: Ints, values: Ints) -> Ints:
    """Return keys that sort by node, then by value: both fit into 63 bits."""
    low = values.min()
    keys: Ints = node * (values.max() - low + 1) + (values - low)
    return keys


def _order(first: Ints, *others: Ints) -> Ints:
    """Return the order by the first key, then by the others: equal ones stay in theirs. numpy's lexsort does the same, and
    takes longer where few first keys are equal."""
    order = np.argsort(first)
    equal = first[order][1:] == first[order][:-1]
    tied = np.append(equal, False) | np.append(False, equal)
    among = order[tied]
    order[tied] = among[np.lexsort([among, *(key[among] for key in (*reversed(others), first))])]
    return order


def _undominated(node: Ints, first: Ints, second: Ints, loss: Ints) -> NDArray[np.bool_]:
    """The same for two costs: by divide and conquer over the ranks of the second, in the order of the first.

    Source of the idea: Kung, Luccio and Preparata, "On finding the maxima of a set of vectors" (Journal of the ACM 22, 1975).
    """
    size = len(node)
    if size < 2:
        return np.ones(size, bool)
    # Ranks, equal ones ordered so that what dominates comes first. Nodes ascend in one and descend in the other: no label is
    # before another node's in both.
    order = _order(_with_node(node, first), second, loss)
    rank = np.empty(size, np.int64)
    rank[_order(_with_node(node.max() - node, second), first, loss)] = np.arange(size)
    rank = rank[order]
    value = np.unique(loss[order], return_inverse=True)[1].astype(np.int64)
    dominated = np.zeros(size, bool)
    index = np.arange(size)
    for level in range((size - 1).bit_length() - 1, -1, -1):
        half = rank[index] >> level  # labels stand block by block (half >> 1), in each in the order of the first cost
        upper = (half & 1).astype(bool)
        masked = np.where(upper, size, value[index]) - (half >> 1) * (size + 1)
        running = np.minimum.accumulate(masked) + (half >> 1) * (size + 1)
        dominated[index[upper & (running <= value[index])]] = True
        # Split each block into its halves.
        below = np.cumsum(~upper)
        begin = (half >> 1) << (level + 1)
        before = below - ~upper - np.where(begin > 0, below[np.maximum(begin - 1, 0)], 0)  # lower ones before it in its block
        place = (half << level) + np.where(upper, np.arange(size) - begin - before, before)
        split = np.empty(size, np.int64)
        split[place] = index
        index = split
    keep = np.empty(size, bool)
    keep[order] = ~dominated
    return keep


def _against_few(node: Ints, costs: Ints, loss: Ints, few: int = 64) -> NDArray[np.bool_]:
    """Drop the labels that one of the `few` most efficient of their node dominates, and all but one of equal costs."""
    by = tuple(costs.T)
    order = np.lexsort((loss, *by, node))
    same = (node[order][1:] == node[order][:-1]) & (costs[order][1:] == costs[order][:-1]).all(axis=1)
    keep = np.ones(len(node), bool)
    keep[order[1:][same]] = False
    values = np.column_stack([costs, loss])
    relative = (values / np.maximum(np.abs(values).max(axis=0, initial=1), 1)).sum(axis=1)
    kept = np.flatnonzero(keep)
    kept = kept[np.lexsort((relative[kept], node[kept]))]
    groups = np.split(kept, np.flatnonzero(node[kept][1:] != node[kept][:-1]) + 1)
    for group in groups:
        alive = np.ones(len(group), bool)
        for at in range(min(few, len(group))):
            if alive[at]:
                worse = (values[group] >= values[group[at]]).all(axis=1)
                worse[at] = False
                alive &= ~worse
        keep[group[~alive]] = False
    return keep
