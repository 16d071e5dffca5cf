"""From plain configuration to objects: bind against real signatures first, build afterwards."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from pydantic import ConfigDict, TypeAdapter, ValidationError

from experiments.errors import UserError
from experiments.keys import nearest
from experiments.source_graph import PACKAGES

# Constructor arguments that the runner fills in from the data; a config never names them.
RUNTIME = (
    "num_items", "num_users", "catalog", "item_words", "item_images", "row_histories", "user_facts",
)  # fmt: skip
# Inputs that are no arguments: a checkpoint for ``load_weights``, and ``catalog.NAME``, a text of each item,
# which all that read the catalogue see as its column NAME.
WEIGHTS = "weights"
CATALOG = "catalog."


def problems(node: Any, where: str, given: tuple[str, ...] = ()) -> Iterator[str]:
    """Everything that keeps a configured object (and what is nested in it) from being built.

    Args:
        node: a mapping with ``_target_``, or anything that may hold such mappings.
        where: its dotted place, for the messages.
        given: names of arguments that will be filled in besides those of the mapping; ``a.b`` is the argument
            ``b`` of the nested object ``a``.
    """
    given = tuple(name for name in given if not name.startswith(CATALOG))
    if isinstance(node, list):
        for i, item in enumerate(node):
            yield from problems(item, f"{where}[{i}]")
    elif isinstance(node, dict):
        own, nested = _sorted_by_owner(dict.fromkeys(given))
        told: list[str] = []
        for key, value in node.items():
            if isinstance(value, (dict, list)):
                told += problems(value, f"{where}.{key}", tuple(nested.pop(key, {})))
        for key, names in nested.items():
            told.append(f"{where} has no object {key!r} that could be given {', '.join(names)}")
        if "_target_" in node:
            told += _object_problems(node, where, tuple(n for n in own if n != WEIGHTS))
            if not told and not given and _is_description(node):
                told += _refusals(node, where)
        yield from told


def _is_description(node: Any) -> bool:
    """Whether an object, with all in it, is a frozen dataclass of ours: making one only checks it."""
    if isinstance(node, list):
        return all(map(_is_description, node))
    if not isinstance(node, dict):
        return True
    if "_target_" in node:
        try:
            made = locate(node["_target_"])
        except UserError:
            return False
        options = getattr(made, "__dataclass_params__", None)
        if not _is_ours(made) or options is None or not options.frozen:
            return False
    return all(map(_is_description, node.values()))


def _refusals(node: dict[str, Any], where: str) -> Iterator[str]:
    """What a description's own checks say of its values."""
    try:
        build(node)
    except UserError as error:
        yield f"{where}: {error}"


def _object_problems(node: dict[str, Any], where: str, given: tuple[str, ...]) -> Iterator[str]:
    target = node["_target_"]
    try:
        function = locate(target)
    except UserError as error:
        yield f"{where}: {error}"
        return
    parameters = signature_of(function)
    arguments = {k: v for k, v in node.items() if not (k.startswith("_") and k.endswith("_"))}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in [*arguments, *given]:
        if name not in parameters and not open_ended:
            yield f"{where}: {target} has no argument {name!r}{nearest(name, list(parameters))}"
    filled = {*arguments, *given, *RUNTIME}
    for name, parameter in parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if not variadic and parameter.default is parameter.empty and name not in filled:
            yield f"{where}: {target} needs {name!r}"
    for name in RUNTIME:
        if name in arguments:
            yield f"{where}.{name} comes from the data and cannot be set"
    yield from _type_problems(function, arguments, where)


def _type_problems(function: Any, arguments: dict[str, Any], where: str) -> Iterator[str]:
    """Values that do not fit the annotation. Objects are checked when they are built themselves."""
    hints: dict[str, Any] = {}
    for constructor in reversed(list(_constructors(function))):
        try:
            hints |= typing.get_type_hints(constructor)
        except (NameError, TypeError):  # annotations that exist for type checkers only
            continue
    for name, value in arguments.items():
        if name not in hints or _holds_objects(value):
            continue
        try:
            adapter = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True))
        except Exception:  # an annotation that pydantic cannot read: its constructor checks it
            continue
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            yield f"{where}.{name} is {value!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _constructors(function: Any) -> Iterator[Any]:
    """What a call runs; in our own code ``**options`` are passed on to the base class's constructor."""
    if not _is_ours(function):
        yield function.__init__ if inspect.isclass(function) else function
        return
    for base in filter(_is_ours, function.__mro__):
        own = vars(base).get("__init__")
        if own is not None:
            yield own
            kinds = [p.kind for p in inspect.signature(own).parameters.values()]
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                return


def _is_ours(function: Any) -> bool:
    return inspect.isclass(function) and function.__module__.partition(".")[0] in PACKAGES


