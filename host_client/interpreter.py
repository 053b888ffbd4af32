"""``SandboxInterpreter``: DSPy's code interpreter on top of a sandbox."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from broker.protocol import limits
from broker.protocol.messages import ExecuteRequest, Outcome, OutputField
from broker.protocol.values import Encoder
from host_client import checks, pool_registry
from host_client.alone import Alone
from host_client.artifacts import Artifact, Artifacts
from host_client.aside import STEP_TIMEOUT_S, Aside
from host_client.broker_client import News
from host_client.budgets import Budget
from host_client.dspy_compat import contract, observed
from host_client.endings import wait_for_endings
from host_client.errors import BadSetting, SandboxError, SessionLost, SetupError
from host_client.execution import Execution
from host_client.factory import InterpreterFactory, execution_instructions, settings_of
from host_client.files import Link, SessionFiles
from host_client.history.watch import Watch
from host_client.journal import Journal
from host_client.pool import SandboxPool
from host_client.progress import Listener, reporting
from host_client.providers.base import SandboxHandle, SandboxProvider
from host_client.results import ExecutionRecord, deliver, lost_session, read_record
from host_client.sandbox_session import SandboxSession, default_provider, open_journal, survives
from host_client.sandbox_tools import check_shipped
from host_client.saved_file import open_file
from host_client.saving import RestoredSession, SavedSession, restore_session, save_session
from host_client.secret_values import Secrets
from host_client.settings import DEFAULT_SANDBOX, SandboxSettings
from host_client.snapshots import Snapshot, checked_snapshot
from host_client.tool_definitions import ToolTable, named_tools
from host_client.tool_limits import ToolLimits
from host_client.tool_runner import ToolCalls

#: Outcomes after which the variables have surely arrived; after others they have if a line of the code is known.
_ARRIVED = frozenset({Outcome.OK, Outcome.SUBMITTED})


class SandboxInterpreter:
    """Runs Python in a sandbox, with a namespace that lasts from one ``execute`` to the next.

        with SandboxInterpreter(tools={"shout": str.upper}) as interpreter:
            interpreter.execute("shout('hi')")  # 'HI'

    For DSPy, give RLM, Flex, CodeAct or ProgramOfThought ``interpreter_factory=SandboxInterpreter.factory()``;
    before DSPy 3.3, ``interpreter=SandboxInterpreter()``.

    Args:
        tools: Host functions that generated code may call, by name, or a list of them; see ``host_client.tool``.
            Parameters annotated with pydantic models get model instances. Coroutine functions are awaited, on a
            thread of their own.
        output_fields: Fields of SUBMIT, such as ``[{"name": "answer", "type": "str"}]``; None for any one value.
        execution_timeout_s: Deadline of one ``execute`` in seconds, host tools included (see
            ``SandboxSettings.timeout_includes_tools``), or None.
        settings: How the sandbox is made; by default read from ``RLM_SANDBOX_*``.
        sandbox: Name of a running sandbox to open a session in; None for a sandbox of its own.
        callbacks: DSPy callbacks for this interpreter.
        session: Name for the session, so that another process can attach to it when this one was killed; with ``pool``
            the session whose sandbox this is to get, see ``SandboxPool``.
        attach: Name or id of a session to go on with, instead of opening one; see ``attach()``.
        idempotent: Names of tools that may run twice for one call, such as ``llm_query``; see ``host_client.tool``.
        journal: Where tool calls are recorded; by default what the settings say.
        secrets: Environment variables of generated code, ``{"NAME": value}`` or ``["NAME"]`` for one of this process'
            environment; in place of those in the settings. Their values are masked in whatever comes back.
        provider: Where sandboxes come from; by default what the settings say.
        on_tool_event: Called with a ``ToolEvent`` when a tool starts, reports progress or ends; on the tool's thread.
        artifacts_to: Folder where the session's artefacts are saved after each execution; see ``artifacts``.
        budget: Limits of each run, nested runs included; see ``host_client.Budget``.
        pool: A pool to take the sandbox from, or the name of one; settings, secrets and provider are the pool's.
        keep: Leave the session as it is at ``shutdown`` and at the end of the program, for whoever attaches; it must
            have a name and be in a named sandbox. See ``create()``.

    Raises:
        BadSetting: An argument that cannot work.
        UnknownPool: There is no pool of that name.
    """

    def __init__(
        self,
        tools: Mapping[str, Callable[..., Any]] | Sequence[Callable[..., Any]] | None = None,
        output_fields: list[dict[str, Any]] | None = None,
        *,
        execution_timeout_s: float | None = 300.0,
        settings: SandboxSettings | None = None,
        sandbox: str | None = None,
        callbacks: list[Any] | None = None,
        session: str | None = None,
        attach: str | None = None,
        idempotent: Collection[str] = (),
        journal: Journal | None = None,
        secrets: Mapping[str, str] | Collection[str] | None = None,
        provider: SandboxProvider | None = None,
        on_tool_event: Listener | None = None,
        artifacts_to: str | os.PathLike[str] | None = None,
        budget: Budget | None = None,
        pool: SandboxPool | str | None = None,
        keep: bool = False,
    ) -> None:
        checks.check_keywords(
            tools=tools,
            output_fields=output_fields,
            execution_timeout_s=execution_timeout_s,
            settings=settings,
            sandbox=sandbox,
            callbacks=callbacks,
            session=session,
            attach=attach,
            idempotent=idempotent,
            journal=journal,
            secrets=secrets,
            on_tool_event=on_tool_event,
            artifacts_to=artifacts_to,
            budget=budget,
            pool=pool,
            provider=provider,
            keep=keep,
        )
        self._tools: dict[str, Callable[..., Any]] = named_tools(tools)
        self.output_fields = output_fields
        self.execution_timeout_s = execution_timeout_s
        self._pool = pool_registry.found(pool)
        self.settings = settings_of(self._pool, settings, secrets)
        self.callbacks = list(callbacks or [])
        self.last_result: ExecutionRecord | None = None
        self.resumed_result: ExecutionRecord | None = None
        self._sandbox, self._provider = sandbox, provider
        self._session_name, self._address, self._keep = session, attach, keep
        self._idempotent, self._given_journal, self._budget = tuple(idempotent), journal, budget
        self._dspy = contract()
        self._table = ToolTable(idempotent)
        self._limits = ToolLimits()
        self.on_tool_event = on_tool_event
        self._artifacts_to = artifacts_to
        self.files = SessionFiles(_weakly(self))
        self._artifacts = Artifacts(self.files, artifacts_to)
        self._alone = Alone(self._dspy)
        # Held while a session is opened; whoever comes second finds it open.
        self._starting = threading.Lock()
        # Guards the four below, for moments only: _session is open, or None before start and after the end.
        self._state = threading.Lock()
        self._session: SandboxSession | None = None
        self._finalizer: weakref.finalize[..., SandboxInterpreter] | None = None
        self._lost: SessionLost | None = None
        self._ended = False
        self._watch = Watch(self, budget)

    @classmethod
    def factory(cls, **keywords: Any) -> InterpreterFactory:
        """Return a callable for DSPy's ``interpreter_factory``: each call makes an interpreter with these keywords.

        Raises:
            BadSetting: A keyword that cannot work, at once.
        """
        return InterpreterFactory(cls, keywords)

    @classmethod
    def create(
        cls, name: str, *, sandbox: str = DEFAULT_SANDBOX, ttl_s: float | None = None, **keywords: Any
    ) -> SandboxInterpreter:
        """Open a named session that stays when this program ends, in a sandbox that runs already.

            with SandboxInterpreter.create("novel", ttl_s=8 * 3600) as interpreter:
                interpreter.execute("x = 41")                        # one program
            SandboxInterpreter.attach("novel").execute("x + 1")      # another one, hours later
            host_client.close_session("novel")                       # a third one

        ``shutdown``, the end of the program and a crash leave the session as it is; an execution that runs goes on.
        ``host_client.close_session`` ends it, and so does its time to live.

        Args:
            name: Found by it; there is one living session of a name in a sandbox.
            sandbox: The sandbox's name: ``rlm-sandbox up`` starts one.
            ttl_s: Seconds without an execution after which the broker ends it, by its own clock; by default what the
                settings say (``session_ttl_s``), or None for no end.
            keywords: As for the constructor.

        Raises:
            UnknownSandbox: It does not run.
            SessionNameTaken: There is a session of that name; says who holds it.
            SandboxError: As ``start``.
        """
        if ttl_s is not None:
            settings = keywords.get("settings") or SandboxSettings.from_environment()
            if isinstance(settings, SandboxSettings):  # anything else is refused below
                keywords["settings"] = dataclasses.replace(settings, session_ttl_s=ttl_s)
        interpreter = cls(session=name, sandbox=sandbox, keep=True, **keywords)
        interpreter.start()
        return interpreter

    @classmethod
    def attach(cls, name_or_id: str, **keywords: Any) -> SandboxInterpreter:
        """Go on with a session whose program is gone: its namespace is as it was, nothing ran twice.

        One that was made with ``create`` is left as it is at ``shutdown``; another one ends with this interpreter.

        An older client that still lives is fenced: what it does from now on changes nothing in the session.

            interpreter = SandboxInterpreter.attach("novel", tools={"look_up": look_up})
            interpreter.resume()  # what the execution gave that was under way

        Tool calls that were under way are settled by the journal: a recorded result is delivered, a tool that never
        started or is idempotent runs, any other raises ``ToolOutcomeUnknown`` in the generated code.

        Args:
            name_or_id: The session's name (keyword ``session``) or id (``session_id``); or the name of a sandbox with
                one session in it; or both, as ``sandbox/session``. A sandbox of an interpreter's own ends a minute
                after its host, and any start of another process may remove it, unless its session has a name.
            keywords: As for the constructor; the tools are not sent over by the old process.

        Raises:
            UnknownSession: It is not there (any more), or several are meant; names those that there are.
            ForeignSession: It is in a sandbox of another user.
            Fenced: Somebody else attached at the same moment.
            SessionLost: Its namespace is gone.
            JournalNewer, JournalUnusable: The journal cannot be used; the session is left as it is.
        """
        interpreter = cls(attach=name_or_id, **keywords)
        interpreter.start()
        return interpreter

    @property
    def tools(self) -> dict[str, Callable[..., Any]]:
        """The live dict: what is added, removed or replaced in it counts from the next ``execute`` on."""
        return self._tools

    @tools.setter
    def tools(self, tools: Mapping[str, Callable[..., Any]]) -> None:
        copied = named_tools(tools)
        self._tools.clear()
        self._tools.update(copied)

    @property
    def execution_instructions(self) -> str:
        """What a model should know about where its code runs."""
        return execution_instructions(self.settings, self._budget, artifacts=self._artifacts.saves)

    @property
    def artifacts(self) -> list[Artifact]:
        """What generated code made for people: figures, tables, and files in ``artifacts/`` of its folder.

        With ``artifacts_to`` as it was after the last execution, which the end of the session does not change. Else
        the session is asked, and there is nothing without one.

        Raises:
            SessionBusy: Code is running.
            SandboxError: The session gave no answer.
        """
        if self._artifacts.saves or self._session is None:
            return list(self._artifacts.latest)
        with self._linked() as link:
            return list(self._artifacts.collect(link))

    @property
    def sandbox_handle(self) -> SandboxHandle | None:
        """The sandbox, while a session is open in it."""
        session = self._session
        return None if session is None else session.handle

    @property
    def session_id(self) -> str | None:
        """The session's id, while one is open: what ``attach`` takes where it has no name."""
        session = self._session
        return None if session is None else session.session_id

    @observed
    def start(self) -> None:
        """Start the sandbox and open the session; does nothing if that was done. ``execute`` calls it too.

        Raises:
            SetupError, ProviderError, ProtocolMismatch: It could not be started; nothing is left behind.
            SessionLost: The session was lost, or the interpreter was shut down.
        """
        self._open()

    @observed
    def execute(self, code: str, variables: dict[str, Any] | None = None) -> Any:
        """Run code in the session.

        Args:
            code: Python source; top-level ``await`` is allowed.
            variables: Set in the namespace first. Large texts that have not changed are not sent again.

        Returns:
            ``FinalOutput`` if SUBMIT was called. Otherwise the last expression's value, or what was printed, or None.
            With ``output_fields`` both, as text. ``last_result`` has all of it.

        Raises:
            SyntaxError: The code is invalid.
            Exception: DSPy's class for an error in generated code (``CodeExecutionError`` from 3.3 on): it failed,
                timed out or was stopped, and the variables are still there.
            SessionLost: The namespace is gone; later calls raise at once.
            BadSetting: A tool, variable or output field that cannot work; nothing ran.
            SessionBusy: An execution is running already, in another thread or around this tool.
        """
        with self._alone:
            return self._watch.execute(self._execute, code, variables)

    __call__ = execute

    def resume(self) -> Any:
        """Return what the execution gave that the session's older client had posted last, after ``attach``.

        One that still runs is carried to its end, its tools served from here; of one that has ended, the stored reply
        is fetched. It is given once; ``execute`` resumes first where this was not called, and leaves the result in
        ``resumed_result``.

        Returns:
            As ``execute``; None where there is none, or it was given.

        Raises:
            As ``execute``.
        """
        with self._alone:
            self._table.refresh(self._tools)
            record = self._resume(self._open())
            return None if record is None else self._deliver(record)

    @observed
    def invoke_tool(self, tool_name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Run one tool on this thread and return its result, awaited if need be."""
        tool = self._table.get(tool_name)
        if tool is None:
            raise NameError(f"there is no tool {tool_name!r}")
        with reporting(self.on_tool_event, tool_name):
            return self._watch.tool(
                tool_name,
                args,
                kwargs,
                lambda: self._limits.run(tool_name, tool.marks, lambda: tool.call(args, kwargs)),
            )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> SavedSession:
        """Save the session's variables to a file, from which any sandbox can go on: ``restore``.

        The session goes on unchanged. Modules are kept by name; functions and classes that code defined are kept, and
        look their globals up where they are restored. What cannot be saved is named, with the reason, and everything
        else is saved. Files of the session are not: see ``files``. The deadline is ``execution_timeout_s``.

        Args:
            path: The file; it appears complete or not at all, and only you may read it.
            overwrite: Replace a file that is there.

        Raises:
            SaveFailed, DiskFull: Nothing was written, and the session is as it was.
            SessionBusy: Code is running.
            SandboxError: What ``execute`` raises.
        """
        with self._linked() as link:
            return save_session(link, Path(path), overwrite=overwrite, timeout_s=self.execution_timeout_s)

    def restore(self, path: str | os.PathLike[str], *, ignore_versions: bool = False) -> RestoredSession:
        """Replace the session's variables by those of a saved session; tools and files stay as they are.

        The file's content runs code, in the sandbox and nowhere else. The deadline is ``execution_timeout_s``.

        Args:
            path: A file of ``save``, from any machine.
            ignore_versions: Try it with packages of other versions too; never with another minor version of Python.

        Raises:
            SavedFileDamaged, SavedFileNewer: The file is not what was saved, or is of a newer version of this package.
            SavedFileMismatch: It was saved with another Python, or other versions of packages that it needs.
            RestoreFailed: The sandbox could not do it.
            SessionBusy: Code is running.
            SandboxError: What ``execute`` raises. Except for ``SessionLost``, the session has its old variables still.
        """
        # What is restored may run code for as long as an execution may.
        with open_file(Path(path)) as saved, self._linked(self.execution_timeout_s) as link:
            return restore_session(link, saved, ignore_versions=ignore_versions, timeout_s=self.execution_timeout_s)

    def snapshot(self, name: str | None = None) -> Snapshot:
        """Remember the namespace as it is now, in milliseconds: the session's process forks, and the fork waits.

        Not part of it: files (they are one session's, whatever its namespace), and what ``Snapshot.not_kept`` names.
        What the session changes from now on takes memory twice, in the sandbox's limit; so ``drop()`` it.

        Args:
            name: For people; made up where there is none.

        Raises:
            SessionBusy: Code is running.
            TooManySnapshots, TooManyForks: The session has as many as it may.
            ForkFailed: The sandbox has no process or memory left.
            SessionLost: The namespace is gone.
            BadSetting: The name cannot be one.
        """
        with self._copying() as session:
            checks.check_snapshot_name(name)
            return session.snapshot(name)

    def snapshots(self) -> list[Snapshot]:
        """Return the session's snapshots, oldest first; after ``attach`` those of the older client too.

        Raises:
            SessionLost: The namespace is gone.
        """
        with self._copying() as session:
            return session.snapshots()

    def rollback(self, snapshot: Snapshot) -> None:
        """Make the namespace what it was when the snapshot was taken; can be done again and again.

        Threads and child processes of the session end. Files stay as they are. Tools are the interpreter's of now.

        Args:
            snapshot: One that this session took.

        Raises:
            UnknownSnapshot: It is another session's, was dropped, or its process has ended; nothing has changed.
            SessionBusy, ForkFailed: Nothing has changed.
            SessionLost: The namespace is gone; a snapshot of it does not help then.
            BadSetting: It is no snapshot.
        """
        with self._copying() as session:
            session.roll_back(checked_snapshot(snapshot))

    def fork(self, count: int = 1) -> list[SandboxInterpreter]:
        """Make branches: sessions of their own that begin with this one's namespace, in the same sandbox.

            left, right = interpreter.fork(2)

        Each executes when it wants, with its own deadline, output, tool calls and end, and can be attached to by its
        ``session_id``. They share the sandbox's limits, and the files of the session that they come from. A sandbox of
        an interpreter's own lives as long as one of them does.

        Args:
            count: How many; all are made, or none.

        Returns:
            As many interpreters, with the same tools and arguments, to be shut down each.

        Raises:
            SessionBusy: Code is running.
            TooManyForks, ForkFailed: There are none.
            SessionLost: The namespace is gone.
            BadSetting: The count is none.
        """
        with self._copying() as session:
            checks.check_fork_count(count)
            return [self._branch(forked) for forked in session.fork(count)]

    @observed
    def shutdown(self, *, wait: bool = False) -> None:
        """End the session, and its sandbox if it is this interpreter's own; or let go of one that is kept.

        Idempotent, and safe from another thread, from a tool, and while ``execute`` runs, which then raises. A
        container is removed in the background; the exit of the process waits for that, and so does
        ``host_client.wait_for_endings()``.

        Args:
            wait: Return when the sandbox is gone.
        """
        with self._state:
            session, self._session = self._session, None
            self._ended, self._lost = True, None
        if session is not None:
            # A session whose execution is under way is of no use to the next one.
            session.release(session.loan, keep=not self._alone.held, wait=wait)
        elif wait:
            wait_for_endings()  # of a session that was lost before
        if self._finalizer is not None:
            self._finalizer.detach()
        self._watch.close()

    def __enter__(self) -> SandboxInterpreter:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def __copy__(self) -> SandboxInterpreter:
        """Return a fresh interpreter with the same arguments; DSPy copies modules together with theirs."""
        return type(self)(
            self._tools,
            self.output_fields,
            execution_timeout_s=self.execution_timeout_s,
            settings=self.settings,
            sandbox=self._sandbox,
            callbacks=self.callbacks,
            session=self._session_name,
            attach=self._address,
            idempotent=self._idempotent,
            journal=self._given_journal,
            provider=self._provider,
            on_tool_event=self.on_tool_event,
            artifacts_to=self._artifacts_to,
            budget=self._budget,
            pool=self._pool,
            keep=self._keep,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SandboxInterpreter:
        return self.__copy__()

    def _execute(self, code: str, variables: dict[str, Any] | None) -> Any:
        checks.check_code(code)
        checks.check_timeout(self.execution_timeout_s)
        fields = checks.read_output_fields(self.output_fields)
        changed = self._table.refresh(self._tools)
        if changed and self._session is not None:
            self._session.tools_sent = False
        variables = checks.check_variables(variables, self._table.names())
        session = self._open()
        self._resume(session)
        if not session.tools_sent:
            check_shipped(self._table.shipped(), self._aside(session).aside)
        if self._artifacts.saves and session.known_fields is None:  # before its first code: what it shows is kept
            self._artifacts.collect_quietly(self._aside(session))
        encoder = Encoder(keeper=session.keeper, lazy=True)
        arrived = False
        try:
            request = self._request(session, code, variables, fields, encoder)
            record = self._run(session, request, encoder)
            arrived = record.outcome in _ARRIVED or (record.error is not None and record.error.lineno is not None)
        finally:
            session.keeper.settle(arrived=arrived)
        session.tools_sent, session.known_fields = True, fields or ()
        if self._artifacts.saves and record.session_lost is None:
            self._artifacts.collect_quietly(self._aside(session))
        return self._deliver(record)

    @contextlib.contextmanager
    def _copying(self) -> Iterator[SandboxSession]:
        """Open the session where it is not, keep executions off, and close it where the block finds that it is gone."""
        with self._alone:
            session = self._open()
            self._resume(session)
            try:
                yield session
            except SandboxError as error:
                if isinstance(error, SetupError) or survives(error):
                    raise
                lost = session.lost(error)
                self._lose(session, lost)
                raise lost from error

    def _branch(self, session: SandboxSession) -> SandboxInterpreter:
        branch = self.__copy__()
        branch._session_name, branch._address, branch._keep = None, None, False
        branch._hold(session)
        return branch

    @contextlib.contextmanager
    def _linked(self, step_timeout_s: float | None = STEP_TIMEOUT_S) -> Iterator[Link]:
        """Open the session where it is not, and keep executions off."""
        with self._alone:
            session = self._open()
            self._resume(session)
            yield self._aside(session, step_timeout_s)

    def _aside(self, session: SandboxSession, step_timeout_s: float | None = STEP_TIMEOUT_S) -> Link:
        def run(code: str, variables: dict[str, Any]) -> ExecutionRecord:
            return self._run_aside(session, code, variables, step_timeout_s)

        return Link(Aside(run), session.masker)

    def _run_aside(
        self, session: SandboxSession, code: str, variables: dict[str, Any], timeout_s: float | None
    ) -> ExecutionRecord:
        """Run code of our own: ``last_result``, tools and fields stay as they are."""
        encoder = Encoder()
        request = ExecuteRequest(
            execution_id=os.urandom(16).hex(),
            code=code,
            variables={name: encoder.encode(value, name) for name, value in variables.items()},
            timeout_s=timeout_s,
        )
        record = self._run(session, request, encoder)
        if record.session_lost is not None:
            raise self._close_lost(session, lost_session(record))
        return record

    def _resume(self, session: SandboxSession) -> ExecutionRecord | None:
        """Fetch what the older client's execution gave; carry it to its end first where it runs."""
        execution_id = session.unfinished
        if execution_id is None:
            return None
        calls = self._calls(session, execution_id)
        with self._limits.execution(execution_id):
            record = self._follow(session, calls, lambda execution: execution.resume(execution_id))
        session.unfinished = None
        self.resumed_result = record
        return record

    def _deliver(self, record: ExecutionRecord) -> Any:
        session = self._session
        self.last_result = record
        try:
            return deliver(record, self._dspy, for_model=self.output_fields is not None)
        except SessionLost as lost:
            if session is not None:
                self._close_lost(session, lost)
            raise

    def _close_lost(self, session: SandboxSession, lost: SessionLost) -> SessionLost:
        session.close()
        self._lose(session, lost)
        return lost

    def _request(
        self,
        session: SandboxSession,
        code: str,
        variables: dict[str, Any],
        fields: tuple[OutputField, ...] | None,
        encoder: Encoder,
    ) -> ExecuteRequest:
        encoded = {name: encoder.encode(value, name) for name, value in variables.items()}
        if encoder.blobs:
            self._check_size(session, sum(map(len, encoder.blobs)))
        wanted = fields or ()
        return ExecuteRequest(
            execution_id=os.urandom(16).hex(),
            code=code,
            variables=encoded,
            tools=None if session.tools_sent else self._table.definitions(),
            output_fields=None if session.known_fields == wanted else wanted,
            drop=session.keeper.drop(),
            timeout_s=self._watch.timeout_s(self.execution_timeout_s),
            timeout_includes_tools=self.settings.timeout_includes_tools,
            max_output_bytes=self.settings.max_output_bytes,
        )

    def _check_size(self, session: SandboxSession, size: int) -> None:
        """Refuse variables that cannot arrive, before they are sent; what is only tight, the sandbox finds out."""
        if size > limits.MAX_FRAME_BYTES - limits.MAX_HEADER_BYTES:
            raise BadSetting(f"variables of {size:,} bytes in one execution are too much for the protocol")
        needed, memory = size + session.keeper.referred_bytes, self.settings.memory
        if session.handle.owned and needed >= memory:
            raise BadSetting(
                f"variables of {needed:,} bytes do not fit into the sandbox's memory of {memory:,} bytes",
                help="give it more: SandboxSettings(memory='4g') or RLM_SANDBOX_MEMORY=4g",
            )

    def _run(self, session: SandboxSession, request: ExecuteRequest, encoder: Encoder) -> ExecutionRecord:
        with session.executing(), self._limits.execution(request.execution_id):
            calls = self._calls(session, request.execution_id)
            return self._follow(session, calls, lambda execution: execution.run(request, encoder.blobs))

    def _calls(self, session: SandboxSession, execution_id: str) -> ToolCalls:
        return ToolCalls(
            client=session.client,
            session_id=session.session_id,
            execution_id=execution_id,
            invoke=self.invoke_tool,
            threads=session.threads,
            slots=self.settings.max_concurrent_tools,
            recorder=session.recorder,
            is_idempotent=self._table.is_idempotent,
            masker=session.masker,
            mender=session.mender,
        )

    def _follow(self, session: SandboxSession, calls: ToolCalls, run: Callable[[Execution], News]) -> ExecutionRecord:
        try:
            record = session.masker.record(
                read_record(run(Execution(session.client, session.session_id, calls, session.mender)))
            )
        except SandboxError as error:
            if calls.fatal is not None:
                raise calls.fatal from None
            if survives(error):
                raise
            lost = session.lost(error)
            self._lose(session, lost)
            raise lost from error
        if calls.fatal is not None:
            if record.session_lost is not None:
                self._lose(session, session.lost(SessionLost("stopped by a tool", reason=record.session_lost)))
            raise calls.fatal
        return record

    def _open(self) -> SandboxSession:
        session = self._session
        if session is not None:
            return session
        with self._starting:
            if self._session is not None:
                return self._session
            self._check_usable()
            try:
                opened = self._open_or_attach()
            except SandboxError as error:
                raise self._dspy.terminal(error) from error.__cause__
            self._hold(opened)
            return opened

    def _hold(self, opened: SandboxSession) -> None:
        """Have a session from now on, and end it when nobody refers to this interpreter any more."""
        finalizer = weakref.finalize(self, opened.abandon, opened.loan)
        with self._state:
            stopped = self._ended
            if not stopped:
                self._session, self._finalizer = opened, finalizer
        if stopped:
            finalizer()
            lost = SessionLost("the interpreter was shut down while it started", reason="shutdown")
            raise self._dspy.terminal(lost)

    def _open_or_attach(self) -> SandboxSession:
        if self._pool is not None:
            return self._pool.acquire(self._session_name)
        # First: where these cannot be had, nothing starts.
        secrets = Secrets.of(self.settings.secrets).values()
        journal = self._given_journal or open_journal(self.settings)
        provider = self._own_provider()
        if self._address is not None:
            return SandboxSession.attach(provider, self._address, journal=journal, secrets=secrets)
        return SandboxSession.open(
            provider,
            self.settings,
            self._sandbox,
            journal=journal,
            session_name=self._session_name,
            secrets=secrets,
            keep=self._keep,
        )

    def _check_usable(self) -> None:
        with self._state:
            if self._lost is not None:
                raise self._dspy.terminal(SessionLost(self._lost.message, reason=self._lost.reason))
            if not self._ended:
                return
            if not self._dspy.reuses_after_shutdown:
                raise self._dspy.terminal(SessionLost("the interpreter was shut down", reason="shutdown"))
            self._ended = False

    def _own_provider(self) -> SandboxProvider:
        if self._provider is None:
            self._provider = default_provider(self.settings)
        return self._provider

    def _lose(self, session: SandboxSession, lost: SessionLost) -> None:
        with self._state:
            if self._session is session:
                self._session, self._lost = None, lost


def _weakly(interpreter: SandboxInterpreter) -> Callable[[], contextlib.AbstractContextManager[Link]]:
    """Return its ``_linked`` without a reference to it: an interpreter that nobody refers to ends at once."""
    reference = weakref.ref(interpreter)

    def linked() -> contextlib.AbstractContextManager[Link]:
        alive = reference()
        if alive is None:
            raise SessionLost("the interpreter of these files is gone, and its session with it", reason="shutdown")
        return alive._linked()

    return linked
