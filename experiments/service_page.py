"""The page of a service's OpenAPI description: plain HTML, without scripts and without another host."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from experiments.page_html import Html, document, join, table, tag

_EXAMPLE = """curl -s http://127.0.0.1:8000/recommend -H 'Content-Type: application/json' \\
  -d '{"history": ["Toy Story", "172"], "k": 5}'"""


def page(described: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI description."""
    info, schemas = described["info"], described["components"]["schemas"]
    routes = [
        _route(method, path, told)
        for path, methods in described["paths"].items()
        for method, told in methods.items()
    ]
    made = [_schema(name, told) for name, told in schemas.items() if told.get("properties")]
    return document(
        info["title"],
        tag("h1", info["title"]),
        tag("p", info["description"]),
        tag("pre", _EXAMPLE),
        tag("p", "The same for programs: ", tag("a", "openapi.json", href="openapi.json")),
        tag("h2", "Routes"),
        *routes,
        tag("h2", "Objects"),
        *made,
    )


def _route(method: str, path: str, told: Mapping[str, Any]) -> Html:
    body = told.get("requestBody", {}).get("content", {}).get("application/json", {})
    answers = [
        (status, answer["description"], _kind(_of(answer)))
        for status, answer in sorted(told["responses"].items())
    ]
    asked = [tag("p", "Takes ", tag("code", _kind(body["schema"])))] if body else []
    return join((
        tag("h3", tag("code", f"{method.upper()} {path}")), tag("p", told.get("description", "")),
        *asked, table(("status", "what", "returns"), answers),
    ))  # fmt: skip


def _of(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    for content in answer.get("content", {}).values():
        return dict(content.get("schema", {}))
    return {}


def _schema(name: str, told: Mapping[str, Any]) -> Html:
    needed = told.get("required", [])
    rows = [
        (tag("code", key), _kind(one), _bounds(one),
         "needed" if key in needed else json.dumps(one.get("default")), one.get("description", ""))
        for key, one in told["properties"].items()
    ]  # fmt: skip
    words = tag("p", told.get("description", ""))
    return join((tag("h3", name), words, table(("key", "type", "bounds", "default", ""), rows)))


def _kind(told: Mapping[str, Any]) -> str:
    """``integer``, ``list of Asked``, ``string or null``."""
    if "$ref" in told:
        return str(told["$ref"]).rpartition("/")[2]
    if "anyOf" in told:
        return " or ".join(_kind(each) for each in told["anyOf"])
    if told.get("type") == "array":
        return f"list of ({_kind(told['items'])})"
    return str(told.get("type", ""))


def _bounds(told: Mapping[str, Any]) -> str:
    names = {"minimum": "from {:g}", "maximum": "to {:g}", "minItems": "at least {}",
             "maxItems": "at most {}", "maxLength": "at most {} signs"}  # fmt: skip
    each = [told, *told.get("anyOf", [])]
    return ", ".join(
        words.format(one[key]) for key, words in names.items() for one in each if key in one
    )
