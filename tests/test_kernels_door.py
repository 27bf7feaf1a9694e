"""The door to the kernels: what it answers, the one override, and that nobody else chooses."""

import re
from types import SimpleNamespace

import pytest
import torch

from glm_utils.family import FAMILIES
from tests.fresh_scripts import load_script

CPU = torch.zeros(1, 2, 8)


@pytest.fixture
def kernels():
    """A fresh door without overrides, whatever the environment says."""
    module = load_script("kernels_chatglm")
    module.OVERRIDES.clear()
    return module


def answers(module):
    """Return what the door says of a CPU input, by kernel."""
    return {
        "triton": (module.triton_takes(CPU), module.triton_takes_quantized(CPU)),
        "varlen": (module.varlen_takes(CPU),),
        "nvrtc": (module.nvrtc_runs_on(CPU.device),),
    }


def test_no_kernel_takes_a_cpu_input(kernels):
    assert not any(map(any, answers(kernels).values()))


def test_each_override_forces_one_kind_of_kernel(kernels, monkeypatch):
    for name in kernels.KERNELS:
        with monkeypatch.context() as patch:
            patch.setitem(kernels.OVERRIDES, name, True)
            assert {key for key, forced in answers(kernels).items() if all(forced)} == {name}
            patch.setitem(kernels.OVERRIDES, name, False)
            assert not any(map(any, answers(kernels).values()))


@pytest.mark.parametrize(
    ("value", "disabled"),
    [
        ("", set()),
        ("nvrtc", {"nvrtc"}),
        (" triton, varlen ,", {"triton", "varlen"}),
        ("all", {"triton", "nvrtc", "varlen"}),
        ("varlen,all", {"triton", "nvrtc", "varlen"}),
    ],
)
def test_environment_disables_kernels(monkeypatch, value, disabled):
    monkeypatch.setenv("CHATGLM_DISABLE_KERNELS", value)
    overrides = load_script("kernels_chatglm").OVERRIDES
    assert overrides == dict.fromkeys(disabled, False)


def test_environment_stands_above_what_the_device_can_do(monkeypatch):
    x = SimpleNamespace(is_cuda=True, dtype=torch.float16, shape=(1, 128), device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for value, expected in (("", True), ("all", False)):
        monkeypatch.setenv("CHATGLM_DISABLE_KERNELS", value)
        module = load_script("kernels_chatglm")
        monkeypatch.setattr(module, "triton", object())
        monkeypatch.setattr(module, "varlen_attn", object())
        for takes in (module.triton_takes, module.triton_takes_quantized, module.varlen_takes):
            assert takes(x) is expected, takes


def test_a_misspelled_kernel_is_refused(monkeypatch):
    monkeypatch.setenv("CHATGLM_DISABLE_KERNELS", "tritan,nvrtc")
    with pytest.raises(ValueError, match=r"CHATGLM_DISABLE_KERNELS=tritan,nvrtc: \['tritan'\] not known"):
        load_script("kernels_chatglm")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_only_the_door_chooses(family):
    """Optional packages are imported there alone, and the modelling code asks for no kernel."""
    for path in family.remote_dir.glob("*.py"):
        if path.name != "kernels_chatglm.py":
            text = path.read_text("utf-8")
            assert not re.search(r"import triton|torch.nn.attention|except ImportError:", text), path
            if path.name == "modeling_chatglm.py":
                assert not re.search(r"_takes|runs_on|triton|nvrtc|varlen", text.lower())
