"""Change one thing at a time in what must not be wrong, and count what the tests notice.

    make mutate                        scram, frames, payload and session
    make mutate ONLY=scram,session     these alone
    make mutate ONLY=scram.normalise   the mutants of one function; scram.normalise-3 is one mutant

mutmut makes the mutants: inside the functions of a module it changes a comparison, a number, a
text, an argument, an assignment. What is at the level of a module, its tables and constants, it
leaves alone. Each mutant has a process of its own, in which it stands in the place of the module
from the first import on, and the tests that concern the module run there until one fails.

A mutant is killed if pytest says that tests failed (its exit code 1). It is killed too if the tests
take many times the CPU that they need, or if a C library crashes under them; each of both is told.
It survives if they pass. Everything else is an error of this program or of the tests, and ends it:
no verdict is made of it. Hypothesis draws the same examples each time, so that verdicts repeat.

Each survivor is shown. It is a test that is missing, code that does nothing, or a change that
nobody could notice. `.mutate/` has the output of the tests with each mutant.
"""

from __future__ import annotations

import argparse
import difflib
import enum
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.metadata import version
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType
from typing import Any, Final, NoReturn

# Third-party code alone, which each mutant's process inherits; `conduit` each imports anew.
import hypothesis
import libcst
import msgpack  # noqa: F401  # for those that are forked
import pydantic  # noqa: F401  # likewise
import pytest
from mutmut.mutation.file_mutation import create_mutations, deep_replace

ROOT: Final = Path(__file__).resolve().parent.parent
WORK: Final = ROOT / ".mutate"
KILLERS: Final = WORK / "killers.txt"
"""The names of the tests that have failed, one for each mutant."""
FLOOR: Final = 90
"""Percent of the mutants of each module that must be killed."""
TESTS: Final = {
    "scram": (
        "tests/test_scram.py",
        "tests/protocol/test_login.py",
        "tests/test_handshake_tampering.py",
    ),
    "frames": (
        "tests/protocol/test_frames.py",
        "tests/protocol/test_cndt.py",
        "tests/protocol/test_describe.py",
    ),
    "payload": (
        "tests/protocol/test_payload.py",
        "tests/protocol/test_round_trip.py",
        "tests/protocol/test_cndt.py",
    ),
    "session": ("tests/protocol/test_session.py", "tests/protocol/test_resume.py"),
}
"""Module of `conduit.protocol` -> what runs with its mutants, and starts no other process."""

CPU: Final = 10
"""Seconds that the tests may take with a mutant, and so many times what they take without one."""
PATIENCE: Final = 3600
"""Seconds after which a process that waits for something is ended, which is no verdict."""
MEMORY: Final = 4 << 30
"""Bytes of address space; what asks for more gets a MemoryError."""
ENDED: Final = 100
"""Added to pytest's exit code, which so cannot be taken for that of a process that broke."""


@dataclass(frozen=True)
class Mutant:
    """A module with one change; with none it has no name.

    Attributes:
        name: Module, function and number, such as `scram.ClientScram.first-2`.
        module: Its name in `conduit.protocol`.
        source: All of its text.
    """

    name: str
    module: str
    source: str

    @property
    def log(self) -> Path:
        return WORK / f"{self.name or self.module}.log"


class Verdict(enum.Enum):
    """How the tests can end."""

    SURVIVED = "survived"
    FAILED = "failed"
    ENDLESS = "endless"
    CRASHED = "crashed"


VERDICTS: Final = {
    ENDED + pytest.ExitCode.OK: Verdict.SURVIVED,
    ENDED + pytest.ExitCode.TESTS_FAILED: Verdict.FAILED,
    -signal.SIGXCPU: Verdict.ENDLESS,
    -signal.SIGSEGV: Verdict.CRASHED,
}
"""Exit code of a mutant's process, or the signal that ended it -> what that means."""


@dataclass
class Outcome:
    """What became of the mutants of a module."""

    module: str
    verdicts: Counter[Verdict] = field(default_factory=Counter)

    @property
    def killed(self) -> int:
        return self.verdicts.total() - self.verdicts[Verdict.SURVIVED]

    @property
    def share(self) -> float:
        return 100 * self.killed / (self.verdicts.total() or 1)


