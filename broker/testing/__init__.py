r"""The broker in a test's own process, with fakes that ship.

::

    with InProcessBroker() as box:                      # real workers, as plain child processes
        ... box.host_socket ...

    def script(execution: FakeExecution) -> ExecutionResult:
        execution.print("hello\n")
        return ExecutionResult(outcome=Outcome.OK, value=42)

    with InProcessBroker(script) as box:                # a worker that does what the script says
        status, session, _ = box.host.request("POST", "/v1/sessions")
"""

from broker.testing.clock import FakeClock
from broker.testing.fake_worker import FakeExecution, FakeSpawner, Script, WorkerEnd
from broker.testing.in_process import InProcessBroker
from broker.testing.plane_client import PlaneClient

__all__ = ["FakeClock", "FakeExecution", "FakeSpawner", "InProcessBroker", "PlaneClient", "Script", "WorkerEnd"]
