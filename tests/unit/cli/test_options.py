"""Options of a command are made from configs: flags, defaults, bounds, and errors that name the option as typed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from simmerge_ray.base.config import FrozenConfig, Pair, Ways, check_config, option
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.storage import Place, RemotePath
from simmerge_ray.cli.options import with_config_options
from simmerge_ray.cli.places import PathOrUri, place_argument


class Kettle(FrozenConfig):
    """One of each kind of field."""

    size: Literal["small", "large"] = option("small", "of the kettle", panel="Kettle")
    num_cups: int = option(2, "cups to boil", flag="cups", ge=1, le=9)
    litres: float | None = option(None, "default: what the cups hold", gt=0)
    teas: tuple[str, ...] = option(("green", "black"), "repeatable", flag="tea", min_length=1)
    avoid: tuple[Pair, ...] = option((), "LEFT,RIGHT")
    ways: Ways = option((2, 3), "teas of a mixture", shown="2-3")
    whistle: bool = option(True, "when it boils")
    loud: bool = option(False, "the whistle")
    water: Place | None = option(None, "where it is")
    recipe: Path | None = option(None, "a file")
    altitude: float = 0.0


class Table(FrozenConfig):
    """A second config."""

    legs: int = option(..., "no default")


def called(*arguments: str) -> Any:
    """What a command is called with, or its exit code and output."""
    calls: list[Any] = []

    def command(place: PathOrUri, kettle: Kettle, table: Table, cloth: str = "white") -> None:
        """Make tea."""
        calls.append((place, kettle, table, cloth))

    command.__annotations__ = {
        "place": Annotated[PathOrUri, place_argument(help="where")],
        "kettle": Kettle,
        "table": Table,
        "cloth": str,
    }
    app = typer.Typer()
    app.command()(with_config_options(command))
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "140", "NO_COLOR": "1"})
    if isinstance(result.exception, ConfigError):
        raise result.exception
    return calls[0] if calls else (result.exit_code, result.output)


def test_without_options_a_config_has_its_defaults():
    assert called("here", "--legs", "4") == (Path("here"), Kettle(), Table(legs=4), "white")


def test_options_fill_the_fields():
    given = (
        "here --legs 3 --cloth red --size large --cups 5 --litres 1.5 --tea oolong --tea white --avoid a,b --avoid c,d "
        "--ways 4 --no-whistle --loud --water s3://lake/shore --recipe tea.txt"
    )
    _, kettle, table, cloth = called(*given.split())
    assert kettle == Kettle(
        size="large",
        num_cups=5,
        litres=1.5,
        teas=("oolong", "white"),
        avoid=(("a", "b"), ("c", "d")),
        ways=(4, 4),
        whistle=False,
        loud=True,
        water=RemotePath("s3", "lake/shore"),
        recipe=Path("tea.txt").resolve(),
    )
    assert table.legs == 3 and cloth == "red"


def test_help_shows_flags_defaults_bounds_and_panels():
    code, output = called("--help")
    assert code == 0 and "Make tea." in output
    rows = {words[1]: line for line in output.splitlines() if len(words := line.replace("*", " ").split()) > 1}
    assert (
        "small|large" in rows["--size"] and "[default: small]" in rows["--size"] and "of the kettle" in rows["--size"]
    )
    assert "1<=x<=9" in rows["--cups"] and "[default: 2]" in rows["--cups"]
    assert "[default: green, black]" in rows["--tea"] and "[default: 2-3]" in rows["--ways"]
    assert "default: what the cups hold" in rows["--litres"] and "[required]" in rows["--legs"]
    assert "--no-whistle" in rows["--whistle"] and "--no-loud" not in output
    assert "PATH|URI" in rows["--water"] and "Kettle" in rows and "altitude" not in output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--size huge", "'--size'"),
        ("--size huge", "'huge' is not one of 'small', 'large'"),
        ("--cups 10", "'--cups'"),
        ("--cups few", "'--cups'"),
        ("--sise large", "No such option: --sise"),
        ("--altitude 3", "No such option: --altitude"),
        ("--water s3://", "names no bucket"),
    ],
)
def test_what_typer_can_see_is_refused_before_the_config(options, said):
    code, output = called("here", "--legs", "4", *options.split())
    assert code == 2 and said in " ".join(output.replace("│", " ").split())


def test_errors_of_the_config_name_the_options_all_in_one():
    with pytest.raises(ConfigError) as caught:
        called(*["here", "--legs", "4", "--litres", "0", "--avoid", "a", "--tea", "x", "--ways", "2-x"])
    assert str(caught.value).splitlines() == [
        "options:",
        "  --litres: Input should be greater than 0, got 0.0",
        "  --avoid: a pair is LEFT,RIGHT, got 'a'",
        "  --ways: ways is a number of checkpoints or a range, 3 or 2-4, got '2-x'",
    ]


def test_a_config_of_yaml_knows_nothing_of_options():
    with pytest.raises(ConfigError, match="'num_cups': Input should be less than or equal to 9, got 10"):
        check_config(Kettle, {"num_cups": 10}, "config tea.yaml")
    assert check_config(Kettle, {"ways": [2, 3], "altitude": 3}, "config tea.yaml") == Kettle(altitude=3)
