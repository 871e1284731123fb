"""`python -m tests.module_coverage`: the share of each module's lines of `flows` that its own test runs.

The own test of `flows/a/b.py` is `tests/a/test_b.py`. Each test runs in a process of its own, so that no test adds to
the share of another, and the processes that a test starts count. Exit code 1 where a share is below the bound.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BOUND = 80  # percent of the lines
RUNS = "VECTORCLM_MATRIX"  # with `full`, the tests of the benchmarks run them whole


class Share(NamedTuple):
    """The lines of a module that its own test runs."""

    module: Path
    test: Path
    lines: int
    missed: Sequence[int]
    problem: str = ""  # why there is no figure

    @property
    def percent(self) -> float:
        return 100 * (1 - len(self.missed) / self.lines) if self.lines else 0.0

    @property
    def is_enough(self) -> bool:
        return not self.problem and self.percent >= BOUND


def modules() -> list[Path]:
    """The modules of `flows` with code; a package's own file has only a docstring."""
    return [path for path in sorted((ROOT / "flows").rglob("*.py")) if path.name != "__init__.py"]


def own_test(module: Path) -> Path:
    """The test that bears a module's name."""
    inside = module.relative_to(ROOT / "flows")
    return ROOT / "tests" / inside.with_name(f"test_{inside.name}")


def share(module: Path) -> Share:
    """Run the own test of a module, and count the module's lines that it and its child processes run."""
    from coverage import Coverage

    test = own_test(module)
    if not test.exists():
        return Share(module, test, 0, (), "there is no such test")
    with tempfile.TemporaryDirectory(prefix="coverage-") as folder:
        data = Path(folder, "data")
        command = [sys.executable, "-m", "coverage", "run", f"--data-file={data}", "-m", "pytest", str(test)]
        environment = {**os.environ, RUNS: "full"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        found = Coverage(data_file=str(data), config_file=str(ROOT / "pyproject.toml"))
        found.combine([folder])
        _, lines, _, missed, _ = found.analysis2(str(module))
    last = "\n".join(done.stdout.strip().splitlines()[-8:])
    return Share(module, test, len(lines), missed, f"its test fails:\n{last}" if done.returncode else "")


def main(arguments: Sequence[str]) -> int:
    """Print the table, a line when its test has ended; returns 1 where a module's share is below the bound."""
    parser = argparse.ArgumentParser("python -m tests.module_coverage", description=__doc__)
    parser.add_argument("modules", nargs="*", type=Path, help="the modules to measure; all of flows without any")
    parser.add_argument("--jobs", type=int, default=2, help="tests that run at the same time")
    args = parser.parse_args(arguments)
    wanted = {path.resolve() for path in args.modules}
    chosen = [path for path in modules() if not wanted or path in wanted]
    with ThreadPoolExecutor(args.jobs) as threads:
        shares = []
        for found in threads.map(share, chosen):
            shares.append(found)
            module, test = (path.relative_to(ROOT) for path in (found.module, found.test))
            line = f"{module!s:40} {test!s:46} {found.lines:4} lines {found.percent:5.1f} %  {found.problem}"
            print(line.rstrip(), flush=True)
            if not found.is_enough and found.missed:
                print(f"    not run: {', '.join(map(str, found.missed))}", flush=True)
    below = sum(not found.is_enough for found in shares)
    print(f"{len(shares) - below} of {len(shares)} modules are covered to {BOUND} % or more by the test of their name")
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
