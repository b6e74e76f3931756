"""The command line: parse, call one function of the package, translate our errors, print the
result.

Nothing heavy is imported before a command needs it. Exit codes: 0; 1 an error of ours or of the
system, one clear line; 2 usage; 130 and 143 after SIGINT and SIGTERM; anything else is a bug and
shows its traceback.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from kdcache import __version__
from kdcache.bench.races import RACES, Race
from kdcache.commands import dump_teacher, evaluate, train_student, verify
from kdcache.errors import KDCacheError, UsageError
from kdcache.options import PATH, Once, answer, at_work, config_and_json, given, lines, shown, tell
from kdcache.process.early import at_once, put_back
from kdcache.process.ranks import this_rank
from kdcache.process.streams import hold, lost
from kdcache.user.guard import interrupted

CACHE = click.argument("cache", type=PATH)


class StderrLog(logging.Handler):
    """What the package logs, on the standard error of the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(shown(self.format(record)), err=True)


class Door(click.Group):
    """A group whose commands end in one line and an exit code when they meet an error that is not a
    bug.
    """

    command_class = Once

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """As click's, of a program whose streams may go away."""
        if not kwargs.get("standalone_mode", True):
            return super().main(*args, **kwargs)
        handlers = at_once()
        hold()
        try:
            super().main(*args, **kwargs)
        except SystemExit as e:
            sys.stdout.flush()
            error = lost(sys.stdout)
            if e.code not in (0, None) or error is None or isinstance(error, BrokenPipeError):
                raise  # a broken pipe: `| head` has seen enough
            click.echo(
                f"Error: the command did its work, but standard output took not all of it: {error}",
                err=True,
            )
            sys.exit(1)
        finally:
            put_back(handlers)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            # whether or not the command asks for it: who else would answer?
            this_rank()
            return super().invoke(ctx)
        except KDCacheError as e:
            refuse(ctx, str(e), e.exit_code)
        # a full disk, a folder that may not be read: no bug of ours
        except OSError as e:
            refuse(ctx, str(e), 1)
        except KeyboardInterrupt:
            refuse(ctx, "interrupted", 130)
        except BaseException as e:
            if (signal := interrupted(e)) is None:
                raise
            refuse(ctx, str(signal), signal.exit_code)  # which a library wrapped


def refuse(ctx: click.Context, message: str, exit_code: int) -> NoReturn:
    click.echo(f"Error: {shown(message)}", err=True)
    ctx.exit(exit_code)


@click.group(
    cls=Door, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="kdcache")
def main() -> None:
    """Knowledge distillation from a cached teacher.

    Run the teacher once (dump-teacher), then train many students from what it said (train-student).
    """
    log = logging.getLogger("kdcache")
    log.setLevel(logging.INFO)
    if not any(isinstance(handler, StderrLog) for handler in log.handlers):
        log.addHandler(StderrLog())


for two_stages in (dump_teacher, train_student, evaluate, verify):
    main.add_command(two_stages)


@main.command()
@CACHE
@click.argument("other", type=PATH, required=False)
@click.option(
    "--record",
    type=click.IntRange(min=0),
    metavar="N",
    help="Show what the teacher said about record N.",
)
@click.option(
    "--tokenizer",
    metavar="PATH",
    help="Show token ids as text with this tokenizer, if it is the cache's.",
)
@click.option(
    "--data",
    metavar="SPEC",
    help="Check the record's key against this dataset; take class names from it.",
)
@click.option(
    "--data-arg", multiple=True, metavar="KEY=VALUE", help="Argument of the dataset. Repeatable."
)
@config_and_json
def inspect(as_json: bool, **options: Any) -> None:
    """Say what is in CACHE, whose it is, how large, and how good; with OTHER, how the two differ."""
    from kdcache import inspect as module

    with at_work():
        result = module.inspect(**given(options))
    answer(result, as_json, module.render)


