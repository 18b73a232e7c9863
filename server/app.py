"""The Flower ServerApp around a coordinator."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from confide.server.coordinator import Coordinator, Released

__all__ = ["make_server_app"]


def make_server_app(start: Callable[[Grid], Coordinator], finish: Callable[[Released], None]) -> ServerApp:
    """The app that drives one run.

    Args:
        start: Makes the coordinator once Flower hands over the grid.
        finish: Takes what was released.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        finish(start(grid).run())

    return app
