"""Load functions of the user that a setting names as MODULE:FUNCTION."""

import importlib
from collections.abc import Callable
from typing import Any

from common.errors import UserError


def load_function(key: str, name: str) -> Callable[..., Any]:
    """Return the function that the setting `key` names. Raise UserError if it cannot be imported.

    Python finds its module as for an import in train.py: beside train.py and in PYTHONPATH.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = f"module {error.name}" if error.name else str(error)
        raise UserError(
            f"{key}={name}: {missing} is not found; put it beside train.py or its folder into PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{key}={name}: importing {module_name} fails: {explain(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{key}={name}: {module.__file__ or module_name} has no function {function_name}")
    return function


def explain(error: BaseException) -> str:
    """Describe an exception of the user's code in one line, with the place where it was raised."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    where = f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})" if trace else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"
