"""Tracebacks of user code, when that code is itself an installed package."""

import importlib.util
import sys
from pathlib import Path

import pytest
from esper_runtime.tolaria.entrypoint import shortened


def test_code_that_is_installed_keeps_its_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "lib" / "site-packages" / "theirs.py"
    package.parent.mkdir(parents=True)
    package.write_text("import json\n\n\ndef build(config):\n    return json.loads('{')\n")
    spec = importlib.util.spec_from_file_location("theirs", package)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "theirs", module)
    spec.loader.exec_module(module)
    try:
        call(module.build)
    except ValueError as error:
        both = shortened(error)
        error.__traceback__ = error.__traceback__.tb_next.tb_next  # type: ignore[union-attr]
        alone = shortened(error)
    assert f'File "{__file__}"' in both
    assert "theirs.py" not in both, "frames of packages are noise where there are others"
    assert f'File "{package}", line 5, in build' in alone
    assert "json/decoder.py" not in alone


def call(build):
    return build({})


def test_no_frame_at_all_is_no_error_of_its_own():
    assert shortened(ValueError("plain")) == "ValueError: plain"
