"""A sample of the campaigns, so that they stay runnable."""

from __future__ import annotations

import shutil

import pytest

from tests.campaign.bad_inputs import GOOD, build, cases, digest, outcome


@pytest.mark.slow
def test_a_sample_of_bad_inputs(tmp_path, monkeypatch):
    at = build(tmp_path)
    monkeypatch.chdir(tmp_path)
    before, every = digest(tmp_path), list(cases(at))
    assert len(every) > 1000
    for name, words in every[7::67]:
        scratch = tmp_path / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        shutil.copytree(at["sparse"], scratch / "sparse")
        places = {"OUT": str(scratch / "out"), "SPARSE": str(scratch / "sparse")}
        kind, said = outcome([places.get(word, word) for word in words])
        assert kind == "refused" or (kind == "accepted" and name in GOOD), (name, kind, said)
        assert digest(tmp_path) == before, name
