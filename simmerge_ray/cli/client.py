"""`simmerge client ...`: the service from a shell. Tables for people, `--json` for scripts. No torch, no Ray.

The token comes from the variable SIMMERGE_TOKEN or a file, not from an option: the list of processes shows options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simmerge_ray.base.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from simmerge_ray.service.client import Client

client_app = typer.Typer(
    help="Ask a running service which merge to make, and tell it what it was worth.", no_args_is_help=True
)

AsJson = Annotated[bool, typer.Option("--json", help="the service's answer as JSON")]
Key = Annotated[str | None, typer.Option(help="idempotency key: the same again is the same call; default: a new one")]
Task = Annotated[str | None, typer.Option(help="for this task alone; default: the parents' tasks together")]
DecisionId = Annotated[str, typer.Argument(metavar="ID", help="of a decision")]
Explore = Annotated[bool, typer.Option(help="draw; --no-explore takes what is known to be best")]
Ways = Annotated[str, typer.Option(help="how many checkpoints to merge, e.g. 3 or 2-4")]
Left = Annotated[str, typer.Argument(help="checkpoint id")]
Right = Annotated[str, typer.Argument(help="checkpoint id")]

_NONE = "-"


@client_app.callback()
def _service(
    context: typer.Context,
    url: Annotated[
        str | None, typer.Option(help="of the service; default: variable SIMMERGE_URL, or port 8000 of this machine")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="file with the token; default: variable SIMMERGE_TOKEN")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="seconds for one try")] = 30.0,
    retries: Annotated[int, typer.Option(min=0, help="tries after the first, while the service is not there")] = 5,
) -> None:
    context.obj = (url, token_file, timeout, retries)


def _call(context: typer.Context, ask: Callable[[Client], Any], as_json: bool, show: Callable[[Any], None]) -> None:
    from simmerge_ray.service.client import Client

    url, token_file, timeout, retries = context.obj
    token = None
    if token_file is not None:
        try:
            token = token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the token file {token_file} cannot be read: {error}") from None
    with Client(url, token, timeout, retries) as client:
        answer: BaseModel = ask(client)
    if as_json:
        typer.echo(answer.model_dump_json(indent=2))
    else:
        show(answer)


@client_app.command("decide")
def decide(
    context: typer.Context,
    left: Left,
    right: Right,
    task: Task = None,
    explore: Explore = True,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Which operator should merge two checkpoints? The decision is logged and waits for its reward."""
    _call(context, lambda client: client.decide(left, right, task, explore, key=key), as_json, _show_decision)


@client_app.command("decide-plan")
def decide_plan(
    context: typer.Context,
    checkpoints: Annotated[list[str], typer.Argument(metavar="CHECKPOINT...", help="ids to choose from")],
    ways: Ways = "2-4",
    task: Task = None,
    explore: Explore = True,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Which plan should merge some of these checkpoints? The decision is logged and waits for its reward."""

    def ask(client: Client) -> Any:
        return client.decide_plan(checkpoints, ways, task, explore, key=key)

    _call(context, ask, as_json, _show_decision)


@client_app.command("reward")
def reward(
    context: typer.Context,
    decision_id: DecisionId,
    utility: Annotated[float, typer.Argument(help="measured, in [0, 1]")],
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Report what the merge of a decision was worth."""
    _call(
        context,
        lambda client: client.reward(decision_id, utility, key),
        as_json,
        lambda answer: _say(f"reward {answer.utility:g} of {answer.decision_id}: {answer.status}"),
    )


@client_app.command("close")
def close(
    context: typer.Context,
    decision_id: DecisionId,
    reason: Annotated[str, typer.Argument(help="e.g. 'infeasible: out of memory', or 'not made'")],
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Say that no reward will come for a decision."""
    _call(
        context,
        lambda client: client.close(decision_id, reason, key),
        as_json,
        lambda answer: _say(f"{decision_id} closed: {answer.status}"),
    )


@client_app.command("void")
def void(
    context: typer.Context,
    decision_id: DecisionId,
    reason: Annotated[str, typer.Argument(help="why it was wrong")],
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Take back a wrong reward; another may follow."""
    _call(
        context,
        lambda client: client.void(decision_id, reason, key),
        as_json,
        lambda answer: _say(f"reward of {decision_id} voided: {answer.status}"),
    )


@client_app.command("get")
def get(context: typer.Context, decision_id: DecisionId, as_json: AsJson = False) -> None:
    """A decision, and what became of it."""
    _call(context, lambda client: client.get(decision_id), as_json, _show_status)


@client_app.command("list")
def list_(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="at most so many")] = 20,
    before: Annotated[int | None, typer.Option(help="only those before this event")] = None,
    as_json: AsJson = False,
) -> None:
    """The newest decisions."""
    _call(context, lambda client: client.decisions(limit, before), as_json, _show_list)


@client_app.command("policy")
def policy(context: typer.Context, as_json: AsJson = False) -> None:
    """What the service has learned so far."""
    _call(context, lambda client: client.policy(), as_json, _show_policy)


@client_app.command("catalogue")
def catalogue(context: typer.Context, as_json: AsJson = False) -> None:
    """Checkpoints, tasks and arms that may be named."""
    _call(context, lambda client: client.catalogue(), as_json, _show_catalogue)


@client_app.command("plans")
def plans(
    context: typer.Context,
    checkpoints: Annotated[
        list[str] | None, typer.Argument(metavar="[CHECKPOINT...]", help="ids to choose from; default: all")
    ] = None,
    ways: Ways = "2-4",
    task: Task = None,
    top: Annotated[int, typer.Option(min=1, help="how many plans")] = 10,
    as_json: AsJson = False,
) -> None:
    """Ranked plans; nothing is decided."""
    _call(context, lambda client: client.plans(checkpoints or None, ways, task, top), as_json, _show_plans)


