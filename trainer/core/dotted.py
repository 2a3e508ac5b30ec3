"""Classes of installed packages that a config names by a dotted path.

Only what Python finds among its installed packages is imported, as any `import` would; nothing is
downloaded, and no file of the config's folder is run.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trainer.contract.errors import ConfigError, Problem
from trainer.contract.registry import nearest


def installed_class(path: str, base: type, key: str) -> type:
    """Return the class at a dotted path.

    Args:
        path: e.g. `torch.optim.NAdam`.
        base: what it must be a subclass of.
        key: of the config, for the error.

    Raises:
        ConfigError: there is no such package, module or class, it is not of `base`, or the package
            lies in the working directory instead of being installed.
    """
    module_name, _, name = path.rpartition(".")
    package = module_name.partition(".")[0]
    _require_installed(package, key)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise _error(f"{module_name} cannot be imported: {error}", key, "check the path") from error
    found = getattr(module, name, None)
    if not isinstance(found, type) or not issubclass(found, base):
        known = [
            other
            for other, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, base) and value is not base
        ]
        reason = "has no" if found is None else "has something else than a class of that kind as"
        raise _error(
            f"{module_name} {reason} {name}",
            key,
            nearest(name, known, otherwise=f"name a subclass of {base.__module__}.{base.__name__}"),
        )
    return found


def check_arguments(
    made_from: type, arguments: Mapping[str, Any], *, given: Collection[str], key: str
) -> None:
    """Compare arguments with the signature of a class.

    Args:
        made_from: the class.
        arguments: by name.
        given: names that are not the user's to set.
        key: of the config, for the errors.

    Raises:
        ConfigError: with each argument that the class does not take, or needs and does not get.
    """
    parameters = inspect.signature(made_from).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    named = [
        name
        for name, parameter in parameters.items()
        if parameter.kind not in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}
    ]
    ours = [name for name in named if name not in given]
    problems = [
        Problem(f"{name} is set by Menma", f"{key}.{name}", hint="leave it out")
        for name in arguments
        if name in given
    ]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        problems += [
            Problem(
                f"{made_from.__name__} takes no argument {name!r}",
                f"{key}.{name}",
                hint=nearest(name, ours),
            )
            for name in arguments
            if name not in named
        ]
    missing = [
        name
        for name in ours
        if parameters[name].default is inspect.Parameter.empty and name not in arguments
    ]
    # The first one is what the class works on, whatever its name is.
    problems += [
        Problem(
            f"{made_from.__name__} needs the argument {name!r}", key, hint=f"{key} = {{{name} = …}}"
        )
        for name in missing
        if name != next(iter(named), None)
    ]
    if problems:
        raise ConfigError(problems=problems)


def made(made_from: type, works_on: tuple[Any, ...], arguments: Mapping[str, Any], key: str) -> Any:
    """Return an object of a class whose arguments were checked by name.

    Raises:
        ConfigError: the class refuses their values.
    """
    try:
        return made_from(*works_on, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
        raise _error(
            f"{made_from.__name__} refuses its arguments: {error}", key, "see its documentation"
        ) from error


def _require_installed(package: str, key: str) -> None:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise _error(f"no package {package} is installed", key, f"pip install {package}")
    places = [Path(place).resolve() for place in spec.submodule_search_locations or ()]
    if spec.origin and Path(spec.origin).is_file():
        places.append(Path(spec.origin).resolve())
    here, prefix = Path.cwd().resolve(), Path(sys.prefix).resolve()
    for place in places:
        if place.is_relative_to(here) and not place.is_relative_to(prefix):
            raise _error(
                f"{package} is not installed, it lies in the working directory: {place}",
                key,
                "install it (pip install PATH), so that it is not run by accident",
            )


def _error(message: str, key: str, hint: str) -> ConfigError:
    return ConfigError(problems=[Problem(message, key, hint=hint)])
