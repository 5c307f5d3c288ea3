"""Loading a configuration: a preset, a YAML file above it, `key.path=value` overrides above both.

A preset is built in (`pipeline.settings.presets`) or a YAML file of the same form as a configuration.
Named at the top level it describes the only modality; inside an entry of `modalities` that one.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.errors import ConfigError
from pipeline.settings.layering import Content, entry_over_preset, merge, over_preset
from pipeline.settings.presets import PRESETS
from pipeline.settings.problems import WHOLE, problems

ConfigT = TypeVar("ConfigT", bound=BaseModel)

# More values than any configuration needs.
_MOST_VALUES = 1_000_000
_TOO_DEEP = "is nested too deeply; expected `key: value` lines, three or four deep"
_SUFFIXES = (".yaml", ".yml")
# What a preset can say of one modality among several.
_OF_A_MODALITY = ("modality", "scoring", "partition")


def load_config(
    model: type[ConfigT],
    file: Path | None,
    overrides: Iterable[str] = (),
    preset: str | None = None,
) -> ConfigT:
    """Configuration from a preset, then a YAML file, then `key.path=value` overrides.

    A file may name its preset with a top-level key `preset`, and others as `modalities.<name>.preset`;
    paths of presets count from the file's folder, those of `preset` and overrides from the current one.
    Raises ConfigError, which names the file, the key, what was given and what is expected.
    """
    label = str(file) if file else "configuration"
    content = _anchored(_read_yaml(file), file.parent) if file else {}
    for override in overrides:
        content = merge(content, _parse_override(override))
    if "modalities" in model.model_fields:
        content = _on_presets(content, preset, model, label)
    return validated(model, content, label)


def validated(model: type[ConfigT], content: Mapping[str, Any], label: str) -> ConfigT:
    """`content` as a model; ConfigError, which begins with `label`, for what does not fit."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        found = problems(error, model, content)
        raise ConfigError("; ".join(f"{label}: {problem}" for problem in found)) from None


