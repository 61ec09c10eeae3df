"""`repae`: the command line. Heavy packages are imported inside the commands, so that `--help` is quick."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

app = typer.Typer(
    name="repae",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
    help="REPA-E as a pipeline: train a VAE and a latent diffusion transformer end to end.",
    epilog="First run: `repae run` (minutes on two CPU cores), then `repae report`.",
)

Preset = Annotated[str, typer.Option("--config", "-c", help="Preset name or config file (YAML or JSON).")]
Sets = Annotated[list[str], typer.Option("--set", "-s", help="Override: stage.field=value; may be repeated.")]
StoreOption = Annotated[str, typer.Option("--store", help="Artifact store: path or URI; wins over REPAE_STORE.")]
Force = Annotated[list[str], typer.Option("--force", help="Stage to run again with all that follows; may be repeated.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command(epilog="Examples: `repae run` · `repae run --set generate.guidance=3.0` · `repae run -c imagenet256-sdvae "
             "--store s3://bucket/repae` · `repae run --force train-ldm`")  # fmt: skip
def run(
    config: Preset = "quickstart",
    sets: Sets = [],  # noqa: B006
    store: StoreOption = "",
    force: Force = [],  # noqa: B006
    debug: Debug = False,
) -> None:
    """Run the whole pipeline; finished stages are skipped."""
    from flows.run_command import run_pipeline

    run_pipeline(config, sets, store, force)


@app.command(epilog="Examples: `repae stage preprocess --set preprocess.source=photos/` · `repae stage generate --set "
             "generate.guidance=3.0` · `repae stage generate --inputs latest`")  # fmt: skip
def stage(
    name: Annotated[str, typer.Argument(help="preprocess, train-repae, extract-vae, cache-latents, train-ldm, ...")],
    config: Preset = "quickstart",
    sets: Sets = [],  # noqa: B006
    store: StoreOption = "",
    inputs: Annotated[
        str, typer.Option("--inputs", help="`auto` (what this config makes), `latest`, or role=reference,...")
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Run even if the artifact exists.")] = False,
    debug: Debug = False,
) -> None:
    """Run one stage on artifacts that exist already."""
    from flows.run_command import run_one_stage

    run_one_stage(name, config, sets, store, inputs, force)


@app.command(epilog="Example: `repae plan --set generate.guidance=3.0`")
def plan(
    config: Preset = "quickstart",
    sets: Sets = [],  # noqa: B006
    store: StoreOption = "",
    force: Force = [],  # noqa: B006
    debug: Debug = False,
) -> None:
    """Say which stages would run, resume or be skipped, and why; nothing is started."""
    from flows.inspect_command import print_plan

    print_plan(config, sets, store, force)


@app.command(epilog="Example: `repae runs --store s3://bucket/repae`")
def runs(store: StoreOption = "", debug: Debug = False) -> None:
    """List the runs of a store, newest first."""
    from flows.inspect_command import print_runs

    print_runs(store)


@app.command(epilog="Examples: `repae report` · `repae report latest -o report.html` · `repae report 20261123`")
def report(
    run: Annotated[str, typer.Argument(help="Run id, unique prefix, or `latest`.")] = "latest",
    store: StoreOption = "",
    output: Annotated[str, typer.Option("--output", "-o", help="Also write the page to this file.")] = "",
    debug: Debug = False,
) -> None:
    """Write a run's self-contained HTML page and say where it is."""
    from flows.inspect_command import make_report

    make_report(run, store, output)


@app.command(epilog="Examples: `repae compare latest 20261123` · `repae compare RUN RUN RUN -o compare.html`")
def compare(
    runs: Annotated[list[str], typer.Argument(help="Two or more runs: id, unique prefix, or `latest`.")],
    store: StoreOption = "",
    output: Annotated[str, typer.Option("--output", "-o", help="Also write the page to this file.")] = "",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the noise that all rows share.")] = 0,
    debug: Debug = False,
) -> None:
    """Scores of runs in one table, and their samples side by side from the same noise."""
    from flows.compare_command import compare_runs

    compare_runs(runs, store, output, seed)


@app.command(epilog="Examples: `repae verify` · `repae verify train-ldm`")
def verify(
    stage: Annotated[str, typer.Argument(help="Stage to check; all by default.")] = "",
    store: StoreOption = "",
    debug: Debug = False,
) -> None:
    """Check every file of the artifacts against its sha256."""
    from flows.inspect_command import verify_artifacts

    verify_artifacts(stage, store)


@app.command(epilog="Examples: `repae ablation` · `repae ablation --seeds 0,1,2 -o ablation.md` · "
             "`repae ablation --seeds 0 --set train_ldm.max_steps=800`")  # fmt: skip
def ablation(
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds, separated by commas.")] = "0,1",
    sets: Sets = [],  # noqa: B006
    store: StoreOption = "",
    output: Annotated[str, typer.Option("--output", "-o", help="Also write the table to this file (Markdown).")] = "",
    debug: Debug = False,
) -> None:
    """Alignment on/off x joint/frozen VAE on the digits, as a table; finished arms are not run again."""
    from flows.ablation_command import run_ablation

    run_ablation(seeds, sets, store, output)


@app.command(epilog="Examples: `repae sweep` · `repae sweep --scales 1,1.5,2,2.5,3 --intervals 0:1,0:0.7 -n 5000` · "
             "`repae sweep --scales '' --samplers ode,heun --steps 5,10,20`")  # fmt: skip
