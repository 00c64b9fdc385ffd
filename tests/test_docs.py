"""The code in the documents, run block after block."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"


def blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)


PRINTED = {
    "declare.md": "def weights(s, row, column, inputs):",
    "retrieval.md": "'queries': 2000, 'skipped': 0}",
    "verification.md": "7000 pairs of one label, 1992000 of different ones",
}


@pytest.mark.parametrize("name, count", [("declare.md", 11), ("retrieval.md", 4), ("verification.md", 5)])
def test_code_runs(name, count, capsys):
    torch.manual_seed(0)
    names: dict = {"__name__": "page"}
    assert len(blocks(name)) == count
    for number, block in enumerate(blocks(name)):
        exec(compile(block, f"{name}, block {number}", "exec"), names)
    assert PRINTED[name] in capsys.readouterr().out
