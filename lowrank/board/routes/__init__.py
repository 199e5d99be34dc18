"""What the browser may ask, a file for each page."""

from lowrank.board.routes import chat, compare, data, export, measure, new, orders, runs, start

ROUTERS = (
    start.router, new.router, data.router, runs.router, orders.router, compare.router, chat.router, measure.router,
    export.router,
)  # fmt: skip
