"""Libraries that are missing, or in versions that nobody has tested."""

from importlib import metadata

import pytest

from replearn_kernels.integrations.versions import require


@pytest.mark.parametrize("found", ["3.0", "3.0.0", "3.9.1", "3.10", "3.10.2.dev1"])
def test_in_the_range(monkeypatch, found):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    require("open_clip_torch", "3.0", "4")


@pytest.mark.parametrize("found", ["2.32.0", "4.0", "4.0.1", "10.0"])
def test_out_of_the_range(monkeypatch, found):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    with pytest.raises(ImportError, match=f"open_clip_torch >= 3.0, < 4, and {found} is installed: pip install '"):
        require("open_clip_torch", "3.0", "4")


def test_not_installed():
    with pytest.raises(ImportError, match="takes no-such-library >= 1, < 2, which is not installed: pip install"):
        require("no-such-library", "1", "2")
