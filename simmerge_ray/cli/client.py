"""`simmerge client ...`: the service from a shell. Tables for people, `--json` for scripts. No torch, no Ray.

The token comes from the variable SIMMERGE_TOKEN or a file, not from an option: the list of processes shows options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.storage import read_json, read_text
from simmerge_ray.base.tables import Column, TextTable
from simmerge_ray.cli.options import set_parameters

if TYPE_CHECKING:
    from simmerge_ray.service.client import Client

client_app = typer.Typer(
    help="Ask a running service which merge to make, and report what it was worth.", no_args_is_help=True
)

AsJson = Annotated[bool, typer.Option("--json", help="the service's answer as JSON")]
Key = Annotated[str | None, typer.Option(help="idempotency key: the same again is the same call; default: a new one")]
Task = Annotated[str | None, typer.Option(help="for this task alone; default: the parents' tasks together")]
DecisionId = Annotated[str, typer.Argument(metavar="ID", help="of a decision")]
Explore = Annotated[bool, typer.Option(help="draw; --no-explore takes what is known to be best")]
Ways = Annotated[str, typer.Option(help="how many checkpoints to merge, e.g. 3 or 2-4")]
Left = Annotated[str, typer.Argument(help="checkpoint id")]
Right = Annotated[str, typer.Argument(help="checkpoint id")]
Candidates = Annotated[list[str], typer.Argument(metavar="CHECKPOINT...", help="ids to choose from")]
MeasuredUtility = Annotated[float, typer.Argument(help="measured, in [0, 1]")]
CloseReason = Annotated[str, typer.Argument(help="e.g. 'infeasible: out of memory', or 'not made'")]
VoidReason = Annotated[str, typer.Argument(help="why it was wrong")]

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


def _command(name: str, show: Callable[[Any], None] | str) -> Callable[[Callable[..., Any]], None]:
    """Make a command of a function that asks a client: it has `--json`, and prints the answer by `show`, or by that
    line with the answer's and the command's values."""

    def decorate(ask: Callable[..., Any]) -> None:
        @wraps(ask)
        def command(context: typer.Context, as_json: bool, **values: Any) -> None:
            with _client(*context.obj) as client:
                answer = ask(client, **values)
            if as_json:
                typer.echo(answer.model_dump_json(indent=2))
            elif isinstance(show, str):
                _say(show.format(**values | answer.model_dump()))
            else:
                show(answer)

        # Texts of annotations as what they mean, since typer takes a signature as it stands.
        hints = get_type_hints(ask, localns={"Client": object}, include_extras=True)
        _, *parameters = (one.replace(annotation=hints[one.name]) for one in inspect.signature(ask).parameters.values())
        keyword = inspect.Parameter.KEYWORD_ONLY
        context = inspect.Parameter("context", keyword, annotation=typer.Context)
        as_json = inspect.Parameter("as_json", keyword, default=False, annotation=AsJson)
        set_parameters(command, context, *parameters, as_json)
        client_app.command(name)(command)

    return decorate


def _client(url: str | None, token_file: Path | None, timeout: float, retries: int) -> Client:
    from simmerge_ray.service.client import Client

    token = None
    if token_file is not None:
        try:
            token = read_text(token_file).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the token file {token_file} cannot be read: {error}") from None
    return Client(url, token, timeout, retries)


def _show_decision(answer: Any) -> None:
    _say(f"decision {answer.decision_id}")
    if answer.kind == "plan":
        _say(f"plan     {answer.plan.label}")
        rows = [(one.label, *map(_number, (one.utility, one.sd, one.propensity))) for one in answer.plans or ()]
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
    rows = []
    for one in arms:
        numbers = map(_number, (one.expected, one.expected_sd, one.propensity))
        rows.append((one.arm, _number(one.utility), _interval(one.interval), *numbers))
    _table(("arm", "predicted", "95 %", "with rewards", "sd", "probability"), rows, left=1)


def _show_status(answer: Any) -> None:
    _show_decision(answer.decision)
    rewarded = "" if answer.utility is None else f", utility {answer.utility:g}"
    closed = f": {answer.closed_reason}" if answer.closed_reason else ""
    _say(f"status   {answer.status}{rewarded}{closed}")
    _table(("event", "at", "what"), [(str(one.seq), _time(one.at), one.kind) for one in answer.events])


def _show_list(answer: Any) -> None:
    rows = []
    for one in answer.decisions:
        merge = f"{one.left} + {one.right}" if one.kind == "pair" else one.kind
        how = "drawn" if one.explored else "best known"
        rows.append((one.decision_id, _time(one.at), merge, one.arm, how, one.status, _number(one.utility)))
    _table(("decision", "at", "merge", "arm", "how", "status", "utility"), rows, left=6)
    if answer.next_before is not None:
        _say(f"more: --before {answer.next_before}")


def _show_policy(answer: Any) -> None:
    safe = "none"
    if answer.safe is not None:
        safe = f"never leaves {answer.safe.fixed}"
        if answer.safe.threshold is not None:
            safe = f"leaves {answer.safe.fixed} for a draw above its own by {answer.safe.threshold:.3f}"
    _say(f"{answer.namespace}: selector {answer.model_version}, encoder epoch {answer.epoch}, event {answer.seq}")
    counts = f"{answer.num_decisions} decisions, {answer.num_rewards} rewards, {answer.num_open} open"
    _say(f"{counts}, {answer.num_closed} closed; safe rule: {safe}; floor {answer.floor:g}")
    rows = [
        (one.arm, str(one.count), *map(_number, (one.weight, one.mean, one.sd, one.entropy))) for one in answer.arms
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


def _show_kept(answer: Any) -> None:
    members = [one.checkpoint for one in answer.owners]
    rows = [
        (one.label, _number(one.score), *(f"{100 * share:.0f} %" for share in one.retention))
        for one in (*answer.plans, *answer.checkpoints)
    ]
    _table(("recipe", "score", *(f"kept of {name}" for name in members)), rows, left=1)
    _say(f"{answer.num_considered} recipes scored")


def _recipes_in(path: Path) -> list[Any]:
    """Raises ConfigError: no JSON file, or no list of objects."""
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the recipes {path} cannot be read: {error}") from None
    recipes = found if isinstance(found, list) else [found]
    if not all(isinstance(one, dict) for one in recipes):
        raise ConfigError(f"{path} must hold a recipe, or a list of recipes, as JSON objects")
    return recipes


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 3) -> None:
    """The first `left` columns to the left, numbers to the right. The service's text is never markup."""
    from rich.console import Console

    every = [Column(name, right=number >= left) for number, name in enumerate(columns)]
    shown = [[_printable(cell) for cell in row] for row in rows]
    TextTable("", every, shown).print(Console(markup=False, highlight=False, emoji=False))


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


