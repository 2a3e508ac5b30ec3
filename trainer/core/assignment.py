"""The linear assignment problem: each row gets a column of its own, at the least cost in all.

Shortest augmenting paths with dual prices (Jonker and Volgenant, Computing 38, 1987; for more
columns than rows Crouse, doi:10.1109/TAES.2016.140952). O(rows² · columns), for what is small.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def assign(costs: NDArray[np.float64]) -> list[int]:
    """Return the column of each row, all different, so that the sum of their costs is the least.

    Args:
        costs: (rows, columns), finite, not more rows than columns.

    Raises:
        ValueError: there are more rows than columns.
    """
    rows, columns = costs.shape
    if rows > columns:
        raise ValueError(f"{rows} rows cannot have columns of their own among {columns}")
    row_of = np.full(columns, -1)
    price = np.zeros(columns)
    for row in range(rows):
        _give_a_column(costs, row, row_of, price)
    chosen = [0] * rows
    for column in np.flatnonzero(row_of >= 0):
        chosen[row_of[column]] = int(column)
    return chosen


def _give_a_column(
    costs: NDArray[np.float64], row: int, row_of: NDArray[np.int_], price: NDArray[np.float64]
) -> None:
    """Add a row to an assignment that is the best one of the rows before it.

    Args:
        costs: of all rows and columns.
        row: that has none yet.
        row_of: the row of each column, -1: none; changed.
        price: of each column; a row's columns are compared by cost minus price; changed.
    """
    columns = costs.shape[1]
    length = np.full(columns, np.inf)
    """Of the shortest path to each column that is known so far."""
    before = np.full(columns, -1)
    """The column in front of it on that path; -1: the path begins with it."""
    done = np.zeros(columns, dtype=bool)
    here, so_far, at = row, 0.0, -1
    while True:
        # Along the columns of `here`: how much worse each is than the one that it has.
        reduced = costs[here] - price
        own = reduced[at] if at >= 0 else 0.0
        reached = so_far + (reduced - own)
        shorter = ~done & (reached < length)
        length[shorter] = reached[shorter]
        before[shorter] = at
        at = int(np.where(done, np.inf, length).argmin())
        so_far = length[at]
        done[at] = True
        if row_of[at] < 0:
            break
        here = int(row_of[at])
    price[done] += length[done] - so_far
    while before[at] >= 0:
        row_of[at] = row_of[before[at]]
        at = int(before[at])
    row_of[at] = row
