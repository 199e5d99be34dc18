"""What the browser may ask, a file for each page."""

from lowrank.board.routes import chat, compare, data, export, live_commands, measure, new, runs, start

ROUTERS = (
    start.router, new.router, data.router, runs.router, live_commands.router, compare.router, chat.router,
    measure.router, export.router,
)  # fmt: skip
