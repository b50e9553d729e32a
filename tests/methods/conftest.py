"""What methods learn is looked at in numbers: curves are drawn, and tested, elsewhere, and take longer than these runs."""

import pytest


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genpolicy.evaluation.curves.figures", lambda folder: None)