class Unclear(Exception):
    """The tests ended in a way that says nothing about the mutant."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Count the mutants that the tests kill.")
    parser.add_argument("--only", default="", help="modules, functions or mutants, with commas")
    chosen = [name for name in parser.parse_args().only.split(",") if name]
    os.chdir(ROOT)
    sys.path[0] = str(ROOT)  # in place of tools/
    os.environ["PYTHONHASHSEED"] = "0"
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    started = time.monotonic()
    wanted = {name.partition(".")[0] for name in chosen} or set(TESTS)
    if unknown := wanted - set(TESTS):
        return fail(f"not a module: {', '.join(unknown)}; there are {', '.join(TESTS)}")
    try:
        outcomes = [judge(module, chosen) for module in TESTS if module in wanted]
    except Unclear as exc:
        return fail(str(exc))
    show(outcomes, time.monotonic() - started)
    return 0 if outcomes and all(one.share >= FLOOR for one in outcomes) else 1


def fail(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 1


def path_of(module: str) -> Path:
    return ROOT / "conduit" / "protocol" / f"{module}.py"


# What is to be tried


def mutants_of(module: str) -> Iterator[Mutant]:
    """Yield every mutant that mutmut makes of the functions of a module."""
    path = path_of(module)
    tree, mutations, _, _ = create_mutations(str(path), path.read_text())
    names = dict(functions_of(tree))
    numbers = dict.fromkeys(names, 0)
    for mutation in mutations:
        function = mutation.contained_by_top_level_function
        if function in names:
            numbers[function] += 1
            name = f"{module}.{names[function]}-{numbers[function]}"
            changed = deep_replace(tree, mutation.original_node, mutation.mutated_node)
            yield Mutant(name, module, libcst.ensure_type(changed, libcst.Module).code)


def functions_of(tree: Any) -> Iterator[tuple[Any, str]]:
    """Yield the functions and methods of a parsed module with their names."""
    for statement in tree.body:
        if isinstance(statement, libcst.FunctionDef):
            yield statement, statement.name.value
        elif isinstance(statement, libcst.ClassDef):
            for inner in statement.body.body:
                if isinstance(inner, libcst.FunctionDef):
                    yield inner, f"{statement.name.value}.{inner.name.value}"


# Trying it


def judge(module: str, chosen: Sequence[str]) -> Outcome:
    """Try the mutants of a module.

    Raises:
        Unclear: The tests fail without a mutant, or ended in no way that is a verdict.
    """
    outcome = Outcome(module)
    unchanged = Mutant("", module, path_of(module).read_text())
    ((_, verdict, needed),) = attempt_all(iter([unchanged]), 600)
    if verdict is not Verdict.SURVIVED:
        raise Unclear(f"the tests of {module} fail without a mutant, see {unchanged.log}")
    limit = CPU + int(CPU * needed)
    wanted = (one for one in mutants_of(module) if is_chosen(one.name, chosen))
    for mutant, verdict, _ in attempt_all(wanted, limit):
        outcome.verdicts[verdict] += 1
        if verdict is not Verdict.FAILED:
            print(f"{mutant.name} {verdict.value}: {difference(mutant)}", flush=True)
    return outcome


def is_chosen(name: str, chosen: Sequence[str]) -> bool:
    return not chosen or any(
        name == one or name.startswith((f"{one}.", f"{one}-")) for one in chosen
    )


def attempt_all(mutants: Iterator[Mutant], limit: int) -> Iterator[tuple[Mutant, Verdict, float]]:
    """Run the tests with each mutant, as many at a time as there are cores.

    Yields:
        The mutant, what became of it, and the seconds of CPU that it took.
    """
    running: dict[int, Mutant] = {}
    try:
        for mutant in mutants:
            running[start(mutant, limit)] = mutant
            if len(running) == (os.cpu_count() or 1):
                yield reap(running)
        while running:
            yield reap(running)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)


def start(mutant: Mutant, limit: int) -> int:
    """Start the process that runs the tests with a mutant, and return its id."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        attempt(mutant, limit)
    return pid


