"""The page on LIME says only what runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "lime.md"


def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(code, "lime.md", "exec"), names)
    assert (tmp_path / "bars.png").exists()
    assert names["found"].stability.seeds == 3
    assert names["words"].top(1)[0]["feature"] == "good"
    assert names["parts"].coefficients.shape == (2, 16)
