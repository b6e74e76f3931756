"""The command line: every command with its options. Each parses, calls one function of the package,
which owns the defaults, and prints the result.

Nothing heavy is imported before a command needs it. Exit codes: 0; 1 an error of ours or of the
system, one clear line; 2 usage; 130 and 143 after SIGINT and SIGTERM; anything else is a bug and
shows its traceback.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from kdcache import __version__
from kdcache.bench.races import RACES, Race
from kdcache.console import (
    FOLDER,
    PATH,
    Door,
    Once,
    StderrLog,
    at_work,
    config_and_json,
    given_options,
    lines,
    print_line,
    print_result,
    shown,
    size,
)
from kdcache.errors import KDCacheError, UsageError
from kdcache.process.ranks import this_rank

F = TypeVar("F", bound=Callable[..., Any])
CACHE = click.argument("cache", type=PATH)
COUNT = click.IntRange(min=1)
DTYPES = click.Choice(["float32", "bfloat16", "float16"])


def model_options(role: str, required: bool) -> Callable[[F], F]:
    """`--teacher SPEC --teacher-arg --teacher-weights`, or the student's."""

    def add(function: F) -> F:
        function = click.option(
            f"--{role}-weights",
            type=PATH,
            metavar="FILE",
            help="A .safetensors file, or a .pt file of plain tensors, loaded into it.",
        )(function)
        function = click.option(
            f"--{role}-arg",
            multiple=True,
            metavar="KEY=VALUE",
            help=f"Argument of the {role}, as JSON where it is JSON. Repeatable.",
        )(function)
        return click.option(
            f"--{role}",
            required=required,
            metavar="SPEC",
            help="hf:PATH_OR_ID, hf-config:PATH, "
            "timm:NAME, torchvision:NAME, file.py:name or package.module:name.",
        )(function)

    return add


def data_options(name: str, required: bool, what: str) -> Callable[[F], F]:
    """`--data SPEC --data-arg`, or those of another dataset."""

    def add(function: F) -> F:
        function = click.option(
            f"--{name}-arg",
            multiple=True,
            metavar="KEY=VALUE",
            help="Argument of that dataset. Repeatable.",
        )(function)
        return click.option(f"--{name}", required=required, metavar="SPEC", help=what)(function)

    return add


def device_option(function: F) -> F:
    return click.option("--device", help="cpu, cuda, cuda:1 ...  [default: cuda if there is one]")(
        function
    )


def run_options(function: F) -> F:
    """`--device --workers`: where and with how much help it runs."""
    function = click.option(
        "--workers", type=click.IntRange(min=0), help="Processes that build samples."
    )(function)
    return device_option(function)


DUMPED = (
    "out",
    "content_id",
    "num_records",
    "predicted_bytes",
    "bytes",
    "seconds",
    "covered_mass",
    "truncation_kl",
    "quantisation_kl",
    "accuracy",
    "warnings",
)
TRAINED = (
    "out",
    "finished",
    "steps",
    "epochs",
    "training",
    "last",
    "best_by",
    "best",
    "seconds",
    "samples_per_second",
)
DATA = "digits, imagefolder:PATH, text:GLOB, npz:PATH, file.py:name or package.module:name."


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