def _read_yaml(file: Path) -> Content:
    try:
        text = file.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_repeated_keys(tree, file, set())
        _refuse_many_values(tree, str(file))
        content = yaml.safe_load(text)
    except RecursionError:
        raise ConfigError(f"{file}: {_TOO_DEEP}") from None
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot read the configuration: {error.strerror}; give the path of a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not a YAML file: {_in_words(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(
            f"{file}: expected `key: value` lines at the top level, got {content!r:.80}"
        )
    return content


def _in_words(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """Why a text is no YAML, and in which line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    advice = "; indent with spaces, not tabs" if "'\\t'" in str(error) else ""
    context = " ".join(str(part) for part in (error.context, error.problem) if part)  # type: ignore[union-attr]
    return f"line {mark.line + 1}: {context}{advice}"


def _refuse_many_values(tree: yaml.Node | None, label: str) -> None:
    """An alias repeats all it stands for: a few lines of them can mean billions of values."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = 1  # of an alias to what it lies in
            parts = [
                part
                for item in node.value
                for part in (item if isinstance(node, yaml.MappingNode) else (item,))
            ]
            sizes[id(node)] = 1 + sum(map(size, parts))
        return sizes[id(node)]

    if tree is not None and size(tree) > _MOST_VALUES:
        raise ConfigError(
            f"{label}: stands for more than {_MOST_VALUES} values, with its aliases (*name) written out; "
            "leave them out"
        )


def _refuse_repeated_keys(node: yaml.Node | None, file: Path, seen: set[int]) -> None:
    """YAML would silently take the last of two equal keys."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    keys = set()
    for item in node.value:
        key, value = item if isinstance(node, yaml.MappingNode) else (None, item)
        if isinstance(key, yaml.ScalarNode):
            if key.value in keys:
                line = key.start_mark.line + 1
                raise ConfigError(
                    f"{file}: line {line} gives {key.value!r} again; give every key once"
                )
            keys.add(key.value)
        _refuse_repeated_keys(value, file, seen)


def _parse_override(text: str) -> Content:
    """`partition.num_scales=2` as a nested mapping; the value is read as YAML."""
    key, separator, value = text.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {text!r}: expected key=value, for example partition.num_scales=2")
    try:
        _refuse_many_values(yaml.compose(value, Loader=yaml.SafeLoader), f"--set {key}")
        parsed: Any = yaml.safe_load(value)
    except RecursionError:
        raise ConfigError(f"--set {key}: {_TOO_DEEP}") from None
    except yaml.YAMLError:
        raise ConfigError(
            f"--set {text!r}: the value is not YAML; text with braces or brackets needs quotes of its own, "
            "as in --set 'modality.pattern=\"{date}.tif\"'"
        ) from None
    for part in reversed(parts):
        parsed = {part: parsed}
    return dict(parsed)


def _anchored(content: Content, folder: Path) -> Content:
    """The content with the paths of its presets below `folder`."""

    def anchor(section: Any) -> Any:
        named = section.get("preset") if isinstance(section, dict) else None
        if not isinstance(named, str) or not named.endswith(_SUFFIXES):
            return section
        return {**section, "preset": str(folder / named)}

    entries = content.get("modalities")
    if isinstance(entries, dict):
        content = {**content, "modalities": {key: anchor(entry) for key, entry in entries.items()}}
    return dict(anchor(content))


def _on_presets(
    content: Content, preset: str | None, model: type[BaseModel], label: str
) -> Content:
    """The content over the presets it names, `preset` being that of the command line."""
    named = content.pop("preset", None)
    if preset is not None and named is not None and preset != named:
        raise ConfigError(
            f"{label}: preset is {named!r} but --preset says {preset!r}; give one of them"
        )
    chosen = named if preset is None else preset
    if chosen is not None:
        found = _preset(chosen, "preset", model, label)
        _refuse_two_forms(found, content, f"{label}: preset {chosen}")
        content = over_preset(found, content)
    entries = content.get("modalities")
    if not isinstance(entries, dict):
        return content
    full = {name: _entry(name, entry, content, model, label) for name, entry in entries.items()}
    return {**content, "modalities": full}


def _entry(
    name: str, entry: Any, shared: Mapping[str, Any], model: type[BaseModel], label: str
) -> Any:
    """An entry of `modalities` over the preset it names."""
    if not isinstance(entry, dict):
        return entry
    key = f"modalities.{name}"
    if "name" in entry and entry["name"] != name:
        raise ConfigError(
            f"{label}: {key}.name is {entry['name']!r:.80}; a modality is named by its key, leave name out"
        )
    own, chosen = _without_preset(entry), entry.get("preset")
    if chosen is None:
        return own
    preset = _preset(chosen, f"{key}.preset", model, label)
    useless = [section for section in preset if section not in _OF_A_MODALITY]
    if useless:
        raise ConfigError(
            f"{label}: {key}.preset {chosen} sets {', '.join(useless)}, without effect in one of several "
            f"modalities; expected a preset of {', '.join(_OF_A_MODALITY)}"
        )
    return entry_over_preset(preset, own, shared)


def _refuse_two_forms(preset: Content, content: Content, which: str) -> None:
    for one, other in (("modality", "modalities"), ("modalities", "modality")):
        if preset.get(one) and content.get(other):
            raise ConfigError(
                f"{which} sets {one} and the configuration {other}; to start one of several modalities "
                "from a preset, name it there, as modalities.<name>.preset"
            )


def _preset(name: Any, key: str, model: type[BaseModel], label: str) -> Content:
    """The content of the preset that `key` names."""
    if isinstance(name, str) and name in PRESETS:
        return PRESETS[name]
    if not isinstance(name, str) or not name.endswith(_SUFFIXES):
        raise ConfigError(
            f"{label}: {key} {name!r:.80} is not known; expected one of {', '.join(sorted(PRESETS))}, or "
            "the path of a .yaml file"
        )
    content = _anchored(_read_yaml(Path(name)), Path(name).parent)
    if "preset" in content:
        raise ConfigError(f"{name}: a preset cannot name another preset; copy what that one says")
    _check_parts(content, model, name)
    return content


def _check_parts(content: Content, model: type[BaseModel], label: str) -> None:
    """Refuse what no configuration over this preset could mend: unknown keys, values of a wrong kind."""
    entries = content.get("modalities")
    if isinstance(entries, dict):
        own = {name: _without_preset(entry) for name, entry in entries.items()}
        content = {**content, "modalities": own}
    try:
        model.model_validate(content)
    except ValidationError as error:
        found = [f"{label}: {problem}" for problem in problems(error, model, content, WHOLE)]
        if found:
            raise ConfigError("; ".join(found)) from None


def _without_preset(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    return {key: value for key, value in entry.items() if key != "preset"}
