"""Commented recipe templates for `foretune init`."""

from __future__ import annotations

from importlib import resources

from foretune.errors import UserError, did_you_mean

TEMPLATES = ("choice", "classification", "causal-lm", "chat", "preference", "arrays")


def template_text(name: str) -> str:
    """The YAML of a template.

    Raises:
        UserError: There is no such template.
    """
    if name not in TEMPLATES:
        hint = did_you_mean(name, TEMPLATES)
        raise UserError(f'no template "{name}"; there are {", ".join(TEMPLATES)}.{hint}')
    return (resources.files(__package__) / f"{name}.yaml").read_text("utf-8")