@main.command()
@CACHE
@click.argument("out", type=PATH)
@click.option(
    "--format",
    type=click.Choice(["arrow", "hdf5"]),
    help="Container of the copy.  [default: the other one]",
)
@config_and_json
def convert(as_json: bool, **options: Any) -> None:
    """Copy CACHE to OUT in the other container: lossless, and with the same content id."""
    from kdcache.cache.convert import convert as function

    chosen = given(options)
    with at_work():
        content_id = function(chosen["cache"], chosen["out"], container=chosen.get("format"))
    answer({"out": chosen["out"], "content_id": content_id}, as_json, lines)


@main.command()
@click.argument("runs", type=PATH, nargs=-1, required=True)
@click.option(
    "--by",
    multiple=True,
    metavar="OPTION",
    help="Group by this option alone. Repeatable.  "
    "[default: every option that differs between the runs, except the seed]",
)
@click.option("--sort", metavar="METRIC", help="Best first by this metric.")
@click.option(
    "--plot",
    type=PATH,
    metavar="FILE",
    help="Also draw the sorted metric over the first --by option.",
)
@config_and_json
def report(as_json: bool, **options: Any) -> None:
    """Compare training runs: mean and spread over seeds of every metric, for each setting of the
    options.
    """
    from kdcache import report as module

    with at_work():
        result = module.report(**given(options))
    answer(result, as_json, module.render)


@main.command()
@click.option(
    "--out",
    type=PATH,
    metavar="FOLDER",
    help="Where cache, runs, table and plot go.  [default: demo-out]",
)
@click.option("--seeds", type=click.IntRange(min=1), help="Students of each kind.  [default: 5]")
@config_and_json
def demo(as_json: bool, **options: Any) -> None:
    """Both stages on scikit-learn's handwritten digits, from nothing to a table and a plot, in
    minutes on a CPU.
    """
    from kdcache import demo as module

    with at_work():
        result = module.demo(**given(options), say=tell)
    answer(result, as_json, module.render)


@main.command()
@config_and_json
def env(as_json: bool) -> None:
    """Versions, CPUs, GPUs, and the engine that would run."""
    from kdcache import env as module

    answer(module.env(), as_json, module.render)


@main.group()
def bench() -> None:
    """Races against bare alternatives, each ending in one JSON line."""


RACE_OPTIONS = {
    "folder": click.option(
        "--folder", type=PATH, help="Where the caches are written.  [default: a temporary folder]"
    ),
    "device": click.option(
        "--device", help="cpu, cuda, cuda:1 ...  [default: cuda if there is one]"
    ),
    "plot": click.option(
        "--plot", type=PATH, metavar="FILE", help="Also draw rates over the classes, with the roof."
    ),
}


def _race_command(race: Race) -> click.Command:
    """A benchmark as a command."""

    def run(as_json: bool, results: Path | None, plot: Path | None = None, **options: Any) -> None:
        from kdcache.bench.race import json_line, save

        if plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise UsageError("--plot needs matplotlib: pip install 'kdcache[plot]'")
        module = importlib.import_module(f"kdcache.bench.{race.module}")
        with at_work():
            result = getattr(module, race.module)(**given(options))
        if results is not None:
            tell(f"kept in {save(result, results)}")
        if not as_json:
            click.echo(shown(module.render(result)))
        click.echo(json_line(result))
        if plot is not None:
            module.draw(result, plot)
        if result.get("errors"):
            raise KDCacheError("; ".join(result["errors"]))

    for option in reversed(race.options):
        run = RACE_OPTIONS[option](run)
    run = click.option("--json", "as_json", is_flag=True, help="The JSON line alone.")(run)
    run = click.option(
        "--results", type=PATH, metavar="FOLDER", help="Keep the JSON line there, dated."
    )(run)
    run = click.option("--rounds", type=click.IntRange(min=1), help="Turns of each contender.")(run)
    run = click.option(
        "--quick", is_flag=True, help="Tiny sizes: shows that it works, measures nothing."
    )(run)
    return click.command(race.name, cls=Once, help=race.help)(run)


for one_race in RACES:
    bench.add_command(_race_command(one_race))


if __name__ == "__main__":
    main()
