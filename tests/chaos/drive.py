"""A run: devboxes, commands and clients on the one side, faults on the other, and a ledger of what should be true.

In charge of running both for the planned time and of letting everything come to its end. Not in charge of judging what
is left afterwards (`check`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import random
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from tests.chaos import plan, writer
from tests.chaos.client import Caller, GivenUp, together
from tests.chaos.faults import Striker
from tests.chaos.replicas import NAMES, Replicas
from tests.chaos.site import Site, children, memory_mb

#: What is asked for after the last fault must have come to its end within so many seconds, whatever was going on.
SETTLE_SECONDS = 100.0
STREAMS = ("stdout", "stderr")
CHURNS = 3
SHELL_LINE = 2
LOGGED_LINES, LOGGED_BYTES = 2000, 1000
SMALL = {"launch_parameters": {"resource_size_request": "X_SMALL"}}


@dataclasses.dataclass(slots=True)
class Command:
    """A line of the ledger: what was asked, and what its client saw."""

    job: plan.Job
    box: str
    began: float
    id: str = ""
    live: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict)
    given: list[tuple[str, bool]] = dataclasses.field(default_factory=list)
    """Lines sent as input, and whether the answer said that they were taken."""
    killed: bool = False
    answer: dict[str, Any] | None = None
    ended: float = 0.0
    stored: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict)
    final: dict[str, Any] | None = None
    account: dict[str, Any] | None = None
    """What `why` tells."""
    logs: list[dict[str, Any]] | None = None

    @property
    def path(self) -> str:
        return f"/v1/devboxes/{self.box}/executions/{self.id}"

    @property
    def in_logs(self) -> bool:
        """Whether its logs are compared: those whose lines are lines of text, few and short."""
        job = self.job
        return not job.binary and job.count < LOGGED_LINES and job.size < LOGGED_BYTES

    @property
    def late(self) -> float:
        """Seconds that it took beyond those it was to run."""
        job = self.job
        return self.ended - self.began - (job.after or job.count * job.gap) if self.ended else 0.0

    @property
    def title(self) -> str:
        return f"{self.job.name} ({self.job.ending}, {self.job.how}) {self.id or 'without an id'} in {self.box}"


@dataclasses.dataclass(slots=True)
class Sample:
    """Memory of a process over a run, in MiB."""

    first: float
    most: float = 0.0
    last: float = 0.0


class Run:
    """One run over one installation."""

    def __init__(self, site: Site, what: plan.Plan) -> None:
        self.site, self.plan = site, what
        self.striker = Striker(site, self.say)
        self.began = self.striker.began
        self.findings: list[str] = []
        self.caller = Caller(site.base_url, site.key, self.find)
        self.boxes: list[str] = []
        self.every_box: set[str] = set()
        self.commands: list[Command] = []
        self.outages: list[tuple[float, float]] = []
        self.memory: dict[str, Sample] = {}

    # -- telling -------------------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        return time.monotonic() - self.began

    def say(self, text: str) -> None:
        """A line of the timeline."""
        sys.stdout.write(f"[{self.now:7.2f} s] {text}\n")
        sys.stdout.flush()

    def find(self, text: str) -> None:
        """Something that should not be."""
        self.findings.append(f"[{self.now:7.2f} s] {text}")
        self.say(f"FOUND {text}")

    # -- the run -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """All of it, until the last command has ended and the devboxes are asked to go."""
        with Replicas(self.site) as replicas:
            for name in NAMES:
                self.striker.more[name] = functools.partial(replicas.pids, name)
            await self._run()
        self.say(f"{len(self.commands)} commands have ended")

    async def _run(self) -> None:
        self.boxes = await together(*(self._create(f"steady-{n}") for n in range(self.plan.boxes)))
        self.striker.began = self.began = time.monotonic()
        stop = asyncio.Event()
        probing = asyncio.create_task(self.caller.prober(stop, self.say))
        weighing = asyncio.create_task(self._watch_memory(stop))
        try:
            await together(
                self._strike_all(),
                *(self._slot(number) for number in range(self.plan.commands)),
                *(self._churn(number) for number in range(CHURNS)),
                self._sleeper(),
            )
        finally:
            self.striker.undo()
            stop.set()
        self.outages = [(since - self.began, until - self.began) for since, until in await probing]
        await weighing

    @property
    def _over(self) -> bool:
        return self.now >= self.plan.seconds

    def _until(self) -> float:
        return self.began + self.plan.seconds + SETTLE_SECONDS

    async def _strike_all(self) -> None:
        loop = asyncio.get_running_loop()
        striking: list[asyncio.Future[None]] = []
        for fault in plan.faults(self.plan):
            await asyncio.sleep(max(0.0, fault.at - self.now))
            striking.append(loop.run_in_executor(None, self.striker.strike, fault))
        await together(*striking)

    async def _create(self, name: str, **body: Any) -> str:
        view = await self.caller.call(
            "POST", "/v1/devboxes/create_and_await_running", {"name": name, **SMALL, **body}, hold=30
        )
        self.every_box.add(view["id"])
        until = time.monotonic() + SETTLE_SECONDS
        while view["status"] in ("provisioning", "initializing"):
            if time.monotonic() > until:
                raise GivenUp(f"devbox {view['id']} is still {view['status']}")
            await asyncio.sleep(0.3)
            view = await self.caller.call("GET", f"/v1/devboxes/{view['id']}")
        if view["status"] != "running":
            raise GivenUp(f"devbox {view['id']} ({name}) is {view['status']}: {view.get('failure_reason')}")
        return str(view["id"])

    async def _slot(self, number: int) -> None:
        jobs = plan.jobs(self.plan, number)
        if plan.is_shell(number):
            await self._shell(jobs)
            return
        while not self._over:
            job = next(jobs)
            await self._command(job, self.boxes[job.box])
            await asyncio.sleep(0.05)

    async def _shell(self, jobs: Iterator[plan.Job]) -> None:
        """Commands of one shell, some of which wait in its line while one runs."""
        running: set[asyncio.Task[Command]] = set()
        while not self._over:
            job = next(jobs)
            begun = asyncio.Event()
            running.add(asyncio.create_task(self._command(job, self.boxes[job.box], begun)))
            await begun.wait()
            while len(running) > SHELL_LINE:
                _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        await together(*running)

    @asynccontextmanager
    async def _noted(self, what: str) -> AsyncIterator[None]:
        try:
            yield
        except GivenUp as error:
            self.find(f"{what}: {error}")

    async def _command(self, job: plan.Job, box: str, begun: asyncio.Event | None = None) -> Command:
        """Run one and see it to its end. `begun` is set once it has been acknowledged, or never will be."""
        try:
            return await self._run_command(job, box, begun or asyncio.Event())
        finally:
            if begun is not None:
                begun.set()

    async def _run_command(self, job: plan.Job, box: str, begun: asyncio.Event) -> Command:
        command = Command(job, box, self.now)
        self.commands.append(command)
        async with self._noted(command.title):
            if job.how == "sync":
                left = self._until() - time.monotonic()
                body = {"command": job.command}
                answer = await self.caller.call(
                    "POST", f"/v1/devboxes/{box}/execute_sync", body, hold=left, patience=left
                )
                command.id, command.answer = str(answer.get("execution_id", "")), answer
            else:
                await self._begun(command)
                begun.set()
                await together(
                    self._waited(command),
                    *(self._followed(command, stream) for stream in STREAMS if job.how == "follow"),
                    *([self._fed(command)] if job.ending == "echo" else []),
                    *([self._killed(command)] if job.after or job.ending == "stay" else []),
                )
        command.ended = self.now
        return command

    async def _begun(self, command: Command) -> None:
        job, devbox = command.job, f"/v1/devboxes/{command.box}"
        body: dict[str, Any] = {"command": job.command}
        if job.shell:
            body["shell_name"] = job.shell
        if job.how == "execute":
            body |= {"command_id": f"{self.plan.seed}-{job.name}", "optimistic_timeout": 3}
            answer = await self.caller.call("POST", f"{devbox}/execute", body, hold=3)
        else:
            if job.ending == "echo":
                body |= {"attach_stdin": True}
            answer = await self.caller.call("POST", f"{devbox}/execute_async", body)
        command.id = str(answer["execution_id"])

    async def _waited(self, command: Command) -> None:
        rng = random.Random(command.id)
        while not await self.caller.wait(command.path, rng.uniform(0.5, 25.0)):
            if time.monotonic() > self._until():
                raise GivenUp(f"it has not ended {SETTLE_SECONDS:g} s after the end of the run")
        command.answer = await self.caller.call("GET", command.path, last_n="1000000")

    async def _followed(self, command: Command, stream: str) -> None:
        command.live[stream] = await self.caller.follow(command.path, stream, self._until)

    async def _fed(self, command: Command) -> None:
        for number in range(command.job.count):
            text = f"given {number} {'é' * (number % 7)}\n"
            answer = await self.caller.call("POST", f"{command.path}/send_std_in", {"text": text}, hold=10)
            command.given.append((text, bool(answer["success"])))
            await asyncio.sleep(command.job.gap)
        answer = await self.caller.call("POST", f"{command.path}/send_std_in", {"signal": "EOF"}, hold=10)
        if not answer["success"]:
            # Its input has not ended, so it never will by itself.
            await self._kill(command)

    async def _killed(self, command: Command) -> None:
        await asyncio.sleep(command.job.after)
        await self._kill(command)

    async def _kill(self, command: Command) -> None:
        command.killed = True
        await self.caller.call("POST", f"{command.path}/kill", {}, hold=5)

    async def _churn(self, number: int) -> None:
        """Devboxes come and go: some are used, some are ended with a command in them, some before they run."""
        rng = random.Random(f"churn {self.plan.seed} {number}")
        count = 0
        while not self._over:
            count += 1
            name, early = f"passing-{number}-{count}", rng.random() < 0.2
            async with self._noted(name):
                if early:
                    view = await self.caller.call("POST", "/v1/devboxes", {"name": name, **SMALL})
                    box = str(view["id"])
                    self.every_box.add(box)
                    await asyncio.sleep(rng.uniform(0.0, 0.3))
                else:
                    content = f"{name}\n"
                    box = await self._create(
                        name,
                        file_mounts={"/home/user/mounted": content},
                        launch_parameters={**SMALL["launch_parameters"], "launch_commands": ["cp mounted launched"]},
                    )
                    body = {"command": "cat mounted launched"}
                    done = await self.caller.call("POST", f"/v1/devboxes/{box}/execute_sync", body, hold=60)
                    if done["stdout"] != content * 2:
                        self.find(f"{name} runs without what it was to be launched with: {done}")
                    quick = plan.Job(f"c{number}.{count}q", 0, 3, 30, 0.0, 1, False, "exit", 7, "poll")
                    cut = plan.Job(f"c{number}.{count}s", 0, 5000, 60, 0.1, 2, False, "stay", 0, "follow", after=0.0)
                    staying = asyncio.create_task(self._cut_short(cut, box))
                    await self._command(quick, box)
                    await asyncio.sleep(rng.uniform(0.0, 2.0))
                view = await self.caller.call("POST", f"/v1/devboxes/{box}/shutdown")
                if view["status"] != "shutdown":
                    self.find(f"{name}: a shutdown was answered with {view['status']}")
                if not early:
                    await staying
            await asyncio.sleep(rng.uniform(0.5, 3.0))

    async def _cut_short(self, job: plan.Job, box: str) -> None:
        """A command that its devbox takes along."""
        command = Command(job, box, self.now, killed=True)
        self.commands.append(command)
        async with self._noted(command.title):
            try:
                await self._begun(command)
            except GivenUp as error:
                if "commands run only while it is running" in str(error):
                    self.commands.remove(command)  # the shutdown was quicker
                    return
                raise
            await together(self._waited(command), *(self._followed(command, stream) for stream in STREAMS))
        command.ended = self.now

    async def _sleeper(self) -> None:
        """A devbox that sleeps and wakes over and over, with a number on its disk that has to be the last one."""
        turn = 0
        async with self._noted("sleeper"):
            box = await self._create("sleeper")
            while not self._over:
                await self._written(box, f"echo {turn} > ~/turn && cat ~/turn", turn)
                cut = plan.Job(f"z{turn}", 0, 5000, 60, 0.1, 2, False, "stay", 0, "poll", after=0.0)
                staying = asyncio.create_task(self._cut_short(cut, box))
                await asyncio.sleep(0.3)
                for verb, status in (("suspend", "suspended"), ("resume", "running")):
                    await self.caller.call("POST", f"/v1/devboxes/{box}/{verb}")
                    await self._reached(box, status)
                    if status == "suspended":
                        await staying
                await self._written(box, "cat ~/turn", turn)
                turn += 1
            await self.caller.call("POST", f"/v1/devboxes/{box}/shutdown")
        self.say(f"the sleeper woke {turn} times")

    async def _reached(self, box: str, status: str) -> None:
        until = time.monotonic() + SETTLE_SECONDS
        while (view := await self.caller.call("GET", f"/v1/devboxes/{box}"))["status"] != status:
            if view["status"] in ("failure", "shutdown") or time.monotonic() > until:
                raise GivenUp(f"devbox {box} is {view['status']} and not {status}: {view.get('why')}")
            await asyncio.sleep(0.2)

    async def _written(self, box: str, command: str, turn: int) -> None:
        """What a command finds on the disk; a command may be lost with all that saw it, the disk never."""
        for _ in range(3):
            done = await self.caller.call("POST", f"/v1/devboxes/{box}/execute_sync", {"command": command}, hold=60)
            if done["exit_status"] == 0:
                break
        if (done["stdout"], done["exit_status"]) != (f"{turn}\n", 0):
            self.find(f"the disk of the sleeper has not what was written in turn {turn}: {done}")

    # -- afterwards ----------------------------------------------------------------------------------------------------

    async def close_boxes(self) -> None:
        """See that no command is left running in the devboxes, and shut them down."""

        async def close(box: str) -> None:
            body = {"command": f"pgrep -fa '{writer.MARK[:-1]}[{writer.MARK[-1]}]' | cut -c1-60; true"}
            async with self._noted(f"devbox {box}"):
                done = await self.caller.call("POST", f"/v1/devboxes/{box}/execute_sync", body, hold=20)
                if done["stdout"]:
                    self.find(f"devbox {box} still runs commands that have ended: {done['stdout'][:300]}")
                await self.caller.call("POST", f"/v1/devboxes/{box}/shutdown")

        await together(*(close(box) for box in self.boxes))

    async def read_again(self) -> None:
        """Read every output once more from its beginning, now that it is where it stays."""
        gate = asyncio.Semaphore(8)
        until = time.monotonic() + SETTLE_SECONDS

        async def read(command: Command) -> None:
            async with gate, self._noted(f"{command.title}, read again"):
                for stream in STREAMS:
                    command.stored[stream] = await self.caller.follow(command.path, stream, lambda: until)
                command.final = await self.caller.call("GET", command.path, last_n="1000000")
                command.account = await self.caller.call("GET", f"{command.path}/why")
                if command.in_logs:
                    path = f"/v1/devboxes/{command.box}/logs"
                    command.logs = (await self.caller.call("GET", path, execution_id=command.id))["logs"]

        await together(*(read(command) for command in self.commands if command.id))

    async def listed(self, box: str) -> list[str]:
        """The ids of all executions that the list of a devbox has, page by page."""
        found: list[str] = []
        while True:
            after = found[-1] if found else ""
            path = f"/v1/devboxes/{box}/executions"
            page = await self.caller.call("GET", path, limit="50", starting_after=after)
            found += [entry["execution_id"] for entry in page["executions"]]
            if not page["has_more"]:
                return found

    async def _watch_memory(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            for name, pid in self._long_lived().items():
                size = memory_mb(pid)
                if size:
                    sample = self.memory.setdefault(f"{name} {pid}", Sample(size))
                    sample.most, sample.last = max(sample.most, size), size
            try:
                await asyncio.wait_for(stop.wait(), 2.0)
            except TimeoutError:
                pass

    def _long_lived(self) -> dict[str, int]:
        found = dict(self.site.roles())
        for at, pid in enumerate(sorted(children(found.get("web", 0)))):
            found[f"web worker {at}"] = pid
        found |= {f"keeper {slot}": pid for slot, pid in self.site.keepers().items()}
        if hostd := self.site.hostd():
            found["hostd"] = hostd
        return found
