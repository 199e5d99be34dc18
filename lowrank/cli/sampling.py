"""The options that say how answers are drawn, alike for every command that asks a model."""

from __future__ import annotations

from typing import Annotated

import typer

MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens of one answer at the most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens with this probability in all.")
]
TopK = Annotated[int, typer.Option(min=0, help="Draw from this many likeliest tokens; 0: all.")]
Compile = Annotated[
    bool, typer.Option("--compile", help="Answer through compiled layers: slow first steps, faster ones on a GPU.")
]
RepetitionPenalty = Annotated[float, typer.Option(min=0.01, help="Above 1 makes tokens that occurred less likely.")]
