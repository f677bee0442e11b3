"""One file a slug: `ADAPTERS` maps the kind of a case to a function that computes it with this library and compares."""
