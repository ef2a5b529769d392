"""README, docs/ and their neighbours say what is so: code runs, names, commands and links exist."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from egnn_fast import backends, compat, nn
from egnn_fast.backends import BACKENDS
from egnn_fast.cli import app
from egnn_fast.experiments.nbody.summary import PAPER
from egnn_fast.kernels import PROVEN, TRIED, assembler
from egnn_fast.nn.layers import LayerArgs
from egnn_fast.options import Options

ROOT = Path(__file__).resolve().parents[2]
# the manual: all code on these pages runs
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
DOCUMENTS = (*PAGES, "CONTRIBUTING.md", "CHANGELOG.md")
# what else has links
LINKED = (*DOCUMENTS, "bench/README.md", "bench/results/NOTES.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in LINKED}
README, CONTRIBUTING = TEXTS["README.md"], TEXTS["CONTRIBUTING.md"]
OPTIONS, COMPAT = TEXTS["docs/options.md"], TEXTS["docs/compat.md"]
MANUAL = "\n".join(TEXTS[page] for page in PAGES)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SOURCE_FILES = [
    *(p for folder in ("egnn_fast", "kernels", "tests") for p in (ROOT / folder).rglob("*.py")),
    *(p for p in (ROOT / "csrc").rglob("*") if p.is_file()),
    *(ROOT / name for name in ("setup.py", "CMakeLists.txt", "Makefile")),
]
# without this file, which would find its own words
SOURCES = "\n".join(
    p.read_text(encoding="utf-8") for p in SOURCE_FILES if p != Path(__file__).resolve()
)
every_page = pytest.mark.parametrize("page", PAGES)
every_document = pytest.mark.parametrize("document", DOCUMENTS)
# the pages with code: one that loses its blocks would otherwise pass
WITH_CODE = {
    "README.md",
    *(f"docs/{name}.md" for name in ("accuracy", "backends", "compat", "compile", "graphs")),
    "docs/gpus.md",
    "docs/options.md",
}


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def inline_code(text: str) -> list[str]:
    """All `code` within sentences and tables, a line break within it as a space."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def table(text: str, *header: str) -> list[list[str]]:
    """The cells of the one table with this header."""
    lines = text.splitlines()
    (begin,) = [k for k, line in enumerate(lines) if cells(line) == list(header)]
    assert re.fullmatch(r"[|\-: ]+", lines[begin + 1])
    rows = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(cells(line))
        assert len(rows[-1]) == len(header), line
    assert rows
    return rows


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []


def first_code(cell: str) -> str:
    """What stands in the cell's first backquotes."""
    found = re.match(r"`([^`]+)`", cell)
    assert found, cell
    return found[1]


def commands(text: str, program: str) -> list[list[str]]:
    """The arguments of each call of a program, in blocks and sentences."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    calls = [line for line in [*lines, *inline_code(text)] if line.startswith(f"{program} ")]
    return [shlex.split(line, comments=True)[1:] for line in calls]


def heading_anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def run_blocks(page: str) -> dict[str, Any]:
    """What the names of a page's code stand for after all its blocks, in their order."""
    namespace: dict[str, Any] = {"__name__": page}
    for example in blocks(TEXTS[page], "python"):
        exec(compile(example, page, "exec"), namespace)
    return namespace


@every_page
def test_python_blocks_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    found = run_blocks(page)
    assert (page in WITH_CODE) is bool(blocks(TEXTS[page], "python"))
    printed = capsys.readouterr().out
    if page in ("README.md", "docs/backends.md"):
        assert "Explanation(backend='cpu'" in printed
    if page == "README.md":
        assert found["loss"].isfinite()
    if page == "docs/options.md":
        assert found["M"].shape == (10, 32)
        assert found["X"].shape == (10, 3)
    if page == "docs/accuracy.md":
        assert found["report"].passed
    if page == "docs/compile.md":
        assert found["second"].shape == (20, 3, 20, 3)
        assert torch.allclose(found["forces"], -found["gradient"], atol=1e-5)
        assert found["model"].embedding_in.weight.grad is not None
    torch._dynamo.reset()


def test_the_readme_is_short_and_the_index_names_every_page() -> None:
    assert len(README.splitlines()) <= 150
    index = TEXTS["docs/README.md"]
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", index))
    assert {f"docs/{name}" for name in linked} | {"README.md", "docs/README.md"} == set(PAGES)


@every_page
def test_lines_fit_into_a_terminal(page: str) -> None:
    """Prose at 80 columns; tables, links and code may be wider."""
    prose = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    for line in prose.splitlines():
        assert len(line) <= 84 or line.startswith("|") or "](" in line, line


