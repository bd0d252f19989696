"""What the differential tests share: one service behind the plan cache, and the same behind the parser alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.models import engine_plan, floor_plan, guard_plan, service_plan
from tests.wires import Side


@pytest.fixture(scope="module", params=["plain", "guarded"])
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Side, Side]]:
    """(with plans, without)"""
    folder = tmp_path_factory.mktemp("sides")
    engines = (
        engine_plan(folder, "wrist", trouble="nan"),
        engine_plan(folder, "wrist-accel", scale=2.0),
        floor_plan(),
    )
    plan = service_plan(*engines, guard=guard_plan() if request.param == "guarded" else None)
    cached, strict = Side(plan, cached=True), Side(plan, cached=False)
    yield cached, strict
    assert len(cached.server.plans) > 0  # else nothing was tested
    cached.close()
    strict.close()
