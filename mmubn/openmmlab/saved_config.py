"""The config of a run in its checkpoints: Python text, read here without running it."""

from __future__ import annotations

import ast
from collections.abc import Mapping

__all__ = ['parse_config_text', 'saved_config']


def saved_config(checkpoint: object) -> dict:
    """The config that a checkpoint of MMEngine was trained with; empty where it has none that can be read."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    text = meta.get('cfg') if isinstance(meta, Mapping) else None
    return parse_config_text(text) if isinstance(text, str) else {}


def parse_config_text(text: str) -> dict:
    """What ``Config.pretty_text`` says, as plain values. What is no literal and no ``dict(...)`` stays text."""
    try:
        return {
            statement.targets[0].id: _value(statement.value)
            for statement in ast.parse(text).body
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
        }
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # whatever is in the file
        return {}


def _value(node: ast.expr) -> object:
    match node:
        case ast.Call(func=ast.Name(id='dict'), args=arguments, keywords=keywords):
            pairs = {}
            for each in arguments:
                pairs.update(_value(each))
            for keyword in keywords:
                pairs.update(_value(keyword.value) if keyword.arg is None else {keyword.arg: _value(keyword.value)})
            return pairs
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_value(key): _value(value) for key, value in zip(keys, values, strict=True)}
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_value(each) for each in elements]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