@main.command("dump-teacher")
@model_options("teacher", required=True)
@data_options("data", True, DATA)
@click.option(
    "--out", type=FOLDER, required=True, metavar="CACHE", help="Folder to create, or to continue."
)
@click.option(
    "--kind",
    metavar="KIND",
    help="full, topk or none (features only).  [default: full for up to 1024 classes, else topk]",
)
@click.option("--k", type=COUNT, help="Entries kept of a row.  [default: 64]")
@click.option(
    "--classes",
    type=COUNT,
    metavar="N",
    help="The first N logits of the teacher are its classes, the rest "
    "is padding that nothing uses.  [default: all]",
)
@click.option(
    "--tier",
    type=COUNT,
    multiple=True,
    metavar="K",
    help="Also readable as this smaller k. Repeatable.",
)
@click.option(
    "--temperature",
    type=float,
    multiple=True,
    metavar="T",
    help="Temperature whose tails are stored. Repeatable.  [default: 1, 2, 4; for tokens 1, 2]",
)
@click.option(
    "--values", metavar="DTYPE", help="float32, bfloat16, float16 or uint8.  [default: float16]"
)
@click.option(
    "--feature",
    multiple=True,
    metavar="MODULE[:RECIPE[:DTYPE]]",
    help="Keep this activation of the "
    "teacher: recipe raw, map, pool, cls, last or energy. Repeatable.",
)
@click.option(
    "--rows",
    metavar="NAME",
    help="What a row is: record, position or next-token.  [default: by the shape "
    "of the logits, the task, or a look at whether the teacher is causal]",
)
@click.option(
    "--tokens/--no-tokens",
    default=None,
    help="Keep token ids, so that stage 2 needs no data.  [default: if "
    "they are all that the teacher is given]",
)
@click.option(
    "--labels/--no-labels",
    default=None,
    help="Store the labels of the data.  [default: if it has any]",
)
@click.option(
    "--moments", is_flag=True, help="Store mean and standard deviation of each row's logits."
)
@click.option(
    "--views", type=COUNT, metavar="N", help="Augmented views of each sample.  [default: 1]"
)
@click.option(
    "--format",
    type=click.Choice(["arrow", "hdf5"]),
    help="Container of the shards.  [default: arrow]",
)
@click.option(
    "--shard-size", type=size, metavar="SIZE", help="Wanted size of a shard, such as 64MB."
)
@click.option("--records-per-shard", type=COUNT, metavar="N", help="Instead of a shard size.")
@click.option("--batch-size", type=COUNT, help="Records per forward pass.")
@click.option(
    "--dtype",
    type=DTYPES,
    help="The teacher computes in this.  [default: what its weights are stored in]",
)
@click.option(
    "--engine",
    metavar="NAME",
    help="auto (torch so far), torch or triton (fused top-k).  [default: auto]",
)
@run_options
@click.option("--seed", type=click.IntRange(min=0), help="Decides the views.  [default: 0]")
@click.option(
    "--accept",
    multiple=True,
    metavar="FIELD",
    help="A difference in this field is harmless; unsteady: keep "
    "the answers of a teacher that are left to chance; answers: go on though it says something "
    "else about committed records. Repeatable.",
)
@click.option(
    "--dry-run", is_flag=True, help="Say what would be written and how large, and write nothing."
)
@config_and_json
def dump_teacher(as_json: bool, **options: Any) -> None:
    """Stage 1: run the teacher once over the data and write what it says to CACHE. The same command
    again continues.
    """
    from kdcache.teacher.dump import dump_teacher as function
    from kdcache.teacher.progress import StderrProgress

    chosen = given_options(
        options, tier="tiers", temperature="temperatures", feature="features", format="container"
    )
    with at_work():
        result = function(**chosen, progress=StderrProgress(rank=this_rank().rank))
    print_result(result, as_json, partial(lines, only=DUMPED))


@main.command("train-student")
@click.option("--cache", type=PATH, multiple=True, metavar="CACHE", help="What dump-teacher wrote.")
@model_options("student", required=True)
@click.option(
    "--out", type=FOLDER, required=True, metavar="RUN", help="Folder to create, or to continue."
)
@data_options("data", False, DATA + "  [default: the tokens of a token cache]")
@data_options("eval-data", False, "Evaluate on this dataset, given like --data.")
@click.option(
    "--rows",
    metavar="NAME",
    help="What a row is where no cache says so: record, position or next-token.  "
    "[default: by the logits, the task, or a look at whether the student is causal]",
)
@click.option("--temperature", type=float, metavar="T", help="[default: 2 for rows, 1 for tokens]")
@click.option("--k", type=COUNT, help="Read this tier of the cache.  [default: the largest]")
@click.option(
    "--classes",
    type=COUNT,
    metavar="N",
    help="The first N logits of the student are its classes, the rest is padding.  [default: all]",
)
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1),
    help="Weight of the soft loss; 0 is plain training.  "
    "[default: 0.5; 1 for a cache without labels]",
)
@click.option(
    "--ce-weight",
    type=click.FloatRange(min=0),
    help="Weight of the hard loss.  [default: 1 - alpha]",
)
@click.option(
    "--kd-weight", type=click.FloatRange(min=0), help="Weight of the soft loss.  [default: alpha]"
)
@click.option(
    "--divergence", metavar="NAME", help="forward_kl, reverse_kl, jsd or tv.  [default: forward_kl]"
)
@click.option(
    "--beta",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="The teacher's part in the mixture of jsd.  [default: 0.5]",
)
@click.option(
    "--tail", metavar="NAME", help="bucket, renormalise, conditional or uniform.  [default: bucket]"
)
@click.option(
    "--match",
    multiple=True,
    metavar="STUDENT_MODULE=FEATURE:LOSS[:WEIGHT]",
    help="Pull this activation of the student towards a cached feature. Repeatable.",
)
@click.option(
    "--engine",
    metavar="NAME",
    help="auto (torch so far), torch or triton (fused kernels). [default: auto]",
)
@click.option(
    "--logits-memory",
    metavar="SIZE",
    help='"512 MB": run the head of a language model inside the loss, in '
    "chunks of rows whose logits take this much.  [default: logits are whole]",
)
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), help="Passes over the data.")
@click.option("--max-steps", type=COUNT, help="Optimizer steps, instead of epochs.")
@click.option(
    "--batch-size", type=COUNT, help="Records per optimizer step, over all ranks.  [default: 128]"
)
@click.option(
    "--micro-batch-size", type=COUNT, help="Records per forward pass.  [default: all of the step]"
)
@click.option("--optimizer", metavar="NAME", help="adamw, adam or sgd.  [default: adamw]")
@click.option("--lr", type=click.FloatRange(min=0), help="Peak learning rate.  [default: 0.001]")
@click.option(
    "--weight-decay",
    type=click.FloatRange(min=0),
    help="None on biases and norms.  [default: 0.01 for adamw, else 0]",
)
@click.option(
    "--warmup",
    type=click.FloatRange(min=0),
    help="Steps, or a part of all steps below 1.  [default: 0]",
)
@click.option(
    "--clip",
    type=click.FloatRange(min=0),
    metavar="NORM",
    help="Largest norm of the gradient.  [default: 0, none]",
)
@click.option(
    "--precision",
    metavar="NAME",
    help="float32, bfloat16 or float16 (autocast; float16 on a GPU only).  [default: float32]",
)
@click.option("--compile", is_flag=True, help="torch.compile the student.")
@run_options
@click.option(
    "--seed", type=click.IntRange(min=0), help="Decides initial weights and order.  [default: 0]"
)
@click.option("--deterministic", is_flag=True, help="Refuse operations that vary from run to run.")
@click.option("--shuffle/--no-shuffle", default=None, help="[default: shuffle]")
@click.option("--eval-every", type=COUNT, metavar="STEPS", help="[default: once an epoch]")
@click.option("--save-every", type=COUNT, metavar="STEPS", help="[default: once an epoch]")
@click.option(
    "--best-by",
    metavar="METRIC",
    help="What decides the best checkpoint.  [default: eval_accuracy, for tokens eval_loss]",
)
@click.option(
    "--report-to", multiple=True, metavar="NAME", help="tensorboard or wandb. Repeatable."
)
@click.option(
    "--accept",
    multiple=True,
    metavar="FIELD",
    help="A difference in this field is harmless. Repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, train nothing.")
