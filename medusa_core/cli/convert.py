"""`medusa convert`: rewrites draft heads in the layout of another server, or in ours."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def convert(
    source: Annotated[str, typer.Argument(help="Draft heads: a directory, file or Hub name.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; new or empty.", file_okay=False)],
    to: Annotated[
        Literal["tgi", "vllm", "safetensors"],
        typer.Option(help="Who will load them; safetensors is this project's layout."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Their backbone: a directory or Hub name. Needed where the target wants its output layer, "
            "name or vocabulary.",
            show_default="as far as the heads tell",
        ),
    ] = None,
) -> None:
    """Write draft heads as TGI or vLLM load them, or any layout as safetensors."""
    # Imported here: torch takes seconds, which `medusa --help` should not.
    from medusa_core.checkpoints.export import convert_heads

    written = convert_heads(source, out, to, model=model)
    output = (
        "their own output layers" if len(written.outputs) == written.num_heads else "a shared output layer"
    )
    typer.echo(f"{written.num_heads} heads, layers: {written.num_layers}, {output}: {out}")
