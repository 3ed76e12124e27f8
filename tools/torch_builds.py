"""Install torch on a machine without a GPU, from the first source that has it.

The build for CPUs, whose version ends in ``+cpu``, has a tenth of the size of the plain build, but
is not on PyPI. The plain build runs without a GPU as well. Three ways are tried in this order: the
build for CPUs from pip's own indexes, the same from PyTorch's index, and the plain build.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tools.environment import CommandFailed, Environment, SetupError

CPU_INDEX = "https://download.pytorch.org/whl/cpu"

_REMEDY = """
torch {version} could not be installed.
  - Where the network has a mirror of the package index, name it:
        PIP_INDEX_URL=<the mirror> make setup
  - Or put the wheel torch {version}+cpu in a folder:
        PIP_FIND_LINKS=<the folder> make setup
  - Or install any build of torch {version} into {folder} yourself; it is then kept.
"""


@dataclass(frozen=True)
class Attempt:
    """One way to install torch: arguments of pip, and ``what`` to print before the attempt."""

    arguments: tuple[str, ...]
    what: str


def attempts(version: str, cpu_index: str = CPU_INDEX) -> tuple[Attempt, ...]:
    """Return the ways to install ``version``, the cheapest first."""
    cpu = f"torch=={version}+cpu"
    patience = ("--timeout", "15", "--retries", "2")  # a network may drop packets to the outside
    return (
        Attempt((cpu,), f"{cpu} from pip's own indexes (0.2 GB)"),
        Attempt(
            (*patience, "--extra-index-url", cpu_index, cpu),
            f"{cpu} from PyTorch's index of builds for CPUs, {cpu_index} (0.2 GB)",
        ),
        Attempt(
            (f"torch=={version}",),
            f"the plain build, torch=={version}, which runs without a GPU too "
            "(2.6 GB to download, 4.5 GB on disk, some minutes)",
        ),
    )


def install(
    environment: Environment,
    version: str,
    say: Callable[[str], None],
    cpu_index: str = CPU_INDEX,
) -> None:
    """Install torch by the first attempt that succeeds; report each attempt and its failure.

    Raises SetupError with pip's output of every attempt and with remedies.
    """
    printed = []
    for attempt in attempts(version, cpu_index):
        say(f"install {attempt.what}")
        try:
            environment.pip("install", *attempt.arguments)
        except CommandFailed as error:
            say(f"not installed: {reason(error.output)}")
            printed.append(str(error))
        else:
            return
    remedy = _REMEDY.format(version=version, folder=environment.folder)
    raise SetupError("\n".join([*printed, remedy]))


def reason(output: str) -> str:
    """Return the line of pip's output with the cause of a failure."""
    if broken := re.findall(r"after connection broken by (.+)", output):
        host = re.search(r"host='([^']+)'", broken[-1])
        return f"{host[1] if host else 'an index'} cannot be reached"
    errors = re.findall(r"^ERROR: (.+)$", output, flags=re.MULTILINE)
    return errors[-1] if errors else output.strip().rpartition("\n")[2]
