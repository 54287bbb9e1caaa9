"""What `--help` begins with, an example of every command; and where a command stands in the list.

One table, so that a test can let every example be parsed. Commands keep what they do in their docstrings.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence

import typer
from typer.models import CommandInfo, TyperInfo

PANELS: Mapping[str, Sequence[str]] = {
    "Start": ("init", "demo", "doctor", "catalogue"),
    "Find a merge, and make it": ("auto", "merge", "retention", "tune", "plan", "extract-lora", "push"),
    "Measure merges, and learn from them": ("signals", "labels", "search", "train", "predictor", "report", "zoo"),
    "Serve decisions": ("serve", "client", "db"),
    "Clusters": ("simulate", "cluster"),
}
EXAMPLES: Mapping[str, str] = {
    "init": "simmerge init work math=/models/math code=/models/code --probes math=math.csv --probes code=code.jsonl",
    "demo": "simmerge demo --quick",
    "doctor": "simmerge doctor",
    "zoo": "simmerge zoo runs/demo",
    "catalogue add": "simmerge catalogue add work/catalogue.yaml math-a /models/math-a --task math",
    "catalogue list": "simmerge catalogue list work/catalogue.yaml",
    "catalogue show": "simmerge catalogue show work/catalogue.yaml math-a",
    "catalogue remove": "simmerge catalogue remove work/catalogue.yaml math-a",
    "auto": "simmerge auto work/catalogue.yaml --probes work/probes --out work/best --evaluator transformers",
    "merge": "simmerge merge merge.yml merged --dry-run",
    "retention": "simmerge retention merged --catalogue work/catalogue.yaml --probes work/probes",
    "tune": "simmerge tune work/catalogue.yaml --probes work/probes --member math --member code --out work/tuned",
    "plan": "simmerge plan work/catalogue.yaml --signals work/pairs.parquet --out work/plans",
    "extract-lora": "simmerge extract-lora /models/math-a --base /models/base --out math-lora --rank 16",
    "push": "simmerge push work/best/merged me/math-and-code",
    "signals": "simmerge signals work/catalogue.yaml --probes work/probes --out work/pairs.parquet",
    "labels make": "simmerge labels make work/catalogue.yaml --tasks work/tasks --out work/labels --arm linear",
    "labels show": "simmerge labels show work/labels --best 10",
    "labels check": "simmerge labels check work/labels",
    "labels merge": "simmerge labels merge work/labels other/labels",
    "labels compact": "simmerge labels compact work/labels",
    "search": "simmerge search work/catalogue.yaml --tasks work/tasks --out work/labels --budget 200 --ways 2-3",
    "train": "simmerge train --signals work/pairs.parquet --labels work/labels --out work/selector",
    "predictor train": "simmerge predictor train work/labels --out work/predictor",
    "report": "simmerge report runs/demo",
    "serve": "simmerge serve runs/demo",
    "client decide": "simmerge client decide math-strong rag-strong",
    "client decide-plan": "simmerge client decide-plan math-strong rag-strong code-strong",
    "client reward": "simmerge client reward DECISION 0.711",
    "client close": "simmerge client close DECISION 'the merge was never made'",
    "client void": "simmerge client void DECISION 'measured on the wrong items'",
    "client get": "simmerge client get DECISION",
    "client list": "simmerge client list",
    "client policy": "simmerge client policy",
    "client catalogue": "simmerge client catalogue",
    "client best-recipes": "simmerge client best-recipes math-strong rag-strong",
    "client score-recipes": "simmerge client score-recipes recipes.json",
    "client plans": "simmerge client plans math-strong rag-strong",
    "client rank": "simmerge client rank math-strong rag-strong",
    "client add-arm": "simmerge client add-arm 'ties(density=0.3)'",
    "db upgrade": "simmerge db upgrade runs/demo/service/service.db",
    "db status": "simmerge db status runs/demo/service/service.db",
    "db check": "simmerge db check runs/demo/service/service.db",
    "db backup": "simmerge db backup runs/demo/service/service.db backup.db",
    "db restore": "simmerge db restore backup.db new.db",
    "db export": "simmerge db export runs/demo/service/service.db decisions.parquet",
    "db prune": "simmerge db prune runs/demo/service/service.db",
    "simulate": "simmerge simulate --models 50 --params 7.6e9 --nodes 8",
    "cluster check": "simmerge cluster check cluster/aws.yaml",
}
WELCOME = """\
simmerge {version} finds the merge that keeps most of what its members can, and makes it.

  simmerge init DIR TASK=CHECKPOINT... --probes TASK=FILE
                           start a directory from checkpoints and prompts of your own
  simmerge auto DIR/catalogue.yaml --probes DIR/probes --out DIR/best
                           find the merge, or the checkpoint to keep, and say why
  simmerge merge merge.yml OUT
                           make the merge of a plan, or of mergekit's YAML

Nothing at hand? simmerge demo --quick takes a minute. Commands: simmerge --help"""


def add_helps(app: typer.Typer) -> None:
    """Give the commands of the app, and of its groups, their panels and examples."""
    panels = {name: panel for panel, names in PANELS.items() for name in names}
    for name, info in _named(app):
        if name in panels:
            info.rich_help_panel = panels[name]
        if isinstance(info, CommandInfo):
            _add_example(name, info)
        elif info.typer_instance is not None:
            for inner, command in _named(info.typer_instance):
                if isinstance(command, CommandInfo):
                    _add_example(f"{name} {inner}", command)
    order = list(panels)
    app.registered_commands.sort(key=lambda info: _place(order, info))
    app.registered_groups.sort(key=lambda info: _place(order, info))


def _named(app: typer.Typer) -> Iterator[tuple[str, CommandInfo | TyperInfo]]:
    yield from ((_name(info), info) for info in app.registered_commands)
    yield from ((_name(info), info) for info in app.registered_groups)


def _name(info: CommandInfo | TyperInfo) -> str:
    if info.name:
        return str(info.name)
    assert info.callback is not None
    return str(info.callback.__name__).replace("_", "-")


def _place(order: Sequence[str], info: CommandInfo | TyperInfo) -> int:
    name = _name(info)
    return order.index(name) if name in order else len(order)


def _add_example(name: str, info: CommandInfo) -> None:
    paragraphs = inspect.cleandoc(info.help or (info.callback and info.callback.__doc__) or "").split("\n\n")
    info.short_help = " ".join(paragraphs[0].split())
    # Lines are broken where the terminal wants it, but not in what is indented.
    shown = [text if "\n " in text else " ".join(text.split()) for text in paragraphs]
    example = [f"Example: {EXAMPLES[name]}"] if name in EXAMPLES else []
    info.help = "\n\n".join([*example, *shown])