def test_switch_from_the_official_code() -> None:
    """The new line imports the names of the old one, from the module of the table."""
    (diff,) = blocks(COMPAT, "diff")
    old, new = diff.splitlines()
    pattern = r"from ([\w.]+) import (.+)"
    before, after = re.fullmatch("-" + pattern, old), re.fullmatch(r"\+" + pattern, new)
    assert before
    assert after
    assert before[2] == after[2]
    homes = {
        first_code(official): first_code(ours)
        for ours, official, _ in table(COMPAT, "module", "official module", "classes")
    }
    assert homes[before[1]] == after[1]
    exec(new[1:], {})


def test_compat_table() -> None:
    rows = table(COMPAT, "module", "official module", "classes")
    assert {first_code(row[0]) for row in rows} == {f"egnn_fast.compat.{n}" for n in compat.__all__}
    for ours, official, classes in rows:
        module = importlib.import_module(first_code(ours))
        public = {n for n in module.__all__ if isinstance(getattr(module, n), type)}
        assert set(inline_code(classes)) == public
        assert first_code(official) in (compat.__doc__ or "")


def test_table_of_options_is_complete_and_its_defaults_are_right() -> None:
    rows = table(OPTIONS, "option", "default", "meaning", "official name")
    shown = {first_code(row[0]): ast.literal_eval(first_code(row[1])) for row in rows}
    assert len(shown) == len(rows)
    fields = {f.name: f.default for f in Options.__dataclass_fields__.values()}
    assert shown.keys() == fields.keys() | LayerArgs.__annotations__.keys() | {"carry_velocity"}
    arguments = {
        name: p.default
        for layer in (nn.EGCL, nn.EGCLVel)
        for name, p in inspect.signature(layer.__init__).parameters.items()
    }
    for name, default in shown.items():
        assert arguments.get(name, fields.get(name)) == default, name
        if name in fields and name != "activation":
            assert fields[name] == default, name
    assert isinstance(nn.EGCL(1, 1, 1).edge_mlp[1], torch.nn.SiLU)


def test_official_names_are_arguments_of_the_official_classes() -> None:
    modules = [getattr(compat, name) for name in compat.__all__]
    accepted = {
        name
        for module in modules
        for kind in (getattr(module, n) for n in module.__all__)
        if isinstance(kind, type)
        for name in inspect.signature(kind).parameters
    }
    rows = table(OPTIONS, "option", "default", "meaning", "official name")
    official = {code for row in rows for code in inline_code(row[3]) if code.isidentifier()}
    assert {"act_fn", "norm_diff", "recurrent", "coords_weight"} <= official <= accepted


def test_table_of_forward_arguments() -> None:
    shown = {first_code(row[0]) for row in table(OPTIONS, "argument", "shape", "meaning")}
    signature = inspect.signature(nn.EGCLVel.forward).parameters.keys()
    assert shown == signature - {"self", "h", "x", "graph"}


@pytest.mark.parametrize("page", ["README.md", "docs/backends.md"])
def test_table_of_backends(page: str) -> None:
    rows = table(TEXTS[page], "backend", "state", "runs on", "dtypes")
    assert [first_code(row[0]) for row in rows] == list(BACKENDS)
    for row in rows:
        name = first_code(row[0])
        if name == "triton":  # here it is interpreted: what the table says of GPUs is PROVEN's
            assert row[1] == "partly checked on an H200"
            assert not PROVEN
            assert TRIED
            continue
        reason = backends.unavailable(name)
        assert (row[1], reason) == ("ready", None)
    for name in ("cpu", "triton"):
        dtypes = next(row[3] for row in rows if first_code(row[0]) == name)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            refused = backends.refusal(name, backends.Call("cpu", dtype, 8, 3, "silu"))
            assert (str(dtype)[6:] in inline_code(dtypes)) == (refused is None)


def test_table_of_assemblers() -> None:
    """What the page of GPUs says of each ptxas is what the code does."""
    rows = table(TEXTS["docs/gpus.md"], "ptxas", 'with `backend="triton"` on Hopper')
    levels = {"warns": "warn", "raises": "refuse", "runs": None}
    told = {}
    for versions, does in rows:
        plain = re.sub(r"\(.*?\)", "", versions)
        for version in re.findall(r"\d+\.\d+", plain):
            # before 12.8: 12.7
            major, minor = (int(part) for part in version.split("."))
            told[major, minor - plain.startswith("before")] = levels[does]
    assert len(told) >= 7
    for (major, minor), level in told.items():
        ptxas = assembler.Assembler("ptxas", f"{major}.{minor}.0", "a test", "VARIABLE", True)
        found = assembler.doubt(90, ptxas)
        assert (None if found is None else found.level) == level, (major, minor)


