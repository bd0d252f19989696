"""The census rows that come with nannyml, as numbers: argv = site-packages, file to write. Needs pyarrow."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

LEFT_OUT = ("id", "year", "employed", "prediction")


def numbers(table, name):
    """A numeric column as it is; a coded one as its codes."""
    column = table.column(name)
    values = column.to_pylist()
    return np.array([np.nan if value is None or value == "" else float(value) for value in values])


def main() -> None:
    folder = Path(sys.argv[1]) / "nannyml/datasets/data"
    before = pq.read_table(folder / "employment_MA_reference.pq")
    after = pq.read_table(folder / "employment_MA_analysis.pq")
    truth = pq.read_table(folder / "employment_MA_analysis_target.pq")
    names = [name for name in after.schema.names if name not in LEFT_OUT]
    stacked = [np.stack([numbers(table, name) for name in names], axis=1) for table in (before, after)]
    right_before = numbers(before, "prediction") == numbers(before, "employed")
    assert (numbers(after, "id") == numbers(truth, "id")).all()
    right_after = numbers(after, "prediction") == numbers(truth, "employed")
    np.savez(
        sys.argv[2], names=np.array(names), reference=stacked[0], later=stacked[1],
        accuracy=np.array([right_before.mean(), right_after.mean()]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
