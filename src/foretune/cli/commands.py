"""`app`: the commands of the `foretune` program."""

from __future__ import annotations

from typing import Annotated

import typer

import foretune
from foretune.cli import (
    catalogue,
    check,
    compare_report,
    datastore,
    doctor,
    export,
    forecast,
    fuse,
    generate,
    init,
    merge_shards,
    plan,
    predict,
    prune,
    push,
    retrain_adapt,
    run,
    sfda,
    watch,
)
from foretune.cli.group import Group

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich takes longer than the rest of --help
)


def _version(requested: bool) -> None:
    if requested:
        print(f"foretune {foretune.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error; may follow any command."),
    ] = False,
) -> None:
    """Retrain a model on many tasks so that it adapts better to new ones."""


app.command("run")(run.run)
app.command("watch")(watch.watch)
app.command("init")(init.init)
app.command("plan")(plan.plan)
app.command("retrain")(retrain_adapt.retrain)
app.command("adapt")(retrain_adapt.adapt)
app.command("merge-shards")(merge_shards.merge_shards)
app.command("predict")(predict.predict)
app.command("check")(check.check)
app.command("export")(export.export)
app.command("push")(push.push)
app.command("compare")(compare_report.compare)
app.command("report")(compare_report.report)
app.command("fuse")(fuse.fuse)
app.command("prune")(prune.prune)
app.command("generate")(generate.generate)
app.add_typer(datastore.app, name="datastore")
app.add_typer(sfda.app, name="sfda")
app.add_typer(forecast.app, name="forecast")
app.command("ls")(catalogue.ls)
app.command("show")(catalogue.show)
app.command("cite")(catalogue.cite)
app.command("doctor")(doctor.doctor)
