"""llm-sandbox's interactive session: IPython in a container, spoken to through files and ``docker exec``."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.contenders import Contender, Tools
from benchmarks.processes import Processes
from benchmarks.unavailable import Unavailable

# Where llm-sandbox looks for its Python, from llm_sandbox.const and its default workdir.
_VENV = "/sandbox/.sandbox-venv"
_DOCKERFILE = f"""ARG BASE
FROM ${{BASE}}
COPY site /opt/bench-site
RUN python3 -m venv --without-pip {_VENV} \\
 && cp -r /opt/bench-site/. {_VENV}/lib/python3.13/site-packages/ \\
 && python3 -m compileall -q {_VENV}/lib/python3.13/site-packages || true
RUN printf '#!/bin/sh\\nexec {_VENV}/bin/python -m pip "$@"\\n' > {_VENV}/bin/pip && chmod 755 {_VENV}/bin/pip
CMD ["/bin/sh"]
"""


class LlmSandbox(Contender):
    """llm-sandbox, in a local image that has ready what its session would install at each start (pip, IPython).

    So it needs no registry, and its start is measured at its best. It has no tools, no variables and no values: inputs
    go in as JSON files by its own ``copy_to_runtime``, and what IPython shows is read back.

    Raises:
        Unavailable: It is not installed, or its image cannot be made.
    """

    name = "llm-sandbox"
    lacks = frozenset({"tools", "pandas"})
    slow = True

    def __init__(self) -> None:
        if importlib.util.find_spec("llm_sandbox") is None:
            raise Unavailable("it is not installed (pip install 'llm-sandbox[docker]')")
        try:
            self._image = _ensure_image()
        except Exception as error:
            raise Unavailable(f"its image cannot be made: {error}") from error

    def make(self, tools: Tools, variant: str = "plain") -> Any:
        return _Interpreter(self._image)

    def discard(self, interpreter: Any) -> None:
        # Its own end waits ten seconds for a shell that ignores the signal: measured as "shutdown", and only there.
        subprocess.run(["docker", "kill", interpreter.container_id], capture_output=True, check=False)
        interpreter.shutdown()

    def processes(self, interpreter: Any) -> Processes:
        top = subprocess.check_output(["docker", "top", interpreter.container_id, "-eo", "pid"], text=True)
        return {"worker": [int(line) for line in top.split()[1:]]}


class _Interpreter:
    """The two methods that the cases use."""

    def __init__(self, image: str) -> None:
        from llm_sandbox.interactive import InteractiveSandboxSession

        self._session = InteractiveSandboxSession(
            image=image, skip_environment_setup=True, keep_template=True, max_memory="4g", timeout=600.0
        )
        self._open = False

    @property
    def container_id(self) -> str:
        """The container, once started."""
        return str(self._session.container.id)

    def execute(self, code: str, variables: dict[str, Any] | None = None) -> Any:
        """Run code and return the value that IPython shows for its last expression."""
        if not self._open:
            self._session.open()
            self._open = True
        loads = "".join(self._send(name, value) for name, value in (variables or {}).items())
        output = self._session.run(loads + code)
        if output.exit_code != 0:
            raise RuntimeError((output.stderr or output.stdout)[-500:])
        return shown_value(output.stdout)

    def shutdown(self) -> None:
        """Remove the container."""
        if self._open:
            self._open = False
            self._session.close()

    def _send(self, name: str, value: Any) -> str:
        target = f"/sandbox/{name}.json"
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(value, file)
            file.flush()
            self._session.copy_to_runtime(file.name, target)
        return f"import json\n{name} = json.load(open({target!r}))\n"


def shown_value(stdout: str) -> Any:
    """Return the value after IPython's last ``Out[n]:``, or else the text."""
    shown = re.search(r"(?:.*\n)?Out\[\d+\]: ?(.*)", stdout, re.DOTALL)
    if shown is None:
        return stdout
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(shown[1].strip())
    return shown[1]


def _ensure_image() -> str:
    from host_client.base_image import ensure_base
    from host_client.engine import connect_engine
    from host_client.wheels import ensure_site

    with connect_engine() as engine:
        site = ensure_site("bench-llm-site", ["ipython", "pip"], str(engine.version()["Arch"]), print)
        # A tag of the repository of our bases, so that `make clean` removes it too.
        tag = f"rlm-sandbox-base:{site.name}"
        if not engine.image_exists(tag):
            with tempfile.TemporaryFile() as context:
                with tarfile.open(fileobj=context, mode="w") as archive:
                    text = tarfile.TarInfo("Dockerfile")
                    text.size = len(_DOCKERFILE)
                    archive.addfile(text, io.BytesIO(_DOCKERFILE.encode()))
                    archive.add(Path(site), "site")
                context.seek(0)
                for _ in engine.build(context, tag=tag, buildargs={"BASE": ensure_base(engine, print)}):
                    pass
        return tag
