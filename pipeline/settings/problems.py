"""What is wrong with a configuration, in words: the key, what it is, and what is expected.

Validation reports a path through the models, in which tags of chosen scorers and branches of unions stand
between the keys a user wrote. Here the path is followed through the annotations, and only the user's own
keys are shown.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo

from pipeline.scorers.config import SCORER_NAMES
from pipeline.settings.cluster import CLUSTER_KINDS
from pipeline.settings.modality import ModalityConfig

_NAME = "expected a letter, then up to 63 letters, digits or _"
_EXPECTED = {
    "model_type": "expected key: value lines below it",
    "dict_type": "expected key: value lines below it",
    "tuple_type": "expected a list, such as [a, b]",
    "string_pattern_mismatch": _NAME,
    "string_too_long": _NAME,
    "string_type": "input should be text; put it in quotes",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
}
# The key that chooses the form of a section, and its values.
_CHOSEN_BY: dict[str | int, tuple[str, tuple[str, ...]]] = {
    "scoring": ("scorer", SCORER_NAMES),
    "cluster": ("kind", CLUSTER_KINDS),
}
# What these report can be mended elsewhere, so that it counts only once a configuration is complete.
WHOLE = ("value_error", "missing")


def problems(
    error: ValidationError,
    model: type[BaseModel],
    content: Mapping[str, Any],
    but: Sequence[str] = (),
) -> list[str]:
    """Every problem on a line of its own, each once; those of the types in `but` are left out."""
    found = [
        _problem(dict(item), model, content)
        for item in error.errors()
        if item["type"] not in but and not _is_copied_name(item["loc"])
    ]
    return list(dict.fromkeys(found))


def _is_copied_name(path: Sequence[str | int]) -> bool:
    """Whether a path is that of a modality's name, which is its key and reported as such."""
    return len(path) == 3 and (path[0], path[2]) == ("modalities", "name")


@dataclass
class _Trail:
    """Where a path leads: the user's own `keys`, the model `owner` of the last of them, the field's
    `description`, and whether the path ends before a union of forms."""

    keys: list[str | int]
    owner: type[BaseModel]
    description: str = ""
    union: bool = False

    def __str__(self) -> str:
        text = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in self.keys)
        return text.removeprefix(".")

    @property
    def parent(self) -> str:
        """The path to the section the last key lies in."""
        return str(_Trail(self.keys[:-1], self.owner))


def _problem(item: dict[str, Any], model: type[BaseModel], content: Mapping[str, Any]) -> str:
    trail = _follow(model, item["loc"])
    given = f"{item['input']!r:.80}"
    expected = trail.description.partition(";")[0].rstrip(".")
    is_key = item["loc"][-1:] == ("[key]",)
    if trail.union:
        return (
            f"{trail} is {_value_at(content, trail.keys, item['input'])!r:.80}; expected {expected}"
        )
    match item["type"]:
        case "extra_forbidden":
            return _unknown_key(trail)
        case "value_error":
            return f"{trail}: {item['ctx']['error']}" if trail.keys else str(item["ctx"]["error"])
        case "missing":
            return f"{trail} is not given; expected the {expected[:1].lower()}{expected[1:]}"
        case "union_tag_invalid":
            tag, (key, tags) = item["ctx"]["tag"], _CHOSEN_BY[trail.keys[-1]]
            return f"{trail}.{key} is {tag!r:.80}; {_nearest(tag, tags, 'expected one of')}"
        case "union_tag_not_found":
            key, tags = _CHOSEN_BY[trail.keys[-1]]
            return f"{trail}.{key} is not given; expected one of {', '.join(tags)}"
        case "string_pattern_mismatch" | "string_too_long" if is_key:
            return f"{trail.parent}: {given} cannot be a name; {_NAME}"
        case _ if is_key or item["type"] == "invalid_key":
            return f"{trail.parent}: the key {given} is no text; put it in quotes if it is meant"
        case kind:
            message = item["msg"].replace("Tuple", "List").replace(" after validation", "")
            return f"{trail} is {given}; {_EXPECTED.get(kind, message[0].lower() + message[1:])}"


def _unknown_key(trail: _Trail) -> str:
    if trail.keys == ["modality", "preset"]:
        return "modality.preset is at the wrong place; with one modality, preset stands at the top level"
    known = list(trail.owner.model_fields)
    if "modalities" in known:
        known.append("preset")
    if trail.owner is ModalityConfig and trail.keys[0] == "modalities":
        known = [*(key for key in known if key != "name"), "preset"]
    return f"unknown key {str(trail)!r}; {_nearest(str(trail.keys[-1]), known, 'known keys:')}"


def _nearest(given: str, known: Sequence[str], otherwise: str) -> str:
    near = difflib.get_close_matches(given, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{otherwise} {', '.join(known)}"


def _follow(model: type[BaseModel], path: Sequence[str | int]) -> _Trail:
    trail, annotation = _Trail([], model), _bare(model)
    for part in path:
        if part == "[key]":
            continue
        if _is_union(annotation):
            tagged = _tagged(annotation).get(part)
            if tagged is None:
                trail.union = True
                return trail
            annotation = _bare(tagged)
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            trail.owner = annotation
            trail.keys.append(part)
            field = annotation.model_fields.get(str(part)) or FieldInfo(annotation=object)
            trail.description, annotation = field.description or "", _bare(field.annotation)
        else:
            trail.keys.append(part)
            annotation = _bare(_member(annotation, part))
    return trail


def _bare(annotation: Any) -> Any:
    """The annotation without metadata and without None."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if _is_union(annotation):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return _bare(members[0]) if len(members) == 1 else annotation
    return annotation


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)


def _tagged(union: Any) -> dict[Any, Any]:
    """The members of a union by the tag that chooses them; empty for a plain union."""
    return {
        data.tag: member
        for member in get_args(union)
        if get_origin(member) is Annotated
        for data in member.__metadata__
        if isinstance(data, Tag)
    }


def _member(annotation: Any, part: str | int) -> Any:
    """The type of one item of a dict, list or tuple."""
    arguments = get_args(annotation)
    if get_origin(annotation) is dict:
        return arguments[1]
    if isinstance(part, int) and part < len(arguments) and arguments[part] is not Ellipsis:
        return arguments[part]
    return arguments[0] if arguments else object


def _value_at(content: Any, keys: Sequence[str | int], otherwise: Any) -> Any:
    for key in keys:
        try:
            content = content[key]
        except (KeyError, IndexError, TypeError):
            return otherwise
    return content
