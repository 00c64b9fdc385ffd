"""Prints a file of pinned requirements, without triton where this Python's torch has its own.

    python requirements_beside_torch.py requirements.txt

A CUDA build of torch compiles with the triton that it was tested with and names; another one in its place breaks it.
"""

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path


def has_own_triton() -> bool:
    """Whether torch names its triton, or, as builds in containers do, came with one unnamed."""
    required = importlib.metadata.requires("torch") or []
    if any(re.match(r"(pytorch[-_])?triton\b", requirement) for requirement in required):
        return True
    import torch

    return bool(torch.version.cuda or torch.version.hip) and importlib.util.find_spec("triton") is not None


def main(path: str) -> None:
    lines = Path(path).read_text().splitlines()
    own = has_own_triton()
    print(*(line for line in lines if not (own and line.startswith("triton"))), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])
