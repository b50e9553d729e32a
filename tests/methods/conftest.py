"""Draws no curves in the tests of methods: they are tested elsewhere, and take longer than runs."""

import pytest


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genpolicy.evaluation.curves.figures", lambda folder: None)
