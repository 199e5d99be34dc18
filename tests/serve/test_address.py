"""Where a server listens."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from lowrank.serve.address import listen


def test_an_answer_waits_for_no_acknowledgment() -> None:
    """Headers and body are two packets: with Nagle's algorithm the second waits for the client's delayed
    acknowledgment of the first, 40 ms for each answer on a connection that is kept open."""

    async def delays() -> bool:
        listening = listen("127.0.0.1", 0)
        listening.listen()
        accepted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def on_connection(reader: Any, writer: asyncio.StreamWriter) -> None:
            ours: socket.socket = writer.get_extra_info("socket")
            accepted.set_result(not ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(on_connection, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname())
            found = await accepted
            writer.close()
        return found

    assert asyncio.run(delays()) is False