def signature_of(function: Any) -> dict[str, inspect.Parameter]:
    """Arguments by name; a class of ours that takes ``**options`` has those of its base class, too.

    A base class's positional-only arguments are what its heirs decide for themselves.
    """
    if not _is_ours(function):
        return dict(inspect.signature(function).parameters)
    found: dict[str, inspect.Parameter] = {}
    chain = list(_constructors(function))
    for constructor in chain:
        own = list(inspect.signature(constructor).parameters.values())[1:]  # without self
        last = constructor is chain[-1]
        for parameter in own:
            passed_on = parameter.kind is parameter.VAR_KEYWORD and not last
            private = parameter.kind is parameter.POSITIONAL_ONLY
            if not passed_on and not private:
                found.setdefault(parameter.name, parameter)
    return found


def _holds_objects(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or any(map(_holds_objects, value.values()))
    return isinstance(value, list) and any(map(_holds_objects, value))


def locate(target: str) -> Any:
    """The class or function that a dotted path names.

    Raises:
        UserError: no such module or name; the nearest name in the module is told.
    """
    path, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(path)
    except (ImportError, ValueError) as error:  # ValueError: a name without a module
        raise UserError(f"{target} cannot be imported ({error})") from error
    if not hasattr(module, name):
        public = [n for n in dir(module) if not n.startswith("_")]
        raise UserError(f"{path} has no {name!r}{nearest(name, public)}")
    return getattr(module, name)


def build(node: dict[str, Any], **extra: Any) -> Any:
    """Instantiate a configured object with its nested ones; ``extra`` are arguments as they are.

    Raises:
        UserError: a constructor refused its arguments; it is named, and says why.
    """
    try:
        constructor = instantiate({**node, "_partial_": True}, _convert_="all")
        return constructor(**extra)
    except (InstantiationException, ValueError, TypeError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, (ValueError, TypeError)):
            raise UserError(f"{node['_target_']}: {cause}") from error
        first = str(error).partition("\n")[0]  # Hydra refuses targets that could do harm
        raise UserError(f"{node['_target_']} cannot be built: {first}") from error


def build_on(node: dict[str, Any], data: Any, **extra: Any) -> Any:
    """``build`` with what constructors ask of the data module ``data``, those of nested objects, too.

    Args:
        node: a mapping with ``_target_``.
        data: holds ``RUNTIME``.
        extra: arguments as they are; ``a.b`` is the argument ``b`` of the nested object ``a``; ``weights`` is
            a checkpoint that the finished object loads, ``catalog.NAME`` a table with a column ``text``.

    Raises:
        UserError: see ``build``; or a table is not one of this catalogue, or nothing reads the catalogue.
    """
    told = {name: extra.pop(name) for name in [*extra] if name.startswith(CATALOG)}
    asked = set()

    @cache  # a catalogue may be large: read once, and only where it is asked for
    def fact(name: str) -> Any:
        asked.add(name)
        value = getattr(data, name)
        return _with_texts(value, told) if name == "catalog" else value

    built = _build_on(node, fact, extra)
    if told and "catalog" not in asked:
        raise UserError(
            f"{node['_target_']} reads no texts of items: take the input {', '.join(told)} away"
        )
    return built


def _with_texts(catalog: Any, tables: dict[str, str]) -> Any:
    """The catalogue with a column more for each table of texts."""
    # Not above: a driver that only plans does without polars.
    from datamodules.written import read_written

    for name, file in tables.items():
        table = read_written(file, ("item", "text"))
        if len(table) != len(catalog):
            raise UserError(
                f"{file} has texts of {len(table)} items, and the data has {len(catalog)}"
            )
        if table["item"].to_list() != list(range(1, len(catalog) + 1)):
            raise UserError(f"{file} does not number its items 1 to {len(catalog)}, in this order")
        catalog = catalog.with_columns(table["text"].alias(name.removeprefix(CATALOG)))
    return catalog


def _build_on(node: dict[str, Any], fact: Callable[[str], Any], extra: dict[str, Any]) -> Any:
    own, inner = _sorted_by_owner(extra)
    weights = own.pop(WEIGHTS, None)
    asked = signature_of(locate(node["_target_"]))
    given = {name: fact(name) for name in RUNTIME if name in asked}
    nested = [name for name, value in node.items() if name in inner or _asks_of_data(value)]
    made = {name: _build_on(node[name], fact, inner.get(name, {})) for name in nested}
    rest = {name: value for name, value in node.items() if name not in nested}
    built = build(rest, **given, **made, **own)
    if weights is not None:
        built.load_weights(weights)
    return built


def _sorted_by_owner(extra: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """An object's own arguments, and those of its nested objects by name."""
    own: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in extra.items():
        owner, dot, rest = name.partition(".")
        if dot:
            nested.setdefault(owner, {})[rest] = value
        else:
            own[name] = value
    return own, nested


def _asks_of_data(node: Any) -> bool:
    if not isinstance(node, dict) or "_target_" not in node:
        return False
    asked = signature_of(locate(node["_target_"]))
    return any(name in asked for name in RUNTIME) or any(map(_asks_of_data, node.values()))
