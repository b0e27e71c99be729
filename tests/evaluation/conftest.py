"""Tests here name files relative to the repository."""

import pytest

from tests.tiny import ROOT


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
