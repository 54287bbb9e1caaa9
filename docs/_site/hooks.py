"""What mkdocs is given beside docs/: README and the pages of other folders, and a reference that is made from the code.

Links between them are those of the repository, so that they work there; here they become links of the site. A link to a
file that is no page is left as its words. A link to what does not exist stays as it is, and fails the build.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Page of the site -> its file.
ELSEWHERE = {"index.md": "README.md", "benchmarks.md": "benchmarks/README.md", "cluster-files.md": "cluster/README.md"}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"(```.*?```)", re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in docs/."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    files.append(File.generated(config, "configs.md", content=configs_page()))
    return files


def on_post_page(output: str, **_: Any) -> str:
    """As `on_post_template`."""
    return on_post_template(output)


def on_post_template(output_content: str, **_: Any) -> str:
    """The theme asks another host for what lets pages from the disk search; it gets ours."""
    script = (DOCS / "_site" / "worker.js").read_text()
    return re.sub(r"<script[^>]*unpkg\.com[^>]*></script>", lambda _: f"<script>{script}</script>", output_content)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the repository's links into those of the site."""
    name = page.file.src_uri
    source = ROOT / ELSEWHERE[name] if name in ELSEWHERE else DOCS / name
    parts = _CODE.split(re.sub(r"<!--.*?-->\n?", "", markdown))
    return "".join(part if number % 2 else _linked(part, source, name) for number, part in enumerate(parts))


def _linked(text: str, source: Path, page: str) -> str:
    def whole(match: re.Match[str]) -> str:
        target = _target(match[3], source, page)
        return match[2] if target is None else f"{match[1]}[{match[2]}]({target})"

    return _LINK.sub(whole, text)


def _target(target: str, source: Path, page: str) -> str | None:
    """The target on the site; None where it is no page."""
    name, sign, anchor = target.partition("#")
    if not name or re.match(r"[a-z]+:", target):
        return target
    there = Path(os.path.normpath(source.parent / name))
    if not there.exists():
        return target
    pages = {str(ROOT / file): page for page, file in ELSEWHERE.items()}
    if there.is_relative_to(DOCS) and there.is_file():
        uri = str(there.relative_to(DOCS))
    elif (known := pages.get(str(there))) is not None:
        uri = known
    else:
        return None
    return os.path.relpath(uri, Path(page).parent) + sign + anchor


def commands_page() -> str:
    """Every command: its example, what it does, its arguments and options."""
    import typer

    from simmerge_ray.cli.app import app
    from simmerge_ray.cli.helps import EXAMPLES, PANELS

    found = dict(_commands(typer.main.get_command(app)))
    lines = ["# Commands", "", "Made from the code. `simmerge COMMAND --help` says the same.", ""]
    for panel, names in PANELS.items():
        lines += [f"## {panel}", ""]
        for name, command in found.items():
            if name.split()[0] not in names:
                continue
            lines += [f"### simmerge {name}", "", "```bash", EXAMPLES[name], "```", ""]
            lines += [re.sub(r"^Example: .*\n\n", "", command.help or ""), ""]
            lines += _parameters(command)
    return "\n".join(lines) + "\n"


def _commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def _parameters(command: Any) -> list[str]:
    rows = ["| | default | |", "|---|---|---|"]
    for one in command.params:
        if one.name in ("help", "job_line"):
            continue
        is_argument = one.param_type_name == "argument"
        names = [one.metavar or one.name.upper()] if is_argument else [*one.opts, *one.secondary_opts]
        shown = " ".join(f"`{name}`" for name in names)
        rows.append(f"| {shown} | {_default(one)} | {_cell(one.help or '')} |")
    return [*rows, ""]


def _default(parameter: Any) -> str:
    if parameter.required:
        return "*needed*"
    value = parameter.default
    if value is None or value is False or value == [] or callable(value):
        return ""
    return ", ".join(f"`{one}`" for one in (value if isinstance(value, list | tuple) else [value]))


def configs_page() -> str:
    """Every config: its keys in a YAML file, their kinds, defaults and meanings."""
    from simmerge_ray.base import config, finding

    models: dict[str, Any] = {
        name: value
        for module in (config, finding)
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, config.FrozenConfig) and not name.startswith("_")
        and value is not config.FrozenConfig
    }  # fmt: skip
    lines = [
        "# Configs",
        "",
        "Made from the code: the keys of YAML files for jobs, and of `sm.FindConfig` and others.",
        "",
    ]
    for name, model in models.items():
        lines += [f"## {name}", "", model.__doc__ or "", "", "| key | kind | default | |", "|---|---|---|---|"]
        fields: Mapping[str, Any] = model.model_fields
        for key, field in fields.items():
            kind = re.sub(r"\b(?:typing|pathlib|simmerge_ray(?:\.\w+)*)\.", "", str(_kind(field.annotation)))
            default = "*needed*" if field.is_required() else f"`{_short(field.default)}`"
            lines.append(f"| `{key}` | {_cell(kind)} | {_cell(default)} | {_cell(field.description or '')} |")
        lines.append("")
    return "\n".join(lines) + "\n"


def _kind(annotation: Any) -> Any:
    return annotation.__name__ if isinstance(annotation, type) else annotation


def _short(value: Any) -> str:
    return f"{type(value).__name__}()" if isinstance(value, BaseModel) else str(value)


def _cell(text: str) -> str:
    """In a table: one line, and no markup by accident."""
    escaped = re.sub(r"<", "&lt;", " ".join(text.split())).replace("|", "\\|")
    return re.sub(r"`([^`]*)`", lambda match: f"`{match[1].replace('&lt;', '<')}`", escaped)
