"""Components: names, or names with arguments, as functions and specs."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, get_type_hints

import llm_distill
from llm_distill.errors import InputError
from llm_distill.recipe.values import Place, convert, did_you_mean, kind_of

FIELDS = {
    "also": "llm_distill.layers",
    "balance": "llm_distill.balance",
    "heads": "llm_distill.heads",
    "keep": "llm_distill.cache.estimators",
    "layers": "llm_distill.layers",
    "loss": "llm_distill.losses",
    "projector": "llm_distill.projectors",
    "weight": "llm_distill.schedules",
}
"""Whose functions a field offers."""

MEASURED = ("cross", "race", "similarity")
"""Arguments of layer strategies that data decide; `blocks` and `epoch` can be written as well."""

_FOREIGN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclasses.dataclass(frozen=True)
class Components:
    """Makes components; it is the `make` of `convert`.

    Attributes:
        allowed: Modules and packages outside of llm_distill that a recipe may name.
        makers: Of what a type hint asks for by a protocol: (value, self, place).
    """

    allowed: Sequence[str] = ()
    makers: Mapping[type, Callable[..., Any]] = dataclasses.field(default_factory=dict)

    def __call__(self, value: Any, hint: Any, place: Place) -> Any:  # noqa: ANN401  any component
        """What a recipe names, checked against its type hint.

        Raises:
            InputError: For an unknown name, one that does not fit, or arguments it does not take.
        """
        if hint in self.makers:
            return self.makers[hint](value, self, place)
        wants_function = kind_of(hint) == "function"
        if not wants_function and not is_spec(hint):
            raise InputError(
                f"{place}: {hint.__name__} cannot be written in a recipe; leave it out"
            )
        self._refuse_nameless(value, place)
        name, arguments = split(value, place)
        found, here = self.find(name, place), place.key(name)
        if wants_function:
            if not inspect.isfunction(found):
                raise InputError(f"{place}: {name!r} is no function; {_offer(place)}")
            if FIELDS.get(place.field) == FIELDS["layers"]:
                _refuse_measured(arguments, here)
            return self._function(found, arguments, here)
        if not (inspect.isclass(found) and issubclass(found, hint) and is_spec(found)):
            raise InputError(f"{place}: {name!r} is no {hint.__name__}; {_offer(place, hint)}")
        return self.spec(found, arguments, place, here)

    def _refuse_nameless(self, value: Any, place: Place) -> None:  # noqa: ANN401  any YAML
        """Refuse an argument without its name, with the name that it probably has.

        Raises:
            InputError: Saying how it would be written.
        """
        if isinstance(value, list) and place.field == "layers":
            raise InputError(
                f"{place}: {value!r} is no component; write {{explicit: {{pairs: …}}}}"
            )
        if not isinstance(value, dict) or len(value) != 1:
            return
        ((name, argument),) = value.items()
        if argument is None or isinstance(argument, dict):
            return
        found = self.find(name, place)
        known = inspect.signature(found).parameters.values() if inspect.isfunction(found) else ()
        settings = [p for p in known if _is_setting(p) and p.name not in MEASURED]
        settings.sort(key=lambda p: p.default is not p.empty)  # what must be given first
        if settings:
            raise InputError(
                f"{place.key(name)}: {argument!r} has no name; write {name}: "
                f"{{{settings[0].name}: {argument}}}"
            )

    def find(self, name: str, place: Place) -> Any:  # noqa: ANN401  any function or class
        """What a name stands for at a place.

        Raises:
            InputError: For an unknown name, or foreign code that is not allowed.
        """
        home = FIELDS.get(place.field)
        if home is not None and name in _functions(home):
            return vars(import_module(home))[name]
        if ":" in name:
            return self._foreign(name, place)
        if home is None and name in llm_distill.__all__:
            return getattr(llm_distill, name)
        known = _functions(home) if home else llm_distill.__all__
        near = did_you_mean(name, known)
        where = home or "llm_distill"
        raise InputError(f"{place}: no {name!r} in {where}{near or f'; it has {_listed(known)}'}")

    def spec(self, kind: type, arguments: Mapping[str, Any], place: Place, here: Place) -> Any:  # noqa: ANN401  of `kind`
        """A dataclass called with checked fields.

        Args:
            kind: The dataclass.
            arguments: What the recipe gives.
            place: Where the component stands.
            here: Where its arguments stand.

        Raises:
            InputError: For unknown, missing or refused values.
        """
        values = self.fields(kind, arguments, here)
        missing = [
            field.name
            for field in dataclasses.fields(kind)
            if field.init
            and field.name not in values
            and field.default is field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise InputError(f"{here}: {_listed(missing)} is missing")
        try:
            return kind(**values)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{place}: {error}") from error

    def fields(self, kind: type, arguments: Mapping[str, Any], here: Place) -> dict[str, Any]:
        """Values for fields of a dataclass, checked by its type hints.

        Raises:
            InputError: For fields it does not have, and values of other types.
        """
        hints = _hints(kind)
        known = [field.name for field in dataclasses.fields(kind) if field.init]
        _refuse_unknown(arguments, known, kind.__name__, here)
        return {k: convert(v, hints.get(k, Any), here.key(k), self) for k, v in arguments.items()}

    def _function(
        self, function: Callable[..., Any], arguments: Mapping[str, Any], here: Place
    ) -> Callable[..., Any]:
        """A function with its settings bound; itself where there are none."""
        hints, parameters = _hints(function), inspect.signature(function).parameters.values()
        settings = {p.name: p for p in parameters if _is_setting(p)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            _refuse_unknown(arguments, list(settings), function.__name__, here)
        values = {k: convert(v, hints.get(k, Any), here.key(k), self) for k, v in arguments.items()}
        # What no recipe could write, such as a tensor, is what the objective gives.
        missing = [
            name
            for name, parameter in settings.items()
            if parameter.default is parameter.empty
            and name not in values
            and kind_of(hints.get(name, Any)) != "class"
        ]
        if missing:
            example = ", ".join(f"{name}: …" for name in missing)
            raise InputError(f"{here} needs {_listed(missing)}: {function.__name__}: {{{example}}}")
        return partial(function, **values) if values else function

    def _foreign(self, name: str, place: Place) -> Any:  # noqa: ANN401  any function or class
        """A function or class of another package; it is imported only if the user allowed that."""
        if not _FOREIGN.fullmatch(name):
            raise InputError(f"{place}: {name!r} is no name; write package.module:name")
        module, _, attribute = name.partition(":")
        if not self._is_allowed(module):
            raise InputError(
                f"{place}: {name!r} is code from outside llm_distill; if you trust it, run with "
                f"--allow-code {module}"
            )
        try:
            there = vars(import_module(module))
        except ImportError as error:
            raise InputError(
                f"{place}: {module!r} cannot be imported ({error}); is it installed, or in the "
                "folder you are in?"
            ) from error
        if attribute not in there:
            near = did_you_mean(attribute, there)
            raise InputError(f"{place}: no {attribute!r} in {module}{near}")
        found = there[attribute]
        home = getattr(found, "__module__", None)
        if not (inspect.isfunction(found) or inspect.isclass(found)):
            raise InputError(f"{place}: {name!r} is neither a function nor a class of {module}")
        if not self._is_allowed(str(home)):
            raise InputError(
                f"{place}: {name!r} comes from {home}, which is not allowed; if you trust it, run "
                f"with --allow-code {home}"
            )
        return found

    def _is_allowed(self, module: str) -> bool:
        """Whether a module, or a package it is in, was allowed."""
        return any(module == name or module.startswith(f"{name}.") for name in self.allowed)


def split(value: Any, place: Place) -> tuple[str, Mapping[str, Any]]:  # noqa: ANN401  any YAML
    """A component as its name and its arguments.

    Raises:
        InputError: If it is neither a name nor a name with arguments.

    >>> split("jsd", Place("loss")), split({"jsd": {"beta": 0.1}}, Place("loss"))
    (('jsd', {}), ('jsd', {'beta': 0.1}))
    """
    if isinstance(value, str):
        return value, {}
    if isinstance(value, dict) and len(value) == 1:
        ((name, arguments),) = value.items()
        if arguments is None or isinstance(arguments, dict):
            return name, arguments or {}
        raise InputError(
            f"{place.key(name)}: {arguments!r} has no names; write {name}: {{argument: value}}"
        )
    if isinstance(value, dict) and value:
        raise InputError(
            f"{place}: {_listed(value)} stand side by side; a component is one name, its arguments "
            f"indented below it: {next(iter(value))}: {{…}}"
        )
    raise InputError(f"{place}: {value!r} is no component; write a name, or name: {{argument: …}}")


def _functions(module: str) -> list[str]:
    """The public functions of a module."""
    there = vars(import_module(module))
    return [name for name in there["__all__"] if inspect.isfunction(there[name])]


def _hints(of: Any) -> dict[str, Any]:  # noqa: ANN401  a class or function
    """Type hints; none where somebody's names cannot be found."""
    try:
        return get_type_hints(of)
    except NameError:
        return {}


