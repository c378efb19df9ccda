"""The Python QMP library against a server: connects, negotiates, executes, receives events.

usage: client.py SOCKET    (its machine is stopped and may be run and stopped again)
"""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient

LIMIT = 10


async def check(path: str) -> None:
    """Everything that the library does with a server."""
    qmp = QMPClient("bulkhead-test")
    await qmp.connect(path)
    greeting = qmp.greeting
    assert greeting is not None and "oob" in greeting.QMP.capabilities, greeting

    version = await qmp.execute("query-version")
    assert isinstance(version["qemu"]["major"], int), version
    commands = {command["name"] for command in await qmp.execute("query-commands")}
    assert {"stop", "cont", "query-status", "quit"} <= commands, commands

    with qmp.listener() as events:
        await qmp.execute("cont")
        event = await asyncio.wait_for(events.get(), LIMIT)
        assert event["event"] == "RESUME" and event["timestamp"]["seconds"] > 0, event
        assert (await qmp.execute("query-status"))["status"] == "running"
        await qmp.execute("stop")
        event = await asyncio.wait_for(events.get(), LIMIT)
        assert event["event"] == "STOP", event

    try:
        await qmp.execute("no-such-command")
    except ExecuteError as error:
        assert error.error_class == "CommandNotFound", error
    else:
        raise AssertionError("an unknown command succeeded")
    try:
        await qmp.execute("stop", {"surplus": 1})
    except ExecuteError as error:
        assert str(error) == "Parameter 'surplus' is unexpected", error
    else:
        raise AssertionError("a surplus argument was accepted")

    replies = await asyncio.gather(*(qmp.execute("query-name") for _ in range(20)))
    assert replies == [{}] * 20, replies
    await qmp.disconnect()


asyncio.run(asyncio.wait_for(check(sys.argv[1]), 6 * LIMIT))
print("ok")