@_command("decide", _show_decision)
def decide_arm(
    client: Client, left: Left, right: Right, task: Task = None, explore: Explore = True, key: Key = None
) -> Any:
    """Which operator should merge two checkpoints? The decision is logged and waits for its reward."""
    return client.decide(left, right, task, explore, key=key)


@_command("decide-plan", _show_decision)
def decide_plan(
    client: Client,
    checkpoints: Candidates,
    ways: Ways = "2-4",
    task: Task = None,
    explore: Explore = True,
    key: Key = None,
) -> Any:
    """Which plan should merge some of these checkpoints? The decision is logged and waits for its reward."""
    return client.decide_plan(checkpoints, ways, task, explore, key=key)


@_command("reward", "reward {utility:g} of {decision_id}: {status}")
def reward(client: Client, decision_id: DecisionId, utility: MeasuredUtility, key: Key = None) -> Any:
    """Report what the merge of a decision was worth."""
    return client.reward(decision_id, utility, key)


@_command("close", "{decision_id} closed: {status}")
def close(client: Client, decision_id: DecisionId, reason: CloseReason, key: Key = None) -> Any:
    """Say that no reward will come for a decision."""
    return client.close(decision_id, reason, key)


@_command("void", "reward of {decision_id} voided: {status}")
def void(client: Client, decision_id: DecisionId, reason: VoidReason, key: Key = None) -> Any:
    """Take back a wrong reward; another may follow."""
    return client.void(decision_id, reason, key)


@_command("get", _show_status)
def get(client: Client, decision_id: DecisionId) -> Any:
    """A decision, and what became of it."""
    return client.get(decision_id)


@_command("list", _show_list)
def list_decisions(
    client: Client,
    limit: Annotated[int, typer.Option(min=1, help="at most this many")] = 20,
    before: Annotated[int | None, typer.Option(help="only those before this event")] = None,
) -> Any:
    """The newest decisions."""
    return client.decisions(limit, before)


@_command("policy", _show_policy)
def policy(client: Client) -> Any:
    """What the service has learned so far."""
    return client.policy()


@_command("catalogue", _show_catalogue)
def catalogue(client: Client) -> Any:
    """Checkpoints, tasks and arms that may be named."""
    return client.catalogue()


@_command("best-recipes", _show_kept)
def best_recipes(
    client: Client,
    checkpoints: Annotated[
        list[str] | None, typer.Argument(metavar="[CHECKPOINT...]", help="ids to merge; default: all")
    ] = None,
    ways: Ways = "2-4",
    task: Task = None,
    top: Annotated[int, typer.Option(min=1, help="how many recipes")] = 10,
) -> Any:
    """The recipes that keep most of their members' own answers, and the checkpoints as they are."""
    return client.best_recipes(checkpoints or None, ways, task, top)


@_command("score-recipes", _show_kept)
def score_recipes(
    client: Client,
    recipes: Annotated[Path, typer.Argument(metavar="FILE", help="JSON: a recipe, or a list of them")],
    task: Task = None,
) -> Any:
    """What recipes keep of their members' own answers, the best first."""
    return client.score_recipes(_recipes_in(recipes), task)


@_command("plans", _show_plans)
def plans(
    client: Client,
    checkpoints: Annotated[
        list[str] | None, typer.Argument(metavar="[CHECKPOINT...]", help="ids to choose from; default: all")
    ] = None,
    ways: Ways = "2-4",
    task: Task = None,
    top: Annotated[int, typer.Option(min=1, help="how many plans")] = 10,
) -> Any:
    """Ranked plans; nothing is decided."""
    return client.plans(checkpoints or None, ways, task, top)


@_command("rank", _show_ranking)
def rank(client: Client, left: Left, right: Right, task: Task = None) -> Any:
    """Ranked arms for two checkpoints; nothing is decided."""
    return client.rank(left, right, task)


@_command("add-arm", "arm {arm}: {status}")
def add_arm(
    client: Client,
    arm: Annotated[str, typer.Argument(help="e.g. 'ties(density=0.2)'")],
    sibling: Annotated[str | None, typer.Option(help="a known arm that it is expected to be like")] = None,
    power: Annotated[float, typer.Option(min=0, max=1, help="how much of what that has learned counts")] = 0.3,
    key: Key = None,
) -> Any:
    """Let an operator be chosen from now on."""
    return client.add_arm(arm, sibling, power, key)
