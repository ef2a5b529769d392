"""The README and its neighbours say what is so: code runs, names, commands and links exist."""

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
from egnn_fast.kernels import PROVEN
from egnn_fast.nn._parts import LayerArgs
from egnn_fast.options import Options

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
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
every_document = pytest.mark.parametrize("document", DOCUMENTS)


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


def test_python_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    examples = blocks(README, "python")
    assert len(examples) >= 3
    namespace: dict[str, Any] = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), namespace)
    assert "Explanation(backend='cpu'" in capsys.readouterr().out
    assert namespace["loss"].isfinite()
    assert namespace["M"].shape == (100, 32)
    assert namespace["X"].shape == (100, 3)


def test_switch_from_the_official_code() -> None:
    """The new line imports the names of the old one, from the module of the table."""
    (diff,) = blocks(README, "diff")
    old, new = diff.splitlines()
    pattern = r"from ([\w.]+) import (.+)"
    before, after = re.fullmatch("-" + pattern, old), re.fullmatch(r"\+" + pattern, new)
    assert before
    assert after
    assert before[2] == after[2]
    homes = {
        first_code(official): first_code(ours)
        for ours, official, _ in table(README, "module", "official module", "classes")
    }
    assert homes[before[1]] == after[1]
    exec(new[1:], {})


def test_compat_table() -> None:
    rows = table(README, "module", "official module", "classes")
    assert {first_code(row[0]) for row in rows} == {f"egnn_fast.compat.{n}" for n in compat.__all__}
    for ours, official, classes in rows:
        module = importlib.import_module(first_code(ours))
        public = {n for n in module.__all__ if isinstance(getattr(module, n), type)}
        assert set(inline_code(classes)) == public
        assert first_code(official) in (compat.__doc__ or "")


def test_table_of_options_is_complete_and_its_defaults_are_right() -> None:
    rows = table(README, "option", "default", "meaning", "official name")
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
    rows = table(README, "option", "default", "meaning", "official name")
    official = {code for row in rows for code in inline_code(row[3]) if code.isidentifier()}
    assert {"act_fn", "norm_diff", "recurrent", "coords_weight"} <= official <= accepted


def test_table_of_forward_arguments() -> None:
    shown = {first_code(row[0]) for row in table(README, "argument", "shape", "meaning")}
    signature = inspect.signature(nn.EGCLVel.forward).parameters.keys()
    assert shown == signature - {"self", "h", "x", "graph"}


def test_table_of_backends() -> None:
    rows = table(README, "backend", "state", "runs on", "dtypes")
    assert [first_code(row[0]) for row in rows] == list(BACKENDS)
    for row in rows:
        name = first_code(row[0])
        if name == "triton":  # here it is interpreted: what the table says of GPUs is PROVEN's
            assert row[1].startswith("compiled and interpreted, not yet run on a GPU")
            assert not PROVEN
            continue
        reason = backends.unavailable(name)
        assert row[1] == ("ready" if reason is None else "no kernels in this version"), reason
    dtypes = next(row[3] for row in rows if first_code(row[0]) == "cpu")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        refused = backends.refusal("cpu", backends.Call("cpu", dtype, 8, 3, "silu"))
        assert (str(dtype)[6:] in inline_code(dtypes)) == (refused is None)


@every_document
def test_commands_of_ours_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    calls = commands(text, "egnn-fast")
    assert calls or document == "CONTRIBUTING.md"
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
    calls = commands((ROOT / document).read_text(encoding="utf-8"), "make")
    assert calls
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    for word in (word for words in calls for word in words):
        name, _, value = word.partition("=")
        assert f"$({name})" in MAKEFILE if value else name in targets, word


@every_document
def test_links_resolve(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = ROOT / (path or document)
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


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
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
        for code in inline_code(README)
        if (found := re.match(r"(?:with )?(egnn_fast(?:\.[A-Za-z]\w*)+)", code))
    }
    assert len(names) > 5
    for name in names:
        pkgutil.resolve_name(name)


def test_figures_of_the_paper() -> None:
    (sentence,) = re.findall(r"The paper reports (.+?)\.\n", README, re.DOTALL)
    told = re.findall(r"(0\.\d+) for ([A-Z][A-Za-z ]+?)(?:,| and|$)", " ".join(sentence.split()))
    assert len(told) == 4
    assert {name: float(value) for value, name in told}.items() <= PAPER.items()


@pytest.mark.parametrize("name", ["nbody", "speed", "memory"])
def test_blocks_of_figures_hold_one_table(name: str) -> None:
    (block,) = re.findall(rf"<!-- figures:{name} -->\n(.*?)<!-- /figures:{name} -->", README, re.S)
    lines = [line for line in block.splitlines() if line.startswith("|")]
    assert len(lines) >= 2
    assert len({line.count("|") for line in lines}) == 1
