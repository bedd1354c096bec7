"""The Python of README and docs runs as it is printed, and so do the commands of some pages."""

import re
import shlex
from pathlib import Path

import pytest
from test_cli import run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=lambda page: page.name)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a page in one namespace, as a later one may use what an earlier one made."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for snippet in snippets(page):
        if "import torchvision" in snippet:
            pytest.importorskip("torchvision", reason="torchvision is not installed")
        exec(compile(snippet, f"a snippet of {page.name}", "exec"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["compress", "l2", "kd", "fitnets", "fsp", "anc"])
def test_commands_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a page, one after the other, as each reads what the ones before wrote."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / f"{page}.md").read_text()
    commands = re.findall(r"^    nncx (.*)$", text, re.M)
    assert commands
    for command in commands:
        result = run(*shlex.split(command))
        assert result.exit_code == 0, f"nncx {command}\n{result.output}"
