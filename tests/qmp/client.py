"""The Python QMP library against a server: connects, negotiates, executes, receives events.

usage: client.py SOCKET    (its machine is stopped and may be run and stopped again)
"""

import asyncio
import os
import sys

from qemu.qmp import ExecuteError, QMPClient

LIMIT = 10


async def check_descriptors(qmp: QMPClient) -> None:
    """Passes descriptors to a machine that runs."""
    reader, writer = os.pipe()
    qmp.send_fd_scm(writer)
    assert await qmp.execute("getfd", {"fdname": "pipe"}) == {}
    os.close(writer)
    os.set_blocking(reader, False)
    try:
        os.read(reader, 1)
    except BlockingIOError:
        pass
    else:
        raise AssertionError("the server does not hold the pipe")
    assert await qmp.execute("closefd", {"fdname": "pipe"}) == {}
    assert os.read(reader, 1) == b"", "the server still holds the pipe"

    # An id of the client's own, removed before the first reply is there.
    qmp.send_fd_scm(reader)
    added, removed = await asyncio.gather(
        qmp.execute("add-fd", {"fdset-id": 5, "opaque": "a pipe"}),
        qmp.execute("remove-fd", {"fdset-id": 5}),
    )
    assert added["fdset-id"] == 5 and isinstance(added["fd"], int) and removed == {}, added
    assert await qmp.execute("query-fdsets") == []
    os.close(reader)


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
        await check_descriptors(qmp)
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
