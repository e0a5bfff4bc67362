"""The libp2p daemon (go-libp2p's p2pd, out of hivemind's wheel) as a child process that never outlives us.

We start it ourselves rather than let hivemind do so: its output goes to a file instead of the terminal, its control
socket lies in a directory that only we may enter and nobody sweeps, and it ends with us however we end. hivemind then
attaches to it.
"""

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dugnad.dht.listening import check_free
from dugnad.dht.multiaddrs import is_local
from dugnad.dht.transport import NetworkDown, PortInUse

logger = logging.getLogger(__name__)

START_S = 20.0
ASK_EVERY_S = 20.0
ANSWER_S = 20.0
MAX_UNANSWERED = 3
"""After so many questions in a row without an answer the daemon is taken for gone."""
STOP_S = 3.0
BUFFER_BYTES = 2**20
_POLL_S = 0.02
_PREFIX = "p2pd-"  # short: a socket's path has 104 bytes

# A pipe ties the daemon's life to ours: we hold the only writing end, the kernel closes it when we die of whatever, and
# a shell that waits at the reading end kills the daemon. A line in the pipe means instead that the daemon has ended
# already, so that its number, by then perhaps another process's, is left alone. Not PR_SET_PDEATHSIG: it exists on
# Linux only and fires when the starting thread ends, not the process. p2pd also ends by itself when its first client
# hangs up, but not while it starts, nor when it hangs. $$ is the daemon's number, by the last exec.
_LAUNCHER = """
exec 3<&0 </dev/null
( read -r _ <&3 || kill -KILL $$; rm -rf -- "$0" ) >/dev/null 2>&1 &
exec 3<&-
exec "$@"
"""


# Per peer, as p2pd counts: a member behind a router may be in touch with all the others through one relay. Its default
# buffers, 16 MiB for each direction of each connection, are for few.
_RELAY_LIMITS = ("-relayMaxCircuits=256", "-relayMaxReservations=512", "-relayBufferSize=65536")


