"""Nested mappings, and the paths of what stands in them."""

from collections.abc import Iterator, Mapping
from typing import Any


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dictionaries of leaves by paths ``a/b/c``.

    Examples:
        >>> nest({"a/b": 1, "a/c": 2})
        {'a': {'b': 1, 'c': 2}}
    """
    nested: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return nested


def dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what stands in nested mappings by names ``a.b.c``; tuples become lists.

    Examples:
        >>> dict(dotted({"optim": {"lr": 0.1}, "sizes": (1, 2)}))
        {'optim.lr': 0.1, 'sizes': [1, 2]}
    """
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value
