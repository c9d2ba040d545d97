"""The command line ``restore-kernels profile``: what to measure, and where the results go."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from restore_kernels.profiling import results as files
from restore_kernels.profiling.cases import CPU_CASES, GPU_CASES, GROWTH_CASES, OPERATORS, BenchmarkCase
from restore_kernels.profiling.cases.case import nearest, one_of
from restore_kernels.profiling.machine import ceilings, machine
from restore_kernels.profiling.measure import exact_products
from restore_kernels.profiling.run import affordable, measure, trace

CASES = {"cpu": CPU_CASES, "cuda": GPU_CASES}
DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip

# --quick leaves out what takes the published computation more operations than this, a few seconds on a CPU;
# of growing sizes, which tell more the more they are, only what takes parts of one.
QUICK, QUICK_GROWTH = 2e11, 3e9

# Which libraries show the results in which way; all come with the extra `profile`.
LIBRARIES = {"table": ("rich",), "html": ("jinja2", "matplotlib")}


class UsageError(Exception):
    """A mistake in the command line, told in one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def run(arguments: Sequence[str]) -> int:
    """Run ``profile`` with these arguments; the exit status is 1 if a case failed, 2 for a mistake."""
    try:
        return _profile(arguments)
    except (UsageError, ValueError, OSError) as error:
        print(f"restore-kernels profile: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _profile(arguments: Sequence[str]) -> int:
    args = _parse(arguments)
    cases, growth = _chosen(args)
    for name in ("json", "csv", "html", "trace"):
        path = getattr(args, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"--{name} {path}: there is no folder {path.absolute().parent}")
    _need_libraries(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    dtypes = args.dtype or (["bfloat16", "float32"] if args.device == "cuda" else ["float32"])

    results: files.Results = {
        "machine": machine(args.device), "ceilings": {}, "cases": [], "growth": [],
    }  # fmt: skip
    jobs = [*dict.fromkeys((DTYPES[name], case) for name in dtypes for case in cases)]
    try:
        measured, failed = _measure(args, results, jobs, [(DTYPES[dtypes[0]], case) for case in growth])
    except BaseException:
        if results["cases"]:
            _write(args, results, interrupted=True)
        raise
    _write(args, results)
    if args.trace:
        names = [[*row["alternatives"]] for row in results["cases"]]
        timed = [(case, dtype, own) for (dtype, case), own in zip(measured, names, strict=True)]
        trace(timed, args.device, args.trace)
        print(f"wrote {args.trace}", file=sys.stderr)
    if args.table:
        from rich.console import Console

        from restore_kernels.profiling.table import show

        show(results, Console())
    return 1 if failed else 0


Job = tuple[torch.dtype, BenchmarkCase]


@exact_products()
def _measure(
    args: argparse.Namespace, results: files.Results, jobs: Sequence[Job], growth: Sequence[Job]
) -> tuple[list[Job], int]:
    """Add to the results; which jobs were measured, in the order of their rows, and how many failed."""
    device, begin, failed = args.device, time.monotonic(), 0
    seconds = args.seconds or (0.5 if args.quick else 3.0)
    dtypes = dict.fromkeys(dtype for dtype, _ in jobs)

    def add_ceilings() -> None:
        for dtype in dtypes:
            found, name = ceilings(device, dtype, min(seconds, 2.0)), _name(dtype)
            known = results["ceilings"].setdefault(name, found)
            results["ceilings"][name] = {rate: max(found[rate], known[rate]) for rate in found}

    def rows(
        kind: str, jobs: Sequence[Job], measure_one: Callable[[Job], files.Row]
    ) -> Iterator[tuple[Job, files.Row]]:
        """Of what is begun in time and does not fail, by being too large, say: that stops no other."""
        nonlocal failed
        for i, job in enumerate(jobs, 1):
            if args.limit is not None and time.monotonic() - begin >= args.limit:
                print(f"{args.limit:g} s are over: {len(jobs) - i + 1} left out ({kind})", file=sys.stderr)
                return
            print(f"{kind} {i} of {len(jobs)}, {_name(job[0])}: {job[1]}", file=sys.stderr, flush=True)
            try:
                row = measure_one(job)
            except Exception as error:
                print(f"failed: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
                failed += 1
            else:
                yield job, row

    def whole(job: Job) -> files.Row:
        passes = args.html is not None or not args.quick
        return measure(job[1], device, job[0], seconds, compiled=args.compile, passes=passes)

    def grown(job: Job) -> files.Row:
        return measure(job[1], device, job[0], seconds / 4, compared=affordable(job[1], device))

    add_ceilings()
    measured: dict[Job, files.Row] = {}
    for job, row in rows("case", jobs if args.limit is None else _by_rank(jobs), whole):
        measured[job] = row
        results["cases"] = [measured[job] for job in jobs if job in measured]
    results["growth"] += [row for _, row in rows("growing", growth, grown)]
    add_ceilings()
    return [job for job in jobs if job in measured], failed


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _by_rank(jobs: Sequence[Job]) -> list[Job]:
    """The first case of every operator, then the second ones: where time is short, something of each."""
    rank: dict[Job, int] = {}
    seen: Counter[object] = Counter()
    for dtype, case in jobs:
        rank[dtype, case] = seen[dtype, type(case)]
        seen[dtype, type(case)] += 1
    return sorted(jobs, key=rank.__getitem__)


def _results_path(args: argparse.Namespace, results: files.Results) -> Path:
    args.out.mkdir(parents=True, exist_ok=True)
    own = results["machine"]
    return args.out / files.file_name(own["gpu"] or own["processor"])


def _write(args: argparse.Namespace, results: files.Results, *, interrupted: bool = False) -> None:
    """Write the files that were asked for; what was cut short lies beside what was not, and has no page."""
    outputs: list[tuple[Path | None, Callable[[files.Results, Path], None], bool]] = [
        (args.json, files.write_json, interrupted), (args.csv, files.write_csv, interrupted),
    ]  # fmt: skip
    if args.out:
        path = _results_path(args, results)
        outputs.append((path, files.write_json, interrupted or _has_more(path, results)))
    if args.html and not interrupted:
        from restore_kernels.profiling.page import write_html

        outputs.append((args.html, write_html, False))
    for path, write, short in outputs:
        if path is None or (short and files.is_written_through(path)):  # beside a pipe there is no place
            continue
        partial = path.with_name(f"{path.name}.partial")
        write(results, partial if short else path)
        print(f"wrote {partial if short else path}", file=sys.stderr)
        if not short:
            partial.unlink(missing_ok=True)  # of an earlier run


def _has_more(path: Path, results: files.Results) -> bool:
    return path.exists() and len(json.loads(path.read_text())["cases"]) > len(results["cases"])


def _chosen(args: argparse.Namespace) -> tuple[list[BenchmarkCase], list[BenchmarkCase]]:
    """The cases to measure, and those that show how they grow."""
    given = {name: value for name, value in vars(args).items() if name in _OPTIONS and value is not None}
    registered = [*CASES[args.device]]
    if args.operator:
        kind = OPERATORS[args.operator]
        own = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        if foreign := [name for name in given if name not in own]:
            flags = [f"--{_OPTIONS[name].metadata['flag']}" for name in own if name in _OPTIONS]
            flag = f"--{_OPTIONS[foreign[0]].metadata['flag']}"
            close = nearest(flag, flags)
            raise UsageError(f"{args.operator} has no {flag}; it has {', '.join(flags)}; nearest is {close}")
        registered = [case for case in registered if isinstance(case, kind)]
        growth = [case for case in GROWTH_CASES if isinstance(case, kind)]
    elif given:
        raise UsageError(f"--{_OPTIONS[next(iter(given))].metadata['flag']} is for one operator: name it")
    else:
        growth = [*GROWTH_CASES]
    if given:
        # What is not given is that of the registered case which agrees with the most of what is.
        like = max(registered, key=lambda case: sum(getattr(case, name) == given[name] for name in given))
        case = dataclasses.replace(like, **given, backward=True)  # type: ignore[type-var]
        case.check()
        registered, growth = [case], [case.grown(part) for part in (1 / 16, 1 / 4)]
    elif args.quick:
        registered = [case for case in registered if case.published_flops <= QUICK]
        growth = [case for case in growth if case.published_flops <= QUICK_GROWTH]
    if args.forward_only:
        registered, growth = _forward(registered), _forward(growth)
    wanted = args.html is not None or (args.all and not args.quick)
    return registered, growth if wanted else []


def _forward(cases: Sequence[BenchmarkCase]) -> list[BenchmarkCase]:
    """The cases without backward, each once."""
    return [*dict.fromkeys(dataclasses.replace(case, backward=False) for case in cases)]  # type: ignore[type-var]


def _need_libraries(args: argparse.Namespace) -> None:
    """Before anything is measured: what shows the results is there. Files of data need none."""

    def missing(kind: str) -> list[str]:
        return [name for name in LIBRARIES[kind] if importlib.util.find_spec(name) is None]

    lacking = missing("html") if args.html else []
    args.table = not missing("table")
    if not args.table and not (args.json or args.csv or args.trace or args.out or args.html):
        lacking = missing("table")
    if lacking:
        raise UsageError(f"this needs {', '.join(lacking)}: pip install {' '.join(lacking)}")


# The options of all operators, by the name of the field that they set.
_OPTIONS: dict[str, dataclasses.Field[Any]] = {
    field.name: field
    for case in OPERATORS.values()
    for field in dataclasses.fields(case)  # type: ignore[arg-type]
    if "flag" in field.metadata
}


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="restore-kernels profile", allow_abbrev=False,
        description="Time the operators against the published computation, say what bounds them and how far "
        "they are from that. A backend whose results are wrong gets no time.",
    )  # fmt: skip
    parser.add_argument(
        "operator", nargs="?", type=_parsed(one_of(*OPERATORS)), metavar="OPERATOR",
        help=f"{', '.join(OPERATORS)}: all its registered cases, or the one that the options of the case say",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="every registered case of every operator")
    parser.add_argument("--quick", action="store_true", help="leave out what takes long")

    case = parser.add_argument_group("the case")
    for name, field in _OPTIONS.items():
        users = [o for o, kind in OPERATORS.items() if name in kind.__dataclass_fields__]  # type: ignore[attr-defined]
        whose = "" if len(users) == len(OPERATORS) else f" ({', '.join(users)})"
        case.add_argument(
            f"--{field.metadata['flag']}", dest=name, type=_parsed(field.metadata["parse"]),
            metavar=field.metadata["flag"].upper(), help=field.metadata["help"] + whose,
        )  # fmt: skip
    case.add_argument("--forward-only", action="store_true", help="without backward")

    how = parser.add_argument_group("how")
    how.add_argument(
        "--dtype", type=_parsed(one_of(*DTYPES)), action="append", metavar="DTYPE",
        help=f"{', '.join(DTYPES)}; repeatable (default: float32, on a GPU bfloat16 too)",
    )  # fmt: skip
    here = "cuda" if torch.cuda.is_available() else "cpu"
    how.add_argument(
        "--device", type=_parsed(one_of(*CASES)), default=here, help=f"cpu or cuda (default: {here})"
    )
    how.add_argument("--threads", type=_positive(int), help="CPU threads (default: PyTorch's)")
    how.add_argument(
        "--seconds", type=_positive(float), help="measuring time per case (default: 3, quick 0.5)"
    )
    how.add_argument(
        "--limit", type=_positive(float), metavar="SECONDS",
        help="begin no case after so many; the operators take turns, so that something of each is measured",
    )  # fmt: skip
    how.add_argument("--compile", action="store_true", help="also time torch.compile of the baseline")

    out = parser.add_argument_group(
        "results, beside the table", "If the run is interrupted, FILE.partial, of data alone."
    )
    out.add_argument("--json", type=Path, metavar="FILE", help="everything, as data")
    out.add_argument("--csv", type=Path, metavar="FILE", help="one line per time measured")
    out.add_argument(
        "--html", type=Path, metavar="FILE", help="a page with plots that needs nothing beside it"
    )
    out.add_argument(
        "--trace", type=Path, metavar="FILE", help="a Chrome trace of a step of everything timed"
    )
    out.add_argument(
        "--out", type=Path, metavar="DIR",
        help="JSON named after the machine, or .partial where one with more cases is; with --all alone",
    )  # fmt: skip

    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise UsageError(f"there is no {unknown[0]}; nearest is {nearest(unknown[0], flags)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no CUDA GPU here; nearest is cpu")
    if bool(args.operator) == args.all:
        raise UsageError(f"give either --all or one operator: {', '.join(OPERATORS)}")
    if args.out and (args.operator or args.quick or args.forward_only or args.dtype):
        raise UsageError("a results file has every case: --out goes with --all, nothing left out")
    return args


def _parsed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """As argparse wants it: what ValueError says becomes the message."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _positive(kind: type[int] | type[float]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if (value := kind(text)) <= 0:
            raise ValueError(f"must be positive; got {text}")
        return value

    return _parsed(parse)