@every_document
def test_commands_of_ours_exist(document: str) -> None:
    calls = commands(TEXTS[document], "egnn-fast")
    assert calls or document not in ("README.md", "CHANGELOG.md", "docs/nbody.md")
    for words in calls:
        command: Any = typer.main.get_command(app)
        while words and words[0] in getattr(command, "commands", {}):
            command, words = command.commands[words[0]], words[1:]
        assert not hasattr(command, "commands"), words
        # parses every argument, and runs nothing
        command.make_context("egnn-fast", [word for word in words if word != "--help"])


def test_an_unknown_option_would_be_noticed() -> None:
    (words,) = commands("```sh\negnn-fast check --fast  # a comment\n```\n", "egnn-fast")
    command: Any = typer.main.get_command(app)
    with pytest.raises(Exception, match="No such option"):
        command.commands[words[0]].make_context("egnn-fast", words[1:])


@every_document
def test_make_targets_exist(document: str) -> None:
    calls = commands(TEXTS[document], "make")
    assert calls or document.startswith(("docs/", "CHANGELOG"))
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    for word in (word for words in calls for word in words):
        name, _, value = word.partition("=")
        assert f"$({name})" in MAKEFILE if value else name in targets, word


@pytest.mark.parametrize("document", [*PAGES, "CONTRIBUTING.md"])
def test_tools_that_python_runs_exist(document: str) -> None:
    for words in commands(TEXTS[document], "python"):
        if words[0] == "-m" and words[1].startswith("bench."):
            path = ROOT / words[1].replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), words
        elif "/" in words[0]:
            assert (ROOT / words[0]).is_file(), words


@pytest.mark.parametrize("document", LINKED)
def test_links_resolve(document: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[document])
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.is_file(), link
        if anchor:
            assert anchor in heading_anchors(target.read_text(encoding="utf-8")), link


def paths_in(text: str) -> Iterator[str]:
    for code in inline_code(text):
        if re.match(r"(egnn_fast|csrc|tests|kernels|bench|\.ci)/[\w./*]*$", code):
            yield code


def test_files_named_in_contributing_exist() -> None:
    named = list(paths_in(CONTRIBUTING))
    assert len(named) > 40
    for path in named:
        assert list(ROOT.glob(path.rstrip("/"))), path


def test_contributing_names_every_file_of_the_core() -> None:
    named = {found for path in paths_in(CONTRIBUTING) for found in ROOT.glob(path)}
    core = {p for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    modules = set((ROOT / "egnn_fast").glob("*.py")) - {ROOT / "egnn_fast" / "__init__.py"}
    assert not {str(p.relative_to(ROOT)) for p in (core | modules) - named}


@pytest.mark.parametrize("text", [MANUAL, CONTRIBUTING], ids=["manual", "CONTRIBUTING"])
def test_names_in_code_exist(text: str) -> None:
    """Identifiers with an underscore or a capital inside, and environment variables."""
    codes = {code.removesuffix("()") for code in inline_code(text)}
    names = {c for c in codes if c.isidentifier() and re.search(r".[_A-Z]", c)}
    names |= set(re.findall(r"EGNN_FAST_[A-Z_]+", text))
    assert len(names) > 10
    missing = {name for name in names if not re.search(rf"\b{name}\b", SOURCES)}
    # what others made
    assert missing <= {"edge_index"}


def test_public_names_exist() -> None:
    names = {
        found[1]
        for code in inline_code(MANUAL)
        if (found := re.match(r"(?:with )?(egnn_fast(?:\.[A-Za-z]\w*)+)", code))
    }
    assert len(names) > 5
    for name in names:
        pkgutil.resolve_name(name)


def test_figures_of_the_paper() -> None:
    (sentence,) = re.findall(r"The paper reports (.+?)\.\n", MANUAL, re.DOTALL)
    told = re.findall(r"(0\.\d+) for ([A-Z][A-Za-z ]+?)(?:,| and|$)", " ".join(sentence.split()))
    assert len(told) == 4
    assert {name: float(value) for value, name in told}.items() <= PAPER.items()


@pytest.mark.parametrize("name", ["nbody", "summary", "speed", "memory"])
def test_blocks_of_figures_hold_one_table(name: str) -> None:
    (block,) = re.findall(rf"<!-- figures:{name} -->\n(.*?)<!-- /figures:{name} -->", MANUAL, re.S)
    lines = [line for line in block.splitlines() if line.startswith("|")]
    assert len(lines) >= 2
    assert len({line.count("|") for line in lines}) == 1
