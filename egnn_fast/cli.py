"""The ``egnn-fast`` command.

Each command imports PyTorch and other slow modules itself, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import platform
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from egnn_fast import __version__
from egnn_fast.experiments.errors import ExperimentError, UsageError
from egnn_fast.experiments.nbody.config import MAX_TRAIN_SYSTEMS, Config
from egnn_fast.runtime.backend_names import AUTO, BACKENDS

if TYPE_CHECKING:
    from egnn_fast.checks import EquivarianceRow, Report, Row

app = typer.Typer(
    name="egnn-fast",
    help="E(n)-equivariant graph networks with fused kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train_app = typer.Typer(help="Train a published experiment.", no_args_is_help=True)
app.add_typer(train_app, name="train")

# exit codes
INTERRUPTED = 130
USAGE = 2
# click's base error; typer may use its own copy of click
_CommandLineError: Any = typer.BadParameter.__base__


class Backend(str, Enum):
    """Values of ``--backend``."""

    _ignore_ = "name"
    for name in (AUTO, *BACKENDS):
        vars()[name] = name


class DType(str, Enum):
    """Values of ``--dtype``."""

    float64 = "float64"
    float32 = "float32"


class Precision(str, Enum):
    """Values of ``--precision``, as Lightning Fabric names them."""

    single = "32-true"
    double = "64-true"
    bf16 = "bf16-mixed"


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit; every expected error is one line on stderr."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        code = app(args, standalone_mode=False)
    except _CommandLineError as error:
        if message := error.format_message():  # empty if the help was printed instead
            _print_error(errors, message)
        code = USAGE
    except ExperimentError as error:
        _print_error(errors, str(error))
        code = error.exit_code
    except OSError as error:
        _print_error(errors, str(error))
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _print_error(console: Console, message: str) -> None:
    # rich would read brackets in a str as markup
    console.print(Text.assemble(("error: ", "bold red"), " ".join(message.split())))


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which backends work here, and why the others do not."""
    import torch

    from egnn_fast import backends
    from egnn_fast.experiments.io import cache_folder

    lines = backends.info()
    facts = {
        "egnn_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "cache": str(cache_folder()),
    }
    if as_json:
        rows = [line._asdict() for line in lines]
        typer.echo(json.dumps({**facts, "backends": rows}, indent=2))
        return
    console = Console(highlight=False)
    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        grid.add_row(name, value)
    console.print(grid)
    table = Table("backend", "available", "state")
    for line in lines:
        available = "[green]yes[/]" if line.available else "[yellow]no[/]"
        table.add_row(line.name, available, Text(line.reason))
    console.print(table)


