"""The precision of matrix products that the user asked PyTorch for, by each of its settings."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from egnn_fast.operators.precision import matmul_precision


def in_a_process_of_its_own(*lines: str) -> list[str]:
    """What the lines print: the settings are the process's, and cannot all be taken back."""
    code = "\n".join(
        (
            "import torch",
            "from egnn_fast.operators.precision import matmul_precision",
            "matmul = torch.backends.cuda.matmul",
            "def show(): print(matmul_precision('cpu'), matmul_precision('cuda'))",
            *lines,
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_older_setting_and_then_the_newer_one() -> None:
    found = in_a_process_of_its_own(
        "show()",
        "matmul.allow_tf32 = True", "show()",
        "matmul.allow_tf32 = False", "show()",
        "torch.set_float32_matmul_precision('high')", "show()",
        "torch.set_float32_matmul_precision('medium')", "show()",
        "torch.set_float32_matmul_precision('highest')", "show()",
        "matmul.allow_tf32 = True", "show()",
        "matmul.fp32_precision = 'ieee'", "show()",
        "matmul.fp32_precision = 'tf32'", "show()",
    )  # fmt: skip
    assert found == [
        f"{p} {p}"
        for p in (
            "highest", "high", "highest", "high", "high", "highest", "high", "highest", "high",
        )
    ]  # fmt: skip


def test_the_newer_setting_alone() -> None:
    """The older one, which is read first, raises once the newer one asks for tf32."""
    found = in_a_process_of_its_own(
        "for place in (torch.backends, matmul):",
        "    place.fp32_precision = 'tf32'",
        "    show()",
        "    try:",
        "        print(matmul.allow_tf32)",
        "    except RuntimeError:",
        "        print('refused')",
        "    place.fp32_precision = 'ieee'",
        "    show()",
    )
    assert found == ["high high", "refused", "highest highest"] * 2


def test_products_leave_the_setting_as_it_was() -> None:
    found = in_a_process_of_its_own(
        "from egnn_fast.operators.precision import float32_products",
        "def products(precision):",
        "    with float32_products(precision): show()",
        "products('high')", "show()", "products('bf16')",
        "print(torch.get_float32_matmul_precision(), matmul.fp32_precision)",
        "torch.set_float32_matmul_precision('medium')",
        "products('highest~')", "print(torch.get_float32_matmul_precision())",
        "torch.set_float32_matmul_precision('highest')",
        "matmul.fp32_precision = 'none'",
        "torch.backends.fp32_precision = 'tf32'", "show()",
        "products('highest')", "show()",
        "torch.backends.fp32_precision = 'ieee'", "show()",
        "matmul.fp32_precision = 'tf32'", "products('highest')", "print(matmul.fp32_precision)",
    )  # fmt: skip
    high, highest = "high high", "highest highest"
    assert found == [
        high, highest, highest, "highest none", highest, "medium", high, highest, high, highest,
        highest, "tf32",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")], ids=["bf16", "fp16"]
)
def test_autocast_goes_before_the_setting(dtype: torch.dtype, name: str) -> None:
    with torch.autocast("cpu", dtype):
        assert matmul_precision("cpu") == name
        assert matmul_precision("cuda") == "highest"  # another device's
        with torch.autocast("cpu", enabled=False):
            assert matmul_precision("cpu") == "highest"
    assert matmul_precision("cpu") == "highest"


def test_another_dtype_of_autocast_is_refused() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        torch.set_autocast_dtype("cpu", torch.float64)
        with pytest.raises(TypeError, match=r"autocast: expected bfloat16 or float16, got .*64"):
            matmul_precision("cpu")
