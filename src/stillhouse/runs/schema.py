"""JSON schema of recipes, for editors: the method's config, with every objective's own options."""

from __future__ import annotations

from typing import Any

from stillhouse import catalog


def recipe_schema(method: str = "distillation") -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a method's recipes; imports every objective."""
    schema = catalog.method(method).Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = f"stillhouse recipe: {method}"
    common = schema.get("$defs", {}).get("ObjectiveSpec")
    if common is not None:
        shapes: list[dict[str, Any]] = [{"type": "string"}]
        for card in catalog.list_methods():
            if card.kind != "objective":
                continue
            for name in card.provides:
                own = catalog.options(catalog.objective(name)).model_json_schema()
                schema["$defs"].update(own.pop("$defs", {}))
                properties = {**common["properties"], "name": {"const": name}, **own.get("properties", {})}
                shapes.append(
                    {
                        "type": "object",
                        "title": card.title,
                        "properties": properties,
                        "required": ["name", *own.get("required", [])],
                        "additionalProperties": False,
                    }
                )
        schema["$defs"]["ObjectiveSpec"] = {"anyOf": shapes}
    return schema