@app.command()
def check(
    backend: Annotated[
        list[Backend] | None,
        typer.Option(help="Backend to check; may be repeated.", show_default="all available"),
    ] = None,
    dtype: Annotated[
        list[DType] | None,
        typer.Option(help="Dtype to check; may be repeated.", show_default="both"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare every backend with the reference: outputs, gradients, second order, equivariance.

    Exits with 1 if an error is larger than its bound.
    """
    import torch

    from egnn_fast import checks
    from egnn_fast.backends import BackendError

    console = Console(highlight=False)
    names = None if backend is None else [name.value for name in backend]
    dtypes = None if dtype is None else [getattr(torch, name.value) for name in dtype]
    with console.status("checking") as status:
        try:
            report = checks.run(
                names, dtypes, quick, lambda case: status.update(f"checking: {case}")
            )
        except (BackendError, ValueError) as error:
            raise UsageError(str(error)) from error
    if as_json:
        typer.echo(report.to_json())
    else:
        _print_report(report, console)
    if not report.passed:
        raise typer.Exit(1)


def _print_report(report: Report, console: Console) -> None:
    """Print each error and its share of the bound: a table by case, and one by dimension."""
    console.print(
        _pivot(
            "max|a - b| / max|b| against the float64 reference, and its share of the bound",
            ("backend", "dtype", "case"),
            [((r.backend, r.dtype, r.case), r.quantity, r) for r in report.rows],
        ),
        _pivot(
            "Distance from equivariance, and its share of the bound",
            ("backend", "dtype", "D"),
            [((r.backend, r.dtype, str(r.dim)), r.symmetry, r) for r in report.equivariance],
        ),
    )
    for name, reason in report.missing.items():
        console.print(Text.assemble((f"not checked: {name}", "yellow"), f" ({reason})"))
    lines: list[Row | EquivarianceRow] = [*report.rows, *report.equivariance]
    failed = sum(not line.passed for line in lines)
    verdict = ("PASSED", "bold green") if report.passed else ("FAILED", "bold red")
    count = f": {len(lines) - failed} of {len(lines)} within bounds, {report.seconds:.0f} s"
    console.print(Text.assemble(verdict, count))


def _pivot(
    title: str,
    keys: tuple[str, ...],
    cells: list[tuple[tuple[str, ...], str, Row | EquivarianceRow]],
) -> Table:
    """A table of errors: a line for each key, a column for each quantity.

    ``cells`` are (key, column, row) in the order in which keys and columns shall appear.
    """
    table = Table(*keys, title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    columns = list(dict.fromkeys(column for _, column, _ in cells))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    lines: dict[tuple[str, ...], dict[str, Text]] = {}
    for key, column, row in cells:
        style = "" if row.passed else "bold red"
        lines.setdefault(key, {})[column] = Text(
            f"{row.error:.1e} {row.error / row.bound:4.0%}", style=style
        )
    for key, errors in lines.items():
        table.add_row(*key, *(errors.get(column, "") for column in columns))
    return table


@app.command()
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Few cases, few samples: under a minute.")
    ] = False,
    case: Annotated[
        list[str] | None,
        typer.Option(
            help="A case of --list, or a pattern such as 'growth-*'; may be repeated.",
            show_default="all",
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Peer to compare with: reference, official, compile, egnn-pytorch, "
            "egnn-pytorch-sparse; may be repeated.",
            show_default="all installed",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads of PyTorch and of the kernels.", show_default="PyTorch's"),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(help="Samples of each median.", show_default="7; 3 with --quick"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.json and pictures.")] = Path(
        "runs/bench"
    ),
    show_list: Annotated[bool, typer.Option("--list", help="Show the cases and exit.")] = False,
) -> None:
    """Time the kernels and, beside them, plain PyTorch and other packages.

    A case is timed only if its results are correct. Exits with 1 if a check fails.
    """
    from egnn_fast.bench.command import command, show_cases

    console = Console(highlight=False)
    if show_list:
        show_cases(console)
        return
    try:
        passed = command(
            console,
            patterns=case,
            against=against,
            quick=quick,
            threads=threads,
            repeats=repeats,
            out=out,
        )
    except KeyboardInterrupt:
        message = f"stopped: {out / 'results.json'} has the finished cases"
        console.print(Text(message, style="yellow"), soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    if not passed:
        raise typer.Exit(1)


def _default(field: str) -> str:
    """A field's default in :class:`Config`, for the help."""
    return str(getattr(Config, field))


@train_app.command("nbody")
def train_nbody(
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the training set.", show_default=_default("epochs")),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the initial weights and the order of the batches.",
            show_default=_default("seed"),
        ),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Adam's learning rate.", show_default=_default("lr"))
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(help="Adam's weight decay.", show_default=_default("weight_decay")),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Systems in a training step.", show_default=_default("batch_size")),
    ] = None,
    train_systems: Annotated[
        int | None,
        typer.Option(
            help=f"Training systems, at most {MAX_TRAIN_SYSTEMS}.",
            show_default=_default("train_systems"),
        ),
    ] = None,
    hidden: Annotated[
        int | None, typer.Option(help="Width H of the model.", show_default=_default("hidden"))
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Layers of the model.", show_default=_default("layers"))
    ] = None,
    test_every: Annotated[
        int | None,
        typer.Option(
            help="Epochs between validations and tests.", show_default=_default("test_every")
        ),
    ] = None,
    backend: Annotated[
        Backend | None,
        typer.Option(help="Backend that runs the layers.", show_default=_default("backend")),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:N or auto.", show_default=_default("device")),
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="Precision of weights and arithmetic.", show_default=_default("precision")
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for metrics, checkpoints and pictures.")] = Path(
        "runs/nbody"
    ),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --out; of its options only --epochs may change.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the run in --out and start again.")
    ] = False,
) -> None:
    """Learn where five charged particles go (section 5.1 of the EGNN paper).

    The first run simulates the data (10 s) and stores it in the cache folder.
    Stop with Ctrl-C, continue with --resume.
    """
    arguments: dict[str, Any] = {
        "epochs": epochs,
        "seed": seed,
        "lr": lr,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
        "train_systems": train_systems,
        "hidden": hidden,
        "layers": layers,
        "test_every": test_every,
        "backend": backend.value if backend is not None else None,
        "device": device,
        "precision": precision.value if precision is not None else None,
    }
    options = {name: value for name, value in arguments.items() if value is not None}
    Config(**options)  # raises for a wrong option before PyTorch is imported
    from egnn_fast.experiments.nbody.run import run

    console = Console()
    try:
        run(options, out, console, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        saved = f"finished epochs are saved: --out {out} --resume goes on"
        message = saved if (out / "last.pt").exists() else "before training began"
        console.print(Text(f"stopped: {message}", style="yellow"), soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