@client_app.command("rank")
def rank(context: typer.Context, left: Left, right: Right, task: Task = None, as_json: AsJson = False) -> None:
    """Ranked arms for two checkpoints; nothing is decided."""
    _call(context, lambda client: client.rank(left, right, task), as_json, _show_ranking)


@client_app.command("add-arm")
def add_arm(
    context: typer.Context,
    arm: Annotated[str, typer.Argument(help="e.g. 'ties(density=0.2)'")],
    sibling: Annotated[str | None, typer.Option(help="a known arm that it is expected to be like")] = None,
    power: Annotated[float, typer.Option(min=0, max=1, help="how much of what that has learned counts")] = 0.3,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Let an operator be chosen from now on."""
    _call(
        context,
        lambda client: client.add_arm(arm, sibling, power, key),
        as_json,
        lambda answer: _say(f"arm {arm}: {answer.status}"),
    )


def _show_decision(answer: Any) -> None:
    _say(f"decision {answer.decision_id}")
    if answer.plan is not None:
        _say(f"plan     {answer.plan.label}")
        rows = [
            (one.label, _number(one.utility), _number(one.sd), _number(one.propensity)) for one in answer.plans or ()
        ]
        _table(("plan", "predicted", "sd", "probability"), rows, left=1)
    else:
        _say(f"arm      {answer.arm}   ({answer.left} + {answer.right}; {', '.join(answer.tasks)})")
        _arms(answer.arms)
    _say(f"why      {answer.reason}")


def _show_ranking(answer: Any) -> None:
    _say(f"{answer.left} + {answer.right}; {', '.join(answer.tasks)}: {answer.arm}")
    _arms(answer.arms)
    _say(f"why      {answer.reason}")


def _arms(arms: Iterable[Any]) -> None:
    rows = [
        (
            one.arm,
            _number(one.utility),
            _interval(one.interval),
            _number(one.expected),
            _number(one.expected_sd),
            _number(one.propensity),
        )
        for one in arms
    ]
    _table(("arm", "predicted", "95 %", "with rewards", "sd", "probability"), rows, left=1)


def _show_status(answer: Any) -> None:
    _show_decision(answer.decision)
    rewarded = "" if answer.utility is None else f", utility {answer.utility:g}"
    closed = f": {answer.closed_reason}" if answer.closed_reason else ""
    _say(f"status   {answer.status}{rewarded}{closed}")
    _table(("event", "at", "what"), [(str(one.seq), _time(one.at), one.kind) for one in answer.events])


def _show_list(answer: Any) -> None:
    rows = [
        (
            one.decision_id,
            _time(one.at),
            f"{one.left} + {one.right}" if one.kind == "pair" else one.kind,
            one.arm,
            "drawn" if one.explored else "best known",
            one.status,
            _number(one.utility),
        )
        for one in answer.decisions
    ]
    _table(("decision", "at", "merge", "arm", "how", "status", "utility"), rows, left=6, whole=1)
    if answer.next_before is not None:
        _say(f"more: --before {answer.next_before}")


def _show_policy(answer: Any) -> None:
    safe = "none"
    if answer.safe is not None:
        never = answer.safe.threshold is None
        safe = f"{'never leaves' if never else 'leaves'} {answer.safe.fixed}"
        safe += "" if never else f" for a draw above its own by {answer.safe.threshold:.3f}"
    _say(f"{answer.namespace}: selector {answer.model_version}, encoder epoch {answer.epoch}, event {answer.seq}")
    counts = f"{answer.num_decisions} decisions, {answer.num_rewards} rewards, {answer.num_open} open"
    _say(f"{counts}, {answer.num_closed} closed; safe rule: {safe}; floor {answer.floor:g}")
    rows = [
        (one.arm, str(one.count), _number(one.weight), _number(one.mean), _number(one.sd), _number(one.entropy))
        for one in answer.arms
    ]
    _table(("arm", "observations", "weight", "mean contrast", "sd", "entropy"), rows, left=1)
    if answer.regret is not None:
        one = answer.regret
        _say(f"{one.num} rewards: {one.gain:+.3f} over best fixed {_interval(one.interval)} in the mean of each")
    if answer.alarm is not None and answer.alarm.linear:
        _say("ALARM: regret against best fixed grows in proportion to the decisions: nothing is learned")


def _show_catalogue(answer: Any) -> None:
    _table(("checkpoint", "task"), [(one.id, one.task or _NONE) for one in answer.checkpoints], left=2)
    _say(f"tasks  {', '.join(answer.tasks)}")
    _say(f"arms   {', '.join(answer.arms)}")


def _show_plans(answer: Any) -> None:
    rows = [(one.label, _number(one.utility), _interval(one.interval), _number(one.sd)) for one in answer.plans]
    _table(("plan", "predicted", "95 %", "sd"), rows, left=1)
    how = "all" if answer.exhaustive else "the most promising"
    _say(f"{answer.num_considered} plans considered ({how})")


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 3, whole: int = 0) -> None:
    """The first `left` columns to the left, numbers to the right; the first `whole` are never broken, to be copied.

    What the service says is text, never markup.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", overflow="fold", no_wrap=number < whole)
    for row in rows:
        table.add_row(*(Text(_printable(cell)) for cell in row))
    Console().print(table)


def _say(text: str) -> None:
    typer.echo(_printable(text))


def _printable(text: str) -> str:
    """Without characters that a terminal would obey."""
    return "".join(one if one.isprintable() else "?" for one in text)


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3f}"


def _interval(interval: Sequence[float] | None) -> str:
    return _NONE if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def _time(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")
