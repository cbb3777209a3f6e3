import subprocess
import sys

import pytest

import llm_distill.data


def test_a_recipe_can_be_read_without_torch_or_datasets() -> None:
    code = (
        "import sys, llm_distill.data; llm_distill.data.Data(path='a'); "
        "sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_public_names_are_there() -> None:
    for name in llm_distill.data.__all__:
        assert vars(llm_distill.data).get(name) or llm_distill.data.__getattr__(name)
    with pytest.raises(AttributeError, match=r"module 'llm_distill.data' has no attribute 'laod'"):
        llm_distill.data.__getattr__("laod")