def sweep(
    config: Preset = "quickstart",
    scales: Annotated[str, typer.Option("--scales", help="Guidance scales; empty = none.")] = "1,1.5,2,3",
    intervals: Annotated[str, typer.Option("--intervals", help="Times with guidance, low:high,...")] = "0:1,0:0.7",
    samplers: Annotated[
        str, typer.Option("--samplers", help="Samplers compared at each number of steps; empty = none.")
    ] = "ode,heun,sde",
    steps: Annotated[str, typer.Option("--steps", help="Numbers of steps.")] = "5,10,25,50",
    images: Annotated[int, typer.Option("--images", "-n", min=0, help="Images a point; 0 = as configured.")] = 0,
    sets: Sets = [],  # noqa: B006
    store: StoreOption = "",
    debug: Debug = False,
) -> None:
    """Distance against guidance (scales x intervals) and steps, same noise; the table, the best, and the report."""
    from flows.sweep_command import run_sweep

    run_sweep(config, sets, store, scales=scales, intervals=intervals, samplers=samplers, steps=steps, images=images)


@app.command(
    "import",
    epilog="Examples: `repae import 0400000.pt` · `repae import s3://bucket/0400000.pt --store s3://bucket/repae`",
)
def import_file(
    file: Annotated[str, typer.Argument(help="Published joint or latent-only checkpoint (.pt), path or URI.")],
    store: StoreOption = "",
    trainable_pos_embed: Annotated[
        bool, typer.Option("--trainable-pos-embed", help="Keep the position table's optimizer state (compat).")
    ] = False,
    debug: Debug = False,
) -> None:
    """Take a published REPA-E checkpoint into the store as an artifact of its training stage."""
    from flows.interchange_command import import_published

    import_published(file, store, trainable_pos_embed)


@app.command(epilog="Examples: `repae export train-repae 0400000.pt` · `repae export train-ldm/ed87048b model.pt` · "
             "`repae export extract-vae e2e-vae.pt`")  # fmt: skip
def export(
    artifact: Annotated[
        str, typer.Argument(help="train-repae, train-ldm or extract-vae; /FINGERPRINT, or the latest.")
    ],
    file: Annotated[
        str, typer.Argument(help="File to write; extract-vae adds -latents-stats and -discriminator-ckpt.")
    ],
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="`last` or images seen.")] = "last",
    store: StoreOption = "",
    debug: Debug = False,
) -> None:
    """Write an artifact in the published REPA-E layout, for other people's code."""
    from flows.interchange_command import export_published

    export_published(artifact, file, checkpoint, store)


@app.command(epilog="Example: `PREFECT_API_URL=http://prefect:4200/api repae deploy`")
def deploy(debug: Debug = False) -> None:
    """Create or update the work pool and all deployments on the Prefect server of PREFECT_API_URL."""
    from flows.deploy_command import deploy as create_all

    create_all()


@app.command(epilog="Example: `repae serve`, then `prefect deployment run full-pipeline/dev --watch` elsewhere")
def serve(
    prefect_port: Annotated[
        int, typer.Option("--prefect-port", min=1, max=65535, help="Port of Prefect's API and UI.")
    ] = 4200,
    mlflow_port: Annotated[int, typer.Option("--mlflow-port", min=1, max=65535, help="Port of MLflow.")] = 5000,
    debug: Debug = False,
) -> None:
    """Prefect, MLflow and a worker on this machine, with all deployments, until Ctrl-C."""
    from flows.serve_command import serve as run_services

    run_services(prefect_port, mlflow_port)


@app.command(epilog="Examples: `repae gc` · `repae gc --days 90 --keep-runs 50` · `repae gc --delete`")
def gc(
    days: Annotated[float, typer.Option("--days", help="Artifacts and runs younger than this are kept.")] = 30.0,
    keep_runs: Annotated[int, typer.Option("--keep-runs", help="So many newest runs are kept, of any age.")] = 10,
    delete: Annotated[bool, typer.Option("--delete", help="Remove them; without it they are only listed.")] = False,
    other_mlflow: Annotated[
        bool, typer.Option("--other-mlflow", help="This MLflow knows the models, though runs name another address.")
    ] = False,
    store: StoreOption = "",
    debug: Debug = False,
) -> None:
    """List old artifacts that no kept run, registered model or artifact needs, and with --delete remove them."""
    from flows.gc_command import collect_garbage

    collect_garbage(days, keep_runs, delete, store, other_mlflow=other_mlflow)


@app.command(epilog="Example: `repae doctor --store s3://bucket/repae`")
def doctor(store: StoreOption = "", debug: Debug = False) -> None:
    """What works on this machine, what is missing, and the remedy."""
    from flows.doctor import examine

    raise typer.Exit(examine(store))


def main() -> None:
    """Entry point: one clear line for an error, exit code 2 for bad input, 1 for a failure."""
    from flows.environment import prepare_environment

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # `nohup` ignores SIGHUP
            signal.signal(number, _stop)
    try:
        if not {"--help", "-h"} & set(sys.argv[1:]):
            prepare_environment()
        app()
    except KeyboardInterrupt:
        print("repae: stopped; the next run continues from here", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        print(f"repae: {_one_line(error)}", file=sys.stderr)
        raise SystemExit(2 if is_bad_input(error) else 1) from None


def _stop(number: int, _frame: object) -> None:
    """An orderly end, as Ctrl-C's: by default the process would go and leave Prefect's temporary server behind."""
    raise SystemExit(128 + number)


def is_bad_input(error: BaseException) -> bool:
    """Config, source, store or input at fault: the user's to mend, before any work."""
    from repae_core.artifacts import LeaseHeld, StoreError

    return isinstance(error, (ValueError, StoreError, LeaseHeld))


def _one_line(error: BaseException) -> str:
    if type(error).__name__ == "ObjectNotFound" and not os.environ.get("PREFECT_API_URL"):
        return (
            "Prefect's temporary server does not know this run (on a busy machine it may have been ended, or another "
            "have taken its port): run again to continue"
        )
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    main()