@config_and_json
def train_student(as_json: bool, **options: Any) -> None:
    """Stage 2: train a student from CACHE (or, with --alpha 0, without one). The same command again
    continues.
    """
    from kdcache.student.train import train_student as function

    with at_work():
        result = function(**given_options(options), say=print_line)
    print_result(result, as_json, partial(lines, only=TRAINED))


@main.command()
@model_options("student", required=True)
@data_options("data", True, DATA)
@click.option(
    "--classes",
    type=COUNT,
    metavar="N",
    help="The first N logits are classes, the rest is padding.  "
    "[default: all, or as the run was trained]",
)
@click.option("--batch-size", type=COUNT, help="Records per forward pass.  [default: 128]")
@click.option(
    "--student-code",
    metavar="SPEC",
    help="The code of a RUN's student, file.py:name or "
    "package.module:name: a folder's word alone runs none.",
)
@click.option(
    "--precision",
    metavar="NAME",
    help="float32, bfloat16 or float16.  [default: float32, or the RUN's]",
)
@click.option(
    "--rows",
    metavar="NAME",
    help="What a row is: record, position or next-token.  [default: as a run "
    "knows, or as dump-teacher finds it]",
)
@click.option(
    "--accept",
    multiple=True,
    metavar="FIELD",
    help="class_names or tokenizer: a difference is harmless. Repeatable.",
)
@run_options
@config_and_json
def evaluate(as_json: bool, **options: Any) -> None:
    """Loss and accuracy (or perplexity) on labelled data: of a model, or of --student RUN (its
    best/; or RUN/last).
    """
    from kdcache.student.evaluate import evaluate as function

    with at_work():
        result = function(**given_options(options))
    print_result(result, as_json, lines)


@main.command()
@CACHE
@click.option("--quick", is_flag=True, help="Sizes and the proofs of commitment, not every byte.")
@model_options("teacher", required=False)
@data_options("data", False, DATA)
@click.option(
    "--samples", type=COUNT, metavar="N", help="Records the teacher sees again.  [default: 32]"
)
@click.option(
    "--dtype", type=DTYPES, help="The teacher computes in this.  [default: as it did for the cache]"
)
@device_option
@config_and_json
def verify(as_json: bool, **options: Any) -> None:
    """Check every digest of CACHE and that no file is foreign; with --teacher, that the teacher
    still says the same.
    """
    from kdcache.teacher.verify import verify as function

    with at_work():
        result = function(**given_options(options))
    print_result(result, as_json, lines)
    if not result.ok:
        said = "; ".join([*result.problems, *([result.advice] if result.advice else [])])
        click.echo(f"Error: {options['cache']} is not as it should be: {shown(said)}", err=True)
        click.get_current_context().exit(1)


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
        result = module.inspect(**given_options(options))
    print_result(result, as_json, module.render)


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

    chosen = given_options(options)
    with at_work():
        content_id = function(chosen["cache"], chosen["out"], container=chosen.get("format"))
    print_result({"out": chosen["out"], "content_id": content_id}, as_json, lines)


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
        result = module.report(**given_options(options))
    print_result(result, as_json, module.render)


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
        result = module.demo(**given_options(options), say=print_line)
    print_result(result, as_json, module.render)


@main.command()
@config_and_json
def env(as_json: bool) -> None:
    """Versions, CPUs, GPUs, and the engine that would run."""
    from kdcache import env as module

    print_result(module.env(), as_json, module.render)


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
            result = getattr(module, race.module)(**given_options(options))
        if results is not None:
            print_line(f"kept in {save(result, results)}")
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