def reap(running: dict[int, Mutant]) -> tuple[Mutant, Verdict, float]:
    """Wait for one of the processes, and tell what it means that it ended so.

    Raises:
        Unclear: Nothing about the mutant.
    """
    pid, status, used = os.wait4(-1, 0)
    mutant = running.pop(pid)
    code = os.waitstatus_to_exitcode(status)
    if code not in VERDICTS:
        name = mutant.name or mutant.module
        raise Unclear(f"no verdict on {name}: its process ended with {code}, see {mutant.log}")
    return mutant, VERDICTS[code], used.ru_utime + used.ru_stime


def attempt(mutant: Mutant, limit: int) -> NoReturn:
    """Run the tests with a mutant, in a process that was made for it; end the process."""
    code = 1
    try:
        log = os.open(mutant.log, os.O_WRONLY | os.O_CREAT)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
        print(difference(mutant), flush=True)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
        signal.alarm(PATIENCE)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        finder = Finder(mutant)
        sys.meta_path.insert(0, finder)
        ended = run_tests(mutant.module)
        if not finder.used:
            raise RuntimeError(f"the tests did not import {finder.name}")
        code = ENDED + ended
    except BaseException:
        traceback.print_exc()
        raise
    finally:  # whatever happens: it must not go on as the program that it was forked from
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_tests(module: str) -> int:
    """Run the tests that concern a module until one fails, and return pytest's exit code."""
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    arguments += ["--assert=plain", "--tb=line"]  # to say more of a failure takes longer than it
    # Time says nothing on a machine that is busy: see `CPU` and `PATIENCE`.
    arguments += ["-o", "timeout=0"]
    # What a test module does when it is imported may fail too, and is a failure like others.
    arguments += ["--continue-on-collection-errors"]
    return int(pytest.main([*arguments, *TESTS[module]], plugins=[Repeatable(), LikelyFirst()]))


class Repeatable:
    """Has the tests run alike with each mutant, but for their order."""

    def pytest_collection(self) -> None:  # after conftest.py has chosen its profile
        # A failure is enough: it need not be made small.
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile(
            "mutate",
            derandomize=True,
            database=None,
            phases=phases,
            suppress_health_check=list(hypothesis.HealthCheck),  # some of them go by the clock
        )
        hypothesis.settings.load_profile("mutate")


class LikelyFirst:
    """Runs those tests first that have killed other mutants, the last one before all others.

    A test that fails with one mutant of a function often does with the next one.
    """

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        killers = KILLERS.read_text().splitlines() if KILLERS.exists() else []
        latest = {name: place for place, name in enumerate(killers)}
        items.sort(key=lambda item: latest.get(item.nodeid, -1), reverse=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with KILLERS.open("a") as file:
                file.write(f"{report.nodeid}\n")


class Finder(MetaPathFinder):
    """Lets the mutant be found where the module is looked for."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = f"conduit.protocol.{mutant.module}"
        self.used = False
        self._mutant = mutant

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        self.used = True
        loader = Loader(fullname, self._mutant)
        return spec_from_file_location(fullname, loader.path, loader=loader)


class Loader(SourceFileLoader):
    """Loads the mutant."""

    def __init__(self, fullname: str, mutant: Mutant) -> None:
        super().__init__(fullname, str(path_of(mutant.module)))
        self._source = mutant.source

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = compile(self._source, self.path, "exec", dont_inherit=True)
        return code


# What came of it


def difference(mutant: Mutant) -> str:
    """Return where a mutant differs from its module, and how."""
    path = path_of(mutant.module)
    before, after = path.read_text().splitlines(), mutant.source.splitlines()
    lines = list(difflib.unified_diff(before, after, lineterm="", n=0))[2:]
    return "\n".join([str(path.relative_to(ROOT)), *(f"    {line}" for line in lines)])


def show(outcomes: list[Outcome], seconds: float) -> None:
    """Print the table."""
    print(f"\n{'module':<10}{'mutants':>9}{'killed':>9}{'share':>10}   of the killed")
    for one in outcomes:
        kinds = (
            f"{one.verdicts[kind]} {kind.value}" for kind in Verdict if kind is not Verdict.SURVIVED
        )
        print(
            f"{one.module:<10}{one.verdicts.total():>9}{one.killed:>9}{one.share:>8.1f} %   "
            + ", ".join(kinds)
        )
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"in {seconds:.0f} s with mutmut {version('mutmut')} on Python {python}")


if __name__ == "__main__":
    sys.exit(main())
