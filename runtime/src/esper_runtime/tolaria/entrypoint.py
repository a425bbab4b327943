"""Calls the user's `build`, and says what is wrong with it in the user's own frames."""

import importlib
import re
import sys
import sysconfig
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper_leyline.reasons import RunReason

from esper_runtime.workload import ConfigError, Workload

MAX_MESSAGE = 1800
_OURS = str(Path(__file__).resolve().parents[1])


class UserCodeError(Exception):
    """The user's code cannot be used. `reason` goes into the run's status, the message to its reader."""

    def __init__(self, reason: RunReason, message: str) -> None:
        super().__init__(message[-MAX_MESSAGE:])
        self.reason = reason


def load(entrypoint: str, config: Mapping[str, Any], *, code_dir: Path | None = None) -> Workload:
    """The workload that `package.module:function` builds from `config`. UserCodeError otherwise."""
    build = find(entrypoint, code_dir=code_dir)
    try:
        built = build(config)
    except ConfigError as error:
        raise UserCodeError(error.reason, str(error)) from error
    except Exception as error:
        raise UserCodeError(RunReason.USER_CODE_ERROR, f"{entrypoint} raised:\n{shortened(error)}") from error
    if not isinstance(built, Workload):
        raise UserCodeError(
            RunReason.ENTRYPOINT_WRONG_TYPE,
            f"{entrypoint} returned {type(built).__name__}; it must return esper_runtime.workload.Workload",
        )
    return built


def find(entrypoint: str, *, code_dir: Path | None = None) -> Any:
    """The function itself, its module imported but nothing of it called. UserCodeError otherwise."""
    if code_dir is not None and str(code_dir) not in sys.path:
        sys.path.insert(0, str(code_dir))
    module_name, _, function_name = entrypoint.partition(":")
    if not module_name or not function_name:
        raise UserCodeError(
            RunReason.ENTRYPOINT_NOT_FOUND,
            f"runtime.entrypoint {entrypoint!r} is not of the form package.module:function",
        )
    return _function(entrypoint, module_name, function_name)


def _function(entrypoint: str, module_name: str, function_name: str) -> Any:
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        how = (
            f"there is no module {error.name}; is it in the image, or in runtime.codeConfigMapName?"  # type: ignore[union-attr]
            if missing
            else shortened(error)
        )
        raise UserCodeError(
            RunReason.ENTRYPOINT_NOT_FOUND, f"runtime.entrypoint {entrypoint!r} does not import: {how}"
        ) from error
    except Exception as error:
        raise UserCodeError(
            RunReason.USER_CODE_ERROR, f"runtime.entrypoint {entrypoint!r} raised on import:\n{shortened(error)}"
        ) from error
    function = getattr(module, function_name, None)
    if function is None:
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UserCodeError(
            RunReason.ENTRYPOINT_NOT_FOUND,
            f"module {module_name} has no {function_name!r}; it has {', '.join(sorted(known)[:10]) or 'no functions'}",
        )
    if not callable(function):
        raise UserCodeError(
            RunReason.ENTRYPOINT_WRONG_TYPE,
            f"{entrypoint} is a {type(function).__name__}; it must be a function (config) -> Workload",
        )
    return function


def shortened(error: BaseException) -> str:
    """The user's own frames, at most the last eight, then the error.

    Left out are Esper, Python, and installed packages; where the user's code is itself installed, only torch is. The
    frames of a data loader's worker are in the text of the error that torch makes of them: they are sifted too.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _foreign(frame.filename)]
    own = [frame for frame in frames if _PACKAGES not in frame.filename] or frames
    said = _sifted("".join(traceback.format_exception_only(error)))
    return ("".join(traceback.format_list(own[-8:])) + said).strip()[-MAX_MESSAGE:]


_PACKAGES = "/site-packages/"
_STDLIB = sysconfig.get_paths()["stdlib"]
_FRAME = re.compile(r'^  File "([^"]+)", line \d+, in .*\n(?:    .*\n)*', re.MULTILINE)
"""As traceback prints it."""


def _foreign(file: str) -> bool:
    if file.startswith((_OURS + "/tolaria", "<frozen")):
        return True
    return f"{_PACKAGES}torch" in file if _PACKAGES in file else file.startswith(_STDLIB)


def _sifted(text: str) -> str:
    """Without frames of others, where a traceback is part of the text."""
    return _FRAME.sub(lambda frame: "" if _foreign(frame[1]) or _PACKAGES in frame[1] else frame[0], text)
