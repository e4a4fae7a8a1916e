"""``mmtrain model``: cost and learned selection of a model. ``mmtrain plan``: estimated cost of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mmtrain.cli.common import Checkpoint, Config, Overrides
from mmtrain.config import ForecasterConfig, load_config
from mmtrain.errors import UserError, os_errors
from mmtrain.inference.trained import SELECTED, TrainedModel, load_trained
from mmtrain.inspect.learned import averaging_matrices, image_selection, window_selection
from mmtrain.inspect.stages import NOT_COUNTED, StageRow, Subject, resolve, stage_table, total
from mmtrain.log import logger
from mmtrain.plan import plan_run, render
from mmtrain.plotting.selection import draw_averaging, draw_image_selection, draw_window_selection


def model_command(
    name: Annotated[str, typer.Argument(help="Model (vim2_small, tsm2), configuration, run folder or export.")],
    overrides: Overrides = None,
    input_size: Annotated[
        str | None,
        typer.Option(help="Image size in pixels, 224 or 224x160 (height x width; default: the run's, or 224)."),
    ] = None,
    variates: Annotated[
        int | None, typer.Option(help="Number of variates of a forecaster's input (default: the run's, or 7).")
    ] = None,
    batch: Annotated[int, typer.Option(help="Batch size of the input.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for the plots (default: the run or export folder).")] = None,
    series: Annotated[Path | None, typer.Option(help="Plot the selection on the last window of this table.")] = None,
    image: Annotated[Path | None, typer.Option(help="Plot the selection on this image.")] = None,
    checkpoint: Checkpoint = SELECTED,
) -> None:
    """Show the parameters and FLOPs of each stage of a model.

    For a run folder or an export, also plot the weights of the weighted averaging (averaging.png) and the step sizes Δ
    that the selective scans have learned (selection.png).

    \b
    Examples:
      mmtrain model vim2_small --input-size 224x160
      mmtrain model tsm2 --variates 21
      mmtrain model runs/vim2_digits                  # with averaging.png and selection.png
    """
    subject = resolve(name, overrides or [])
    if subject.folder is None and (out or series or image):
        cure = f" (if you mean the folder, write ./{name})" if Path(name).is_dir() else ""
        raise UserError(f"--out, --series and --image need a run folder or an export, but '{name}' is neither{cure}")
    for path in (series, image):
        if path is not None and not path.is_file():
            raise UserError(f"{path}: no such file")
    _show_stages(subject, input_size, variates, batch)
    if subject.folder is not None:
        _draw(subject, subject.folder, out or subject.folder, series, image, checkpoint)


def _show_stages(subject: Subject, input_size: str | None, variates: int | None, batch: int) -> None:
    model = subject.model
    if isinstance(model, ForecasterConfig):
        if input_size is not None:
            raise UserError(
                f"--input-size applies to images, but '{model.name}' takes series: use --variates or set model.lookback"
            )
        series = variates if variates is not None else _variates(subject)
        rows = stage_table(model, batch=batch, variates=series)
        shown = f"{batch} × {model.lookback} rows × {series} variates"
    else:
        if variates is not None:
            raise UserError(f"--variates applies to series, but '{model.name}' takes images: use --input-size")
        side = getattr(subject.run.data, "image_size", 224) if subject.run is not None else 224
        size = _size(input_size) if input_size is not None else (side, side)
        rows = stage_table(model, batch=batch, image_size=size)
        shown = f"{batch} × {size[0]}×{size[1]} pixels"
    table = Table("stage", box=None, title=f"{model.name}, input {shown}", title_justify="left")
    for column in ("output", "token mixers", "channel mixers", "parameters", "MFLOPs", "scan"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            "×".join(map(str, row.output)),
            str(row.token_mixers or "-"),
            str(row.channel_mixers or "-"),
            f"{row.parameters:,}",
            f"{row.flops / 1e6:,.2f}",
            _share(row),
        )
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
    whole = total(rows)
    print(
        f"total: {whole.parameters / 1e6:.2f} M parameters, {whole.flops / 1e9:.4g} GFLOPs forward"
        f" ({_share(whole)} in scans), {whole.token_mixers} token and {whole.channel_mixers} channel mixers"
    )
    print(
        "A multiply-add counts as 2 FLOPs, a scan as 9·B·L·D·N + B·L·D. All linear maps and convolutions are counted."
    )
    print(f"Not counted: {NOT_COUNTED}.")


def _share(row: StageRow) -> str:
    return f"{row.scan_flops / row.flops:.0%}" if row.flops else "-"


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:[x×](\d+))?", text)
    if not found:
        raise UserError(f"--input-size {text}: not a size. Write pixels as 224, or height x width as 224x160")
    height = int(found[1])
    return height, int(found[2] or height)


def _variates(subject: Subject) -> int:
    if subject.folder is not None:
        assets = subject.folder / "assets.json"
        if assets.is_file():
            return len(json.loads(assets.read_text())["columns"])
    columns = getattr(subject.run.data, "columns", None) if subject.run is not None else None
    return len(columns) if columns else 7


def _draw(subject: Subject, folder: Path, out: Path, series: Path | None, image: Path | None, checkpoint: str) -> None:
    trained = load_trained(folder, checkpoint)
    with os_errors(f"{out}: the plots cannot be written", "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
        matrices = averaging_matrices(trained.model)
        if matrices:
            draw_averaging(out / "averaging.png", matrices)
            print(f"{out / 'averaging.png'}: weights of the weighted averaging")
        else:
            logger.warning("no averaging.png: this model has no weighted averaging (model.averaging=false)")
        drawing = _selection(trained, subject, series, image)
        if drawing is not None:
            drawing(out / "selection.png")
            print(f"{out / 'selection.png'}: mean step size Δ at each position of the input")


def _selection(
    trained: TrainedModel, subject: Subject, series: Path | None, image: Path | None
) -> Callable[[Path], None] | None:
    """Return a function that draws the selection to a file, or log a warning and return None if there is no input."""
    forecaster = trained.config.task.kind == "forecasting"
    forecasts = image is None if series is not None or image is not None else forecaster
    flag = "--series FILE" if forecasts else "--image FILE"
    try:
        if forecasts:
            window = window_selection(trained, subject.run, series)
            if window.maps:
                return lambda path: draw_window_selection(path, window)
        else:
            found = image_selection(trained, subject.run, image)
            if found.maps:
                return lambda path: draw_image_selection(path, found)
    except UserError as error:
        if series is not None or image is not None:
            raise
        logger.warning("no selection.png: the run's data cannot be read: %s\nUse %s", error, flag)
        return None
    logger.warning("no selection.png: this model has no selective token, time or variate mixers")
    return None


def plan_command(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(help="Number of nodes (default: cluster.nodes).")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs per node (default: cluster.gpus_per_node).")] = None,
    gpu: Annotated[str | None, typer.Option(help="GPU model, such as h100 (default: cluster.gpu).")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Number of training samples, if the data is not on this machine.")
    ] = None,
) -> None:
    """Estimate memory, traffic and step time of a run under each strategy, its data rate and its GPU-hours.

    The estimate needs no GPU.

    \b
    Examples:
      mmtrain plan --config vim2_base_in1k --nodes 4 --gpus-per-node 8
      mmtrain plan --config vim2_base_in1k --gpu h100 --samples 1281167 train.batch_size=2048
    """
    resolved = load_config(config, overrides or [])
    cluster = resolved.cluster
    plan = plan_run(
        resolved,
        cluster.nodes if nodes is None else nodes,
        cluster.gpus_per_node if gpus_per_node is None else gpus_per_node,
        cluster.gpu if gpu is None else gpu,
        samples=samples,
    )
    console = Console()
    print(render(plan, console.width if console.is_terminal else 120))
