"""The page of results: every plot with its data, nothing external; it opens on a phone."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from restore_kernels.info import info
from restore_kernels.profiling.page import write_html
from restore_kernels.profiling.results import file_name

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
PHONE = 390


def entry(seconds: float, flops: float, **more: Any) -> dict[str, Any]:
    return {"median": seconds, "p20": 0.9 * seconds, "p80": 1.2 * seconds, "runs": 5, "flops": flops, **more}


def row(operator: str, size: int, dtype: str = "float32", **more: Any) -> dict[str, Any]:
    flops = 1e5 * size
    passes = {"forward": 1e-7 * size, "backward": 2e-7 * size, "rest": 1e-8 * size}
    return {
        "case": f"{operator} 1x{size}", "series": f"{operator} 1xN", "size": size, "size_name": "pixels",
        "dtype": dtype, "pass": "forward and backward", "flops": flops, "bytes": 4 * size, "pairs": None,
        "alternatives": {
            "eager": entry(1e-6 * size, 3 * flops, peak_extra_bytes=8 * size, passes=passes),
            "torch.compile": entry(7e-7 * size, 3 * flops),
            "cpu": entry(3e-7 * size, flops, peak_extra_bytes=2 * size, passes=passes),
        },
        "wrong": {}, **more,
    }  # fmt: skip


@pytest.fixture
def results() -> dict[str, Any]:
    """Two operators, one of them at three sizes, two dtypes, and a wrong backend."""
    limits = {"copy_bytes_per_second": 2e10, "flops_per_second": 1e11}
    without = row("b_attention", 4096, "bfloat16", wrong={"cuda": "out: relative <error> 1.0"})
    without["alternatives"].pop("torch.compile")
    return {
        "machine": {**info(), "processor": "a <processor>", "gpu": None},
        "ceilings": {"float32": limits, "bfloat16": limits},
        "cases": [row("a_attention", 4096), without],
        "growth": [row("a_attention", 256), row("a_attention", 1024)],
    }


class Page(HTMLParser):
    """What a page refers to, the marks of every named group of its plots, its ids, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.marks: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.words: list[str] = []
        self._groups: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        found = dict(attributes)
        self.tags[tag] += 1
        self.references += [v for k, v in attributes if k in ("src", "href", "xlink:href", "data", "action")]
        if "id" in found:
            self.ids[found["id"]] += 1
        if tag == "g":
            self._groups.append(found.get("id", ""))
        if tag in ("use", "path"):
            for group in self._groups:
                self.marks[group, tag] += 1  # type: ignore[index]

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.handle_starttag(tag, attributes)
        if tag == "g":
            self._groups.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag == "g":
            self._groups.pop()

    def handle_data(self, data: str) -> None:
        self.words += data.split()


@pytest.fixture
def path(results, tmp_path) -> Path:
    path = tmp_path / "page.html"
    write_html(results, path)
    return path


def test_every_plot_is_there_with_its_data(path):
    page = Page(path.read_text())
    series = "a_attention_1xN,_float32,_forward_and_backward"
    marks = {
        f"time:{series}:eager": 3,
        f"time:{series}:torch.compile": 3,
        f"time:{series}:cpu": 3,
        f"memory:{series}:eager": 3,
        f"memory:{series}:cpu": 3,
        "roofline:float32:eager": 1,
        "roofline:float32:torch.compile": 1,
        "roofline:float32:cpu": 1,
        "roofline:bfloat16:eager": 1,
        "roofline:bfloat16:cpu": 1,
    }
    found = {group: n for (group, tag), n in page.marks.items() if tag == "use" and ":" in group}  # type: ignore[misc]
    assert found == marks
    bars = {group for (group, tag) in page.marks if tag == "path" and group.startswith("breakdown:")}  # type: ignore[misc]
    for operator, dtype in (("a", "float32"), ("b", "bfloat16")):
        case = f"{operator}_attention_1x4096,_{dtype},_forward_and_backward"
        for name in ("eager", "cpu"):
            assert {f"breakdown:{case}:{name}:{part}" for part in ("forward", "backward", "rest")} <= bars
    assert all(("roofline:" + dtype + ":roof", "path") in page.marks for dtype in ("float32", "bfloat16"))
    assert page.tags["svg"] == 2 + 1 + 1 + 2


def test_the_table_says_what_was_measured(path):
    text = " ".join(Page(path.read_text()).words)
    # 4096 * 1e5 operations take 4.096 ms at 1e11 per second; cpu took 1.2288 ms.
    assert "cpu 1.23 (1.11 to 1.47) 3.3x 333% (arithmetic) 333.3 GFLOP/s 0.0 MiB" in text
    assert "cuda wrong, no speed: out: relative <error> 1.0" in text
    assert "a <processor>" in text


def test_nothing_external_is_referenced(path):
    text = path.read_text()
    page = Page(text)
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert not page.tags["script"] and not page.tags["iframe"] and "@import" not in text
    assert [name for name, count in page.ids.items() if count > 1] == []
    for used in re.findall(r"url\(#([^)]+)\)", text) + [r[1:] for r in page.references if r.startswith("#")]:
        assert page.ids[used] == 1
    assert 'name="viewport"' in text


def test_the_same_results_make_the_same_page(results, path, tmp_path):
    again = tmp_path / "again.html"
    write_html(copy.deepcopy(results), again)
    assert again.read_bytes() == path.read_bytes()


def test_one_case_alone_has_a_page(results, tmp_path):
    """With nothing to plot against size."""
    path = tmp_path / "page.html"
    write_html({**results, "cases": results["cases"][1:], "growth": []}, path)
    assert "b_attention" in path.read_text()


PROBE = """<script>
const boxes = (which) => [...document.querySelectorAll(which)].map(x => x.getBoundingClientRect());
const outside = (x) => !x.closest('.scroll') && !x.closest('svg');
window.onload = () => {
  const { clientWidth, scrollWidth } = document.documentElement;
  const wide = [...document.querySelectorAll('body *')].filter(outside)
    .filter(x => x.getBoundingClientRect().right > clientWidth + 1).length;
  const plots = boxes('svg').filter(x => x.width > 250 && x.height > 40).length;
  document.title = JSON.stringify(['PROBE', clientWidth, scrollWidth, wide, plots]);
};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_opens_on_a_phone(path, tmp_path):
    """Nothing wider than the screen but tables, which scroll; every plot has a size; no error is logged."""
    probed = tmp_path / "probed.html"
    # The page in a frame of a phone's width: a browser's window has a least width of its own.
    inside = (
        path.read_text().replace("</body>", PROBE + "</body>").replace("&", "&amp;").replace('"', "&quot;")
    )
    probed.write_text(
        f'<iframe width="{PHONE}" height="800" style="border:0" srcdoc="{inside}"></iframe>'
        "<script>onload = () => setTimeout(() => document.body.append("
        "document.querySelector('iframe').contentDocument.title), 500)</script>"
    )
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
        "--dump-dom", probed.as_uri(),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "CONSOLE" not in run.stderr
    told = re.search(r'\["PROBE",(\d+),(\d+),(\d+),(\d+)\]', run.stdout.replace("&quot;", '"'))
    assert told is not None, run.stdout[-500:]
    width, needed, wide, plots = map(int, told.groups())
    assert needed <= width <= PHONE and wide == 0
    assert plots == Page(path.read_text()).tags["svg"]


def test_files_are_named_after_the_machine(results):
    assert file_name(results["machine"]["processor"]) == "a-processor.json"
