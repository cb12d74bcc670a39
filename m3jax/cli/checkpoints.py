"""The commands that look at checkpoints, methods and machines, and that write checkpoints otherwise.

What a command needs is imported inside it, so that `--help` and `inspect` start without JAX.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from m3jax.checkpoints import formats
from m3jax.cli import options, shell, terminal
from m3jax.cli.displays.anatomy import anatomy_lines
from m3jax.cli.displays.checkpoints import comparison_lines, overview_lines
from m3jax.cli.displays.differences import difference_lines
from m3jax.cli.displays.machine import examination_lines
from m3jax.cli.displays.merges import (
    convert_json,
    convert_lines,
    extraction_lines,
)
from m3jax.cli.displays.methods import merged_by_line, method_json, method_lines, methods_json, methods_lines
from m3jax.errors import M3Error


def inspect(
    *,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="A model directory, weight file or hub id; or MODEL+ADAPTER.", show_default=False
        ),
    ],
    other: Annotated[
        str | None, typer.Argument(metavar="OTHER", help="A second one to compare it with.", show_default=False)
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--filter", metavar="REGEX", help="Only tensors in whose names this is found.")
    ] = None,
    anatomy: Annotated[
        bool, typer.Option("--anatomy", help="Show what the tensors are: towers, blocks, kinds, tied ones.")
    ] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what a checkpoint holds, or how two of them differ."""
    from m3jax.checkpoints import inspection

    width = terminal.width()
    if anatomy:
        if other is not None or pattern is not None:
            raise M3Error("--anatomy is of one whole model: leave out OTHER and --filter")
        from m3jax.anatomy import summarise
        from m3jax.anatomy.stored import inspect_anatomy

        found = summarise(*inspect_anatomy(path))
        shell.print_result(found.to_json, lambda: anatomy_lines(found, width), as_json)
        return
    if other is None:
        from m3jax.outputs.provenance import method_of

        overview, merged_by = inspection.look_at(path, pattern), method_of(path)
        shell.print_result(
            lambda: {**overview.to_json(), "merged_by": merged_by},
            lambda: (*overview_lines(overview, width), *merged_by_line(merged_by)),
            as_json,
        )
        return
    with terminal.progress_reporter() as progress:
        comparison = inspection.compare(path, other, pattern, progress)
    shell.print_result(comparison.to_json, lambda: comparison_lines(comparison, width), as_json)


def diff(
    *,
    a: Annotated[
        str,
        typer.Argument(metavar="A", help="A model directory, weight file, run or hub id; or MODEL+ADAPTER."),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one, in any format and naming of the same model.")],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="BASE", help="What both were tuned from: compare what each learned beyond it."),
    ] = None,
    merge: Annotated[
        str | None, typer.Option("--merge", metavar="M", help="A merge of both: find its λ, M = λ·A + (1−λ)·B.")
    ] = None,
    by: Annotated[
        str, typer.Option("--by", metavar="layer|module|tensor", help="What a row of the table is.")
    ] = "layer",
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="Draw a map of layers and modules: .png or .svg."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="How models are seen, as in tokenizer_source=union; may be repeated."
        ),
    ] = None,
    speech: options.Speech,
) -> None:
    """Show what differs between two models, by layer and module.

    They are seen as a merge sees them. `inspect A B` compares files, tensor by tensor, as they are stored.
    """
    shell.silence_downloads(speech.quiet)
    from m3jax.streaming import differences

    rows = differences.read_by(by)
    if picture is not None:
        from m3jax.laboratory.maps import check_picture

        check_picture(picture)

    def tell(line: str) -> None:
        shell.print_notes([line], speech.quiet)

    with terminal.progress_reporter(speech.quiet) as progress:
        found = differences.diff(a, b, base=base, merge=merge, changes=overrides or (), progress=progress, tell=tell)
    shell.print_notes(found.notes, speech.quiet)
    if picture is not None:
        from m3jax.laboratory.maps import save_map

        if not save_map(found, picture):
            tell(f"{picture} is not drawn, as nothing differs")
    width = terminal.width()
    shell.print_result(
        lambda: found.to_json(rows), lambda: difference_lines(found, rows, width), speech.as_json, speech.quiet
    )


def doctor(
    *,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Check that this machine makes the bits that all make."""
    from m3jax.trees import reference

    found = reference.examine(lambda line: print(line, file=sys.stderr))
    shell.print_result(found.to_json, lambda: examination_lines(found, terminal.width()), as_json)
    if not found.right:
        raise typer.Exit(shell.BAD_INPUT)


def methods(
    *,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The one to explain.", show_default=False)] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List merge methods and sparsifiers, or explain one."""
    width = terminal.width()
    if name is None:
        shell.print_result(methods_json, lambda: methods_lines(width), as_json)
        return
    shell.print_result(lambda: method_json(name), lambda: method_lines(name, width), as_json)


def convert(
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A model directory, weight file or hub id; or MODEL+ADAPTER.", show_default=False
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="DST", help="The directory to make.", show_default=False)],
    to: Annotated[
        str, typer.Option("--to", metavar="|".join(formats.WRITTEN), help="The format to write.")
    ] = formats.SAFETENSORS.name,
    max_shard_size: options.MaxShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if m3jax has made it.")] = False,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write float8 weights as numbers, without their scales.")
    ] = False,
    names: Annotated[
        str | None,
        typer.Option(
            "--names", metavar="LIBRARY", help="Whose names and layout: huggingface, maxtext, gemma, tunix, …."
        ),
    ] = None,
    config: options.Config = None,
    unscanned: Annotated[bool, typer.Option("--unscanned", help="Keep MaxText's blocks apart, not stacked.")] = False,
    rounded: Annotated[
        bool, typer.Option("--rounded", help="Let a layout that multiplies entries round each, once.")
    ] = False,
    speech: options.Speech,
) -> None:
    """Write a checkpoint in another format or under other names, entry by entry."""
    shell.silence_downloads(speech.quiet)
    from m3jax.outputs import conversion

    with terminal.progress_reporter(speech.quiet) as progress:
        result = conversion.convert(
            source,
            out,
            to,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            dequantize=dequantize,
            names=names,
            config=config,
            scanned=not unscanned,
            rounded=rounded,
            progress=progress,
        )
    shell.print_notes(result.notes, speech.quiet)
    shell.print_result(lambda: convert_json(result), lambda: convert_lines(result), speech.as_json, speech.quiet)


def extract_lora(
    *,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A fine-tuned model directory or hub id.", show_default=False)
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The adapter's directory to make.", show_default=False)],
    base: Annotated[str, typer.Option("--base", metavar="BASE", help="What it was tuned from.", show_default=False)],
    rank: Annotated[int, typer.Option("--rank", metavar="R", min=1, help="Of the factors.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if m3jax has made it.")] = False,
    speech: options.Speech,
) -> None:
    """Write what a model has learned beyond its base as a LoRA adapter of PEFT."""
    shell.silence_downloads(speech.quiet)
    from m3jax.outputs import extraction

    with terminal.progress_reporter(speech.quiet) as progress:
        result = extraction.extract_lora(model, base, out, rank, overwrite=overwrite, progress=progress)
    shell.print_notes(result.notes, speech.quiet)
    shell.print_result(lambda: convert_json(result), lambda: extraction_lines(result), speech.as_json, speech.quiet)