class Daemon:
    """A running p2pd: `async with Daemon(...)` starts it, and no process is left afterwards.

    listen: multiaddrs of TCP ports. identity_file: libp2p's private key; log: the daemon's output, the previous one's
    is kept beside it, and so are its sockets, if they can be. No other daemon has its log in that folder.
    Entering raises PortInUse, ListenError or NetworkDown.
    """

    def __init__(self, *, identity_file: Path, listen: Sequence[str], log: Path) -> None:
        self.pid = 0
        self.log = log
        self._identity_file = identity_file
        self.listen = tuple(listen)
        self._is_open = False
        self._directory = ""
        self._lifeline = -1
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._num_unanswered = 0
        self._fault = ""
        """Why the last question was not answered, if it was not."""

    async def __aenter__(self) -> Self:
        for address in self.listen:
            check_free(address)
        for left in self.log.parent.glob(f"{_PREFIX}*"):  # by a machine that went down
            shutil.rmtree(left, ignore_errors=True)
        await self._begin()
        return self

    async def restart(self, listen: Sequence[str], *, is_open: bool) -> None:
        """End the daemon and start it anew, on those multiaddrs; is_open: anyone can reach it, so it may relay.

        Connections, handlers and the paths of the sockets do not survive. Raises as entering does.
        """
        self.listen, self._is_open = tuple(listen), is_open
        await self._stop()
        await self._begin()

    async def _begin(self) -> None:
        self._process = self._supervisor = None
        self._directory = _make_directory(self.log.parent.absolute())
        self._num_unanswered = 0
        try:
            await self._start()
            await self._ready()
        except BaseException:
            await self._stop()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    @property
    def control(self) -> str:
        """Path of the control socket."""
        return f"{self._directory}/control"

    @property
    def streams(self) -> str:
        """Path where we listen for the streams that the daemon hands us."""
        return f"{self._directory}/streams"

    def check_alive(self) -> None:
        """Raises NetworkDown once the daemon has ended, or does not answer `keep_asking` any more."""
        self._check_running()
        if self._num_unanswered >= MAX_UNANSWERED:
            words = f"the network daemon does not answer any more ({self._fault})"
            raise NetworkDown(f"{words}; its last words are in {self.log}")

    async def keep_asking(self) -> None:
        """Ask it now and then whether it is there, until cancelled: requests that hang look like others' silence."""
        while True:
            await asyncio.sleep(ASK_EVERY_S)
            self._keep_fresh()
            self._fault = await self._ask_in_vain()
            self._num_unanswered = self._num_unanswered + 1 if self._fault else 0

    async def _ask_in_vain(self) -> str:
        """Why it does not answer; "" if it does, or if we can open no more files, which is not its fault and passes."""
        from hivemind.proto import p2pd_pb2

        try:
            async with asyncio.timeout(ANSWER_S):
                await self.ask(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        except TimeoutError:
            return f"no answer in {ANSWER_S:.0f} s"
        except Exception as error:
            passes = getattr(error.__cause__, "errno", None) in (errno.EMFILE, errno.ENFILE)
            return "" if passes else str(error)
        return ""

    def _keep_fresh(self) -> None:
        """Use the sockets, in the eyes of who sweeps temporary files."""
        for path in (self._directory, self.control, self.streams):
            with contextlib.suppress(OSError):
                os.utime(path)

    def _check_running(self) -> None:
        status = self._process.returncode if self._process is not None else "unknown"
        if status is not None:
            raise NetworkDown(f"the network daemon has ended (status {status}); its last words are in {self.log}")

    async def ask(self, request: Any) -> Any:
        """The daemon's answer to a control message (p2pd_pb2 Request -> Response).

        Raises DaemonRefused, with the daemon's own words, or NetworkDown.
        """
        answer, _, writer = await self.ask_stream(request)
        writer.close()
        return answer

    async def ask_stream(self, request: Any) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]:
        """Like `ask`, and keeps the connection, which after STREAM_OPEN is the stream."""
        from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe, write_pbmsg
        from hivemind.proto import p2pd_pb2

        self._check_running()
        try:
            reader, writer = await asyncio.open_unix_connection(self.control, limit=BUFFER_BYTES)
        except OSError as error:
            raise NetworkDown(f"the network daemon does not answer: {error}") from error
        try:
            answer = p2pd_pb2.Response()
            await write_pbmsg(writer, request)
            await read_pbmsg_safe(reader, answer)
            if answer.type == p2pd_pb2.Response.ERROR:
                raise DaemonRefused(answer.error.msg)
        except (OSError, EOFError) as error:
            writer.close()
            raise NetworkDown(f"the network daemon broke off: {error}") from error
        except BaseException:
            writer.close()
            raise
        return answer, reader, writer

    async def _start(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.log, self.log.with_suffix(".previous.log"))
        reading_end, self._lifeline = os.pipe()
        try:
            with self.log.open("wb") as log:
                self._process = await asyncio.create_subprocess_exec(
                    "/bin/sh", "-c", _LAUNCHER, self._directory, *self._arguments(),
                    stdin=reading_end, stdout=log, stderr=log, env=self._environment(),
                    start_new_session=True,  # the terminal's Ctrl+C is for us: the daemon is needed to say goodbye
                )  # fmt: skip
        finally:
            os.close(reading_end)
        self.pid = self._process.pid
        self._supervisor = asyncio.create_task(self._supervise(self._process))

    def _arguments(self) -> list[str]:
        far = not all(is_local(address) for address in self.listen)
        return [
            _p2pd(),
            f"-listen=/unix{self.control}",
            f"-id={self._identity_file}",
            f"-hostAddrs={','.join(self.listen)}",
            f"-idleTimeout={START_S + 10:.0f}s",
            f"-autonat={far:d}",  # which also lets it punch holes
            "-dhtServer=1",
            "-connManager=1",
            "-relay=1",
            f"-relayService={self._is_open:d}",
            f"-forceReachabilityPublic={self._is_open:d}",
            *_RELAY_LIMITS,
            "-tls=1",
        ]

    def _environment(self) -> dict[str, str]:
        """One core for a relay: of the two relay services that p2pd starts then, the right one mostly wins the race."""
        cores = {"GOMAXPROCS": "1"} if self._is_open else {}
        return {**os.environ, "GOLOG_LOG_LEVEL": "error", "GOLOG_LOG_FMT": "nocolor", **cores}

    async def _supervise(self, process: asyncio.subprocess.Process) -> None:
        status = await process.wait()
        self._release()
        logger.debug("p2pd %d ended with status %d", process.pid, status)

    def _release(self) -> None:
        lifeline, self._lifeline = self._lifeline, -1
        if lifeline >= 0:
            with contextlib.suppress(OSError):
                os.write(lifeline, b"\n")
            os.close(lifeline)

    async def _ready(self) -> None:
        """Wait until the control socket accepts connections."""
        assert self._process is not None
        try:
            async with asyncio.timeout(START_S):
                while self._process.returncode is None:
                    with contextlib.suppress(OSError):
                        _, writer = await asyncio.open_unix_connection(self.control)
                        writer.close()
                        return
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise NetworkDown(f"the network daemon did not start within {START_S:.0f} s; see {self.log}") from None
        self._explain_failure()

    def _explain_failure(self) -> None:
        words = self.log.read_text(errors="replace").strip()
        if "address already in use" in words:
            raise PortInUse(", ".join(self.listen))
        last = words.splitlines()[-1] if words else "it said nothing"
        raise NetworkDown(f"the network daemon did not start: {last} (all of it: {self.log})")

    async def _stop(self) -> None:
        process, supervisor = self._process, self._supervisor
        try:
            if process is not None and process.returncode is None:
                with contextlib.suppress(TimeoutError, ProcessLookupError):
                    # not process.terminate(): that may reap a p2pd which has just ended, behind asyncio's back
                    os.kill(process.pid, signal.SIGTERM)
                    async with asyncio.timeout(STOP_S):
                        await process.wait()
        finally:  # also when we are cancelled while we wait
            if process is not None and process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            self._release_unstarted()
        if supervisor is not None:
            await supervisor
        shutil.rmtree(self._directory, ignore_errors=True)

    def _release_unstarted(self) -> None:
        if self._process is None and self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


class DaemonRefused(Exception):
    """The daemon could not do what it was asked; its own words."""


def _make_directory(folder: Path) -> str:
    """A directory for sockets that only we may enter, in `folder`: elsewhere they may be swept after some days.

    Among the temporary files all the same where `folder` can't hold sockets: its file system, or its long path.
    """
    directory = tempfile.mkdtemp(prefix=_PREFIX, dir=folder)
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(f"{directory}/control")
        os.unlink(f"{directory}/control")
    except OSError:
        shutil.rmtree(directory, ignore_errors=True)
        return tempfile.mkdtemp(prefix="dugnad-")
    return directory


def _p2pd() -> str:
    spec = find_spec("hivemind")
    if spec is None or spec.origin is None:
        raise NetworkDown("hivemind, which brings the network daemon, is not installed:  pip install hivemind")
    return str(Path(spec.origin).parent / "hivemind_cli" / "p2pd")
