"""One whole run of the tiny task, shared by every test that looks at results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TINY = Path(__file__).parent / "tiny" / "recipe.toml"


@dataclass(frozen=True)
class Run:
    """`out`: what the command line wrote; `report`: the content of report.json."""

    recipe: Path
    out: Path
    cache: Path
    report: dict[str, Any]

    def artifact(self, name: str = "tiny") -> Path:
        return self.out / "bench" / name


@pytest.fixture(scope="session")
def tiny_recipe() -> Path:
    return TINY


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    import json

    from compressor.cli import main

    folder = tmp_path_factory.mktemp("tiny")
    out, cache = folder / "out", folder / "cache"
    assert main(["compress", str(TINY), "--out", str(out), "--cache", str(cache)]) == 0
    return Run(TINY, out, cache, json.loads((out / "report.json").read_text()))