def is_spec(kind: Any) -> bool:  # noqa: ANN401  any type
    """Whether a recipe may make objects of a class: it only says, and does nothing."""
    from llm_distill.objectives import Objective

    return inspect.isclass(kind) and (dataclasses.is_dataclass(kind) or kind is Objective)


def _is_setting(parameter: inspect.Parameter) -> bool:
    """Whether an argument of a function is a setting, rather than the tensors it works on."""
    if parameter.kind is parameter.KEYWORD_ONLY:
        return True
    plain = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    return plain and parameter.default is not parameter.empty


def _refuse_unknown(given: Mapping[str, Any], known: list[str], owner: str, here: Place) -> None:
    """Refuse arguments that are not there, with the nearest that is."""
    for name in given:
        if name not in known:
            near = did_you_mean(name, known)
            offered = [name for name in known if name not in MEASURED]
            has = f"; it has {_listed(offered)}" if offered else "; it takes no arguments"
            raise InputError(f"{here}: {owner} has no {name!r}{near or has}")


def _refuse_measured(given: Mapping[str, Any], here: Place) -> None:
    """Refuse what nobody can write, only measure."""
    for name in given:
        if name in MEASURED:
            how = "a race decides it" if name == "race" else "it is measured at calibration"
            raise InputError(f"{here.key(name)}: {how}; leave it out")


def _offer(place: Place, hint: type | None = None) -> str:
    """What may stand at a place."""
    if hint is None:
        home = FIELDS.get(place.field)
        return f"write one of {_listed(_functions(home))}" if home else "write a function"
    classes = [getattr(llm_distill, name) for name in llm_distill.__all__]
    names = [c.__name__ for c in classes if inspect.isclass(c) and issubclass(c, hint)]
    return f"write one of {_listed(names)}"


def _listed(names: Any) -> str:  # noqa: ANN401  any iterable of names
    """Names with commas; a long list is cut."""
    names = [*names]
    return ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")
